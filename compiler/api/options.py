"""Everything that can be asked of a compilation: one object for Python, command line, recipes and layer by layer.

An option is a field of `CompileOptions` or of a class that it is made from. It appears on the command line, and where
it decides the result (`AttentionOptions`, `CalibrationOptions`) in recipes; the functions that take it as a keyword
list it in `attnedit.arguments` for type checkers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from pydantic import BeforeValidator, Field, InstanceOf, SkipValidation, model_validator
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from attnedit.compiler.data.window_sources import TextSource
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.processors import Processor
from attnedit.compiler.options import Flag, Number, Options, Switch, Whole
from attnedit.compiler.progress import Progress
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.compiler.rewriting.rewrite import Rewrite
from attnedit.passes.budget import Allocation
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.target import AnyTarget, AttentionTarget
from attnedit.passes.targets import OURS as OURS
from attnedit.passes.targets import OWN, readers, targets_named
from attnedit.targets.runtime.hf.towards import Form, form_for

TARGETS = tuple(OURS)
READERS: dict[str, list[str]] = {
    name: readers(name) for name in dict.fromkeys(name for target in OWN.values() for name in sorted(target.reads))
} | {"partial": []}
"""Of options that not every target reads: those of ours that do; none for an option of rewrites."""


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _dtype_name(value: Any) -> Any:
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value


class DataOptions(Options):
    """Of the data that a model is fitted or trained on."""

    calibration: Annotated[SkipValidation[TextSource], Flag(list[str])] = None
    """Text, jsonl, json or parquet file, or a dataset's name; without it the model's own samples. Several times for a
    mixture, each NAME or NAME=WEIGHT.

    In Python a path, a `datasets` name, a mapping from such to weights, an iterable of strings, token ids, or None for
    the model's own samples. Token ids are an int64 tensor [N, L], N windows of L tokens that are taken as they are
    (or a list of such, of several lengths), or an iterable of int64 tensors [T], which are joined in order and cut."""
    seed: Annotated[Whole, Field(ge=0, le=2**63 - 1)] = 0
    """Same seed, same result.

    Of sampled text and sampled queries."""


class AttentionOptions(DataOptions):
    """What attention becomes, in closed form: what decides a result that is not trained."""

    target: str | InstanceOf[Target] = "mla"
    """What attention becomes: mla, gateswa or gateswa+mla, or targets and passes of other packages.

    "mla" is latent attention; "gateswa" a sliding window in most layers; with "gateswa+mla" the layers without window
    become latent. An `AttentionTarget` of another package is budgeted and fitted like these; a `Target`, or passes that
    packages register, are applied as by `attnedit.rewrite`."""
    kv_budget: Annotated[Number | None, Field(gt=0, le=1)] = None
    """Cached values per token as a fraction of the source's, above 0 to 1.

    Averaged over layers at the model's context length. For "mla" 0.5 unless given; at 1.0 the result computes exactly
    what the source does. For "gateswa" it says how many layers stay full, in place of `full_layers`. For "gateswa+mla"
    it covers both; unless given, the layers without window are halved."""
    window: Annotated[Whole | None, Field(ge=1)] = None
    """GateSWA: tokens each query sees, itself included; 128 unless given."""
    full_layers: Annotated[Whole | str | list[Whole] | None, BeforeValidator(_listed), Flag(str)] = None
    """GateSWA: how many layers stay full (chosen by measured loss), every:N, or 3,7,11; a quarter.

    In Python a list of layer indices too."""
    gate: str | None = None
    """GateSWA: output gate, head, element or none; none unless given.

    Per head or per element. It starts without effect."""
    sinks: str | None = None
    """GateSWA: for what windows hide: none, or logit, value, keep:N with commas; logit,value,keep:4 unless given.

    A sink logit per head, a value per key/value head for it (which needs the logit), and the first N tokens, which stay
    visible. With a profile or an engine: none unless given."""
    profile: str | None = None
    """Compile towards a checkpoint of this form (docs/export-hf.md), so that export changes nothing.

    What its class lacks is left out from the start. For "mla" norms and biases become linear maps."""
    kernel_dims: Switch = False
    """With a latent profile: the sizes of engines' kernels (latent 512, rotary 64, heads 128) in place of a budget."""
    engine: str | None = None
    """What will serve the result: vllm, sglang or llama.cpp (docs/engines).

    It implies profile and sizes, and refuses what contradicts it."""
    allocation: Allocation = "auto"
    """How layers share the latent cache: even, or loss, by what each costs alone; auto unless given.

    What each costs is measured first. "auto" is by loss where latent layers keep less than a third of the source's
    cache and `alternations` is above 1; it is even where layers must be of one size or are rewritten one by one. A
    native checkpoint, whose layers have all one size, is then as large as the largest."""
    calibration_tokens: Annotated[Whole | None, Field(ge=2)] = None
    """How many calibration tokens to use.

    Unless told, of given data 16 windows of `calibration_length` and 32 of 1,024 (65,536 tokens where the context is no
    longer than that), and 8,192 of own samples."""
    calibration_length: Annotated[Whole | None, Field(ge=2)] = None
    """Tokens of the longest calibration windows, as many as are to be served; the context.

    Unless told, the context up to 32,768 on an accelerator and 8,192 elsewhere."""
    alternations: Annotated[Whole, Field(ge=0)] = FitOptions.alternations
    """Rounds of least squares per layer after the analytic start; more is slower and better.

    0 and 1 are quick jobs on few sampled queries; 2 is nearly converged."""


class SourceOptions(Options):
    """Of reading a model."""

    device: Annotated[str | torch.device | None, Flag(str)] = None
    """cpu, cuda, npu, ... or auto; auto unless given.

    For a live model: where it is unless given."""
    dtype: Annotated[str, BeforeValidator(_dtype_name)] = "float32"
    """float32, bfloat16, float16 or auto (the checkpoint's own)."""
    revision: str | None = None
    """Branch, tag or commit of a hub model."""
    dequantize: Switch = False
    """Unpack a source that is already quantised."""
    allow_pickle: Switch = False
    """Read weights that are pickles (.bin) where there are no safetensors."""
    trust_remote_code: Switch = False
    """Run the modelling code that comes with the checkpoint; read it before.

    It can do anything that you can."""

    @property
    def loading(self) -> dict[str, Any]:
        """Keyword arguments for `attnedit.compiler.model_io.models.load_source`."""
        return {name: getattr(self, name) for name in SourceOptions.model_fields}


class JobOptions(Options):
    """Of the work itself; they do not decide the result."""

    tokenizer: Annotated[SkipValidation[PreTrainedTokenizerBase | None], Flag(None)] = None
    """For calibration text; saved with the result."""
    processor: Annotated[SkipValidation[Processor | None], Flag(None)] = None
    """Of a vision-language model, or its directory: for calibration chats with images; saved with the result.

    Its tokenizer is used unless another is given."""
    verify: Switch = True
    """Hold the result to its contract on real numbers."""
    run_directory: Annotated[str | PathLike[str] | None, Flag(None)] = None
    """Where fits are kept, and training keeps its checkpoints and log.

    The same call with the same directory goes on where an earlier one stopped."""
    progress: Annotated[SkipValidation[Progress | None], Flag(None)] = None
    """See `attnedit.compiler.progress`."""

    @model_validator(mode="before")
    @classmethod
    def _with_tokenizer(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Take the tokenizer out of a processor."""
        if isinstance(values.get("tokenizer"), ProcessorMixin):
            raise UsageError(f"tokenizer is a {type(values['tokenizer']).__name__}; give it as processor")
        own = getattr(values.get("processor"), "tokenizer", None)
        return values if own is None or values.get("tokenizer") is not None else {**values, "tokenizer": own}


class CalibrateOptions(JobOptions, CalibrationOptions, DataOptions):
    """What `attnedit.calibrate` can be asked for."""


class CompileOptions(CalibrateOptions, SourceOptions, AttentionOptions):
    """What a compilation can be asked for; checked once, when it is made, as far as no model is needed."""

    called = "option"
    in_place: Annotated[Switch, Flag(None)] = False
    """Rewrite the model itself instead of a copy that shares its tensors."""
    partial: Switch = False
    """Rewrites: let attention sites be that none of them matches; otherwise they are an error."""
    fuel: Annotated[Whole | None, Field(ge=0)] = None
    """Stop after so many rewrites, to find the one that breaks something.

    For "mla" and "gateswa" a layer is one. The environment variable ATTNEDIT_FUEL unless given, else no limit."""
    dump_graphs: Annotated[str | PathLike[str] | None, Flag(Path)] = None
    """Directory for graphs before and after, as text and SVG."""
    capture_cache: Switch = True
    """Keep what was traced of attention modules, here and on disk, and take what was kept before.

    Traces hold no weights, and are found by the code that they are of, the model's configuration, and versions. They
    are in ``~/.cache/attnedit/captures`` (`ATTNEDIT_CACHE`)."""
    overwrite: Switch = False
    """Replace what the output directory holds."""

    @model_validator(mode="after")
    def _agree(self) -> Self:
        """Refuse what contradicts itself, whatever the model."""
        reads = frozenset().union(*(target.reads for target in self.targets))
        for name, known_readers in READERS.items():
            if name not in reads and getattr(self, name) != type(self).model_fields[name].default:
                *most, last = known_readers or ["of rewrites"]
                listed = f"{', '.join(most)} and {last}" if most else last
                raise UsageError(f"{name} is for the targets {listed}, not for {self.target_name}")
        if self.leaves and self.kv_budget is not None and self.full_layers is not None:
            raise UsageError("kv_budget and full_layers both say how many layers stay full; give one of them")
        if self.allocation == "loss" and (self.profile or self.engine or self.kernel_dims):
            raise UsageError(
                "a profile's class has one size for all layers; leave allocation out, or profile and engine"
            )
        _ = self.form, FitOptions.of(self.alternations), self.configured
        return self

    @property
    def target_name(self) -> str:
        """As reports and recipes have it."""
        return self.target if isinstance(self.target, str) else self.target.name

    @cached_property
    def targets(self) -> tuple[Target, ...]:
        """What becomes of attention: targets that plan over all sites under one budget, in order, or one of rewrites.

        Raises:
            UsageError: there is no such target.
        """
        return targets_named(self.target) if isinstance(self.target, str) else (self.target,)

    @property
    def rewrites(self) -> tuple[Rewrite, ...]:
        """What the target is made of; none where it has a budget."""
        return () if self.planned else self.targets[0].rewrites

    @cached_property
    def configured(self) -> tuple[AnyTarget, ...]:
        """Those that have a budget, each set to these options."""
        return tuple(one.configured(self) for one in self.targets if isinstance(one, AttentionTarget))

    @property
    def planned(self) -> bool:
        """Whether the target has a budget, and is not made of rewrites."""
        return isinstance(self.targets[0], AttentionTarget)

    @property
    def leaves(self) -> bool:
        """Whether layers stay as they are by choice, in the result too."""
        return self.targets[-1].leaves

    def asked(self, name: str, default: object) -> Any:
        """A field; where it is None what the profile or engine asks for in its place, or else a default."""
        forced = {} if self.form is None else self.form.asks
        forced |= {} if self.engine is None else {"sinks": "none"}
        found = getattr(self, name)
        return forced.get(name, default) if found is None else found

    @cached_property
    def form(self) -> Form | None:
        """The form that a profile asks for, or None."""
        kinds = [one.kind for one in self.targets if isinstance(one, AttentionTarget)]
        asked = (self.kv_budget, self.gate, self.sinks, self.engine)
        return form_for(self.profile, self.kernel_dims, self.target_name, kinds, *asked) if kinds else None

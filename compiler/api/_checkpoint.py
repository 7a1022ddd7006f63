"""`attnedit.compile_checkpoint`: the pipeline of `attnedit.compile` on a checkpoint too large to load, part by part."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Unpack, cast, get_type_hints

import torch
from safetensors import safe_open
from transformers import GenerationConfig, PreTrainedModel

from attnedit._pipeline import outcome, stages_of
from attnedit._stages import Job, Source, run
from attnedit.arguments import CheckpointArguments, shown
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.torch_names import own_buffers
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.checkpoint_reader import CheckpointReader, checkpoint_directory, weight_files
from attnedit.compiler.model_io.demo_model import SMOLLM2
from attnedit.compiler.model_io.devices import parse_dtype, resolve_device
from attnedit.compiler.model_io.heads import check_text_alone
from attnedit.compiler.model_io.models import load_config_only, load_processor, load_tokenizer
from attnedit.compiler.model_io.remote_code import copy_code
from attnedit.compiler.processes import processes
from attnedit.compiler.reporting.records import PipelineStage
from attnedit.compiler.reporting.report import Report
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.layerwise import STATE_DIRECTORY, LayerwiseRewrite
from attnedit.options import TARGETS, CompileOptions
from attnedit.planning import Plan, check_head
from attnedit.recipe import Recipe, with_recipe
from attnedit.result import with_license
from attnedit.run_directory import check_run, open_run
from attnedit.targets.attention.kinds import kind_of
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE, read_back, write_beside
from attnedit.targets.runtime.eager.classes import source_classes
from attnedit.targets.runtime.eager.shards import write_index


@shown(CheckpointArguments, dtype="auto")
def compile_checkpoint(
    model: str | PathLike[str],
    directory: str | PathLike[str],
    target: str = "mla",
    **options: Unpack[CheckpointArguments],
) -> Report:
    """Rewrite a checkpoint of safetensors into a directory, with one decoder layer in memory at a time.

    The result is what `attnedit.compile` gives for the loaded model, to rounding; `attnedit.load` and
    ``AutoModelForCausalLM.from_pretrained`` read it. Beside one layer, memory is needed for its calibration tensors and
    least squares, for the hidden states of the calibration windows, and for the embeddings.

    Killed, the same call goes on after the last layer that is written and ends with the same weights.

    Args:
        model: directory of the checkpoint, or a name on the hub, which is fetched.
        directory: where the result goes; missing, empty, or with the unfinished run of the same arguments.
        target: as for `attnedit.compile`, but one of our own.
        **options: the fields of `attnedit.options.CompileOptions` that do not need the whole model in memory. Full
            layers are named, and calibration data is given: to choose or sample takes passes through the whole model.
            The tokenizer and dtype are the checkpoint's own unless given. `verify` reads the result layer by layer:
            decoding from the cache against prefill, and where nothing was to be lost the logits against the source's.

    Returns:
        The report, which is in the directory too.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract; the directory is left unfinished.
        AttneditError: what was written does not load; the directory is left unfinished.

    Example:
        >>> attnedit.compile_checkpoint(  # doctest: +SKIP
        ...     "Qwen/Qwen3-8B", "qwen3-8b-mla", kv_budget=0.5, calibration="notes.txt", dtype="auto"
        ... )
    """
    given: dict[str, Any] = {"dtype": "auto", **options}
    return compile_in_parts(fspath(model), directory, CompileOptions.of(target=target, **given))


_NO_SAMPLES = "own samples take passes through the whole model, which is read layer by layer; give text"
_EVEN_NOTE = (
    "all latent layers cache the same: so small a cache is better shared by what each layer costs, which takes the "
    "whole model in memory"
)


def compile_in_parts(model: str, directory: str | PathLike[str], options: CompileOptions) -> Report:
    """`compile_checkpoint` with options that are checked."""
    for field, facts in CompileOptions.model_fields.items():
        if field not in {"target", *get_type_hints(CheckpointArguments)} and getattr(options, field) != facts.default:
            raise UsageError(f"{field} needs the whole model in memory; leave it out, or compile without low memory")
    if options.allocation == "loss":
        raise UsageError("allocation loss needs the whole model in memory; leave it out, or compile without low memory")
    if not options.planned:
        raise UsageError(
            f"layer by layer there is only {', '.join(TARGETS)} and other targets with a budget, not "
            f"{options.target_name!r}"
        )
    if processes().count > 1:
        raise UsageError("layer by layer works in one process; start one")
    if options.calibration is None and options.kv_budget != 1:
        raise UsageError(_NO_SAMPLES)
    recipe = {"command": "compile --low-memory", **Recipe.from_options(options, model=model).model_dump(mode="json")}
    output = Path(directory).expanduser().resolve()
    job = Job(options, lambda asked: CheckpointSource(model, output, asked, recipe))
    run(stages_of(options, parts=True), job)
    done = outcome(job)
    return _finish(done.model, output, with_recipe(done.report, options, model), job.options)


class CheckpointSource(Source):
    """A checkpoint on meta, rewritten and written layer by layer; see `attnedit._stages.Source`."""

    few_passes = True

    def __init__(self, model: str, output: Path, options: CompileOptions, recipe: Mapping[str, Any]) -> None:
        self.output, self._recipe = output, recipe
        self.device: torch.device = resolve_device(options.device)
        check_run(output, recipe, overwrite=options.overwrite)
        self.model, self._reader = _open(model, options, self.device)
        check_head(self.model, options)
        self.result, self.name = self.model, str(self.model.config.name_or_path)
        if options.profile or options.engine:
            check_text_alone(self.model.config, self.name, "a profile or an engine")
        reading: dict[str, Any] = {"revision": options.revision, "trust_remote_code": options.trust_remote_code}
        tokenizer = options.tokenizer or load_tokenizer(self.model, **reading)
        processor = options.processor or load_processor(self.model, **reading)
        self.options = options.model_copy(update={"tokenizer": tokenizer, "processor": processor})
        self._layers = ""

    def capture(self) -> list[AttentionSite]:
        """Its attention sites."""
        return _capture(self.model, self.name)

    def ready(self, plan: Plan) -> None:
        """Refuse what takes passes through the whole model."""
        if self.device.type != "cpu":
            _place_buffers(self.model, self.device)
        if any(isinstance(claim.leave, int) and claim.leave for _, claim in plan.claims()):
            raise UsageError(
                "choosing the full layers by measured loss takes passes through the whole model, which is read layer "
                "by layer here; name them: full_layers 'every:4', or indices"
            )
        if self.options.calibration is None and plan.needs_data:
            raise UsageError(_NO_SAMPLES)

    def reading(self, result: PreTrainedModel | None = None) -> AbstractContextManager[None]:
        """Each part is read as its forward begins, of the checkpoint or of what was written."""
        reader, layers = self._reader, (result or self.model).get_submodule(self._layers)
        if result is not None:
            reader = CheckpointReader(self.output, result, device=self.device, name=str(self.output))
        return reader.streaming(cast("torch.nn.ModuleList", layers))

    def fit(self, job: Job, target: Target | None, entry: PipelineStage) -> None:
        """All layers in one walk, each written before the next is read."""
        options, fitted, claims = self.options, job.fitted, job.plan.claims()
        for one, claim in claims:
            sites = [site for site in job.plan.chosen if site.name in claim.shapes]
            fitted.notes += [_EVEN_NOTE] * one.by_loss(claim, sites)
            if job.windows is not None:
                one.check_data(job.windows)
            if one.leaves:
                fitted.full = claim.leave if isinstance(claim.leave, list) else []
        fitted.notes.append("read, rewritten and written layer by layer")
        open_run(self.output, self._recipe, overwrite=options.overwrite)
        given = job.windows, options.seed, self.output
        work = LayerwiseRewrite(self.model, self._reader, job.sites, claims, *given)
        written = work.run(options.progress)
        write_index(self.output, work.shards)
        entry.did = f"{len(work.shards)} parts read, {len(written.configs)} layers rewritten, all written"
        entry.seconds = written.seconds  # with those of runs that were killed
        self._layers, self._written = work.layers, written.configs
        fitted.matched = {one.name: [name for name in claim.shapes if name in written.configs] for one, claim in claims}
        fitted.spent, fitted.contracts = written.rule_seconds, written.contracts
        fitted.energy_kept, fitted.output_error = written.energy_kept, written.output_error

    def lower(self, job: Job) -> None:
        """Graphs on meta of what is written."""
        named = {site.name: site for site in job.sites}
        for name, config in self._written.items():
            job.fitted.graphs[name] = kind_of(config).graph(self.model, named[name], config)


def _open(model: str, options: CompileOptions, device: torch.device) -> tuple[PreTrainedModel, CheckpointReader]:
    """The model on meta, in the dtype asked for, and its checkpoint."""
    dtype, revision = parse_dtype(options.dtype), options.revision
    if model == SMOLLM2 or Path(model).expanduser().is_file():
        raise UsageError(f"{model} is no checkpoint of safetensors, which alone can be read layer by layer")
    trusted = options.trust_remote_code
    reading: dict[str, Any] = {"revision": revision, "dequantize": False, "trust_remote_code": trusted}
    source = load_config_only(model, dtype=dtype, **reading)
    directory = checkpoint_directory(model, revision)
    if dtype == "auto" and source.config.dtype is None:
        files = weight_files(directory, model)
        source = load_config_only(model, dtype=_stored_dtype(files), **reading)
    if (directory / "generation_config.json").is_file():
        source.generation_config = GenerationConfig.from_pretrained(directory)
    return source, CheckpointReader(directory, source, device=device, name=model)


def _stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """Of the first floating-point tensor."""
    for key, file in files.items():
        with safe_open(file, framework="pt") as content:
            found: torch.dtype = content.get_slice(key)[:0].dtype
        if found.is_floating_point:
            return found
    return torch.float32


def _capture(source: PreTrainedModel, name: str) -> list[AttentionSite]:
    try:
        return capture(source)
    except RuntimeError as error:  # some linear-attention layers read numbers off tensors
        raise UsageError(
            f"{name} cannot be traced without its weights ({error}); compile it as a whole, without low memory"
        ) from error


def _place_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Move what no checkpoint holds; captured models have it on the CPU."""
    for module in model.modules():
        for name, buffer in own_buffers(module).items():
            if buffer is not None and not buffer.is_meta:
                own_buffers(module)[name] = buffer.to(device)


def _finish(result: PreTrainedModel, output: Path, report: Report, options: CompileOptions) -> Report:
    """Write all that is no weight; the directory is a result as soon as it is no run any more."""
    report, texts = with_license(report)
    config: Any = result.config
    config.dtype = str(result.dtype).removeprefix("torch.")
    config.architectures = [type(result).__name__]
    config.save_pretrained(output)
    copy_code(source_classes(result), output)
    if result.can_generate() and result.generation_config is not None:
        result.generation_config.save_pretrained(output)
    write_beside(output, options.tokenizer, report.to_json(), dict(texts), options.processor)
    read_back(result, output, f"what was written to {output} does not load, so the run is left unfinished")
    (output / RUN_FILE).unlink()
    shutil.rmtree(output / STATE_DIRECTORY, ignore_errors=True)
    return report

"""`attnedit.compile`: the pipeline from a live model to a rewritten, verified one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Unpack

from torch import Tensor
from transformers import PreTrainedModel

from attnedit._calibrate import START_DIRECTORY, check_training, train
from attnedit._pipeline import Source, on_device, run, with_recipe
from attnedit._rewrite import RewriteSource
from attnedit._stages import Log
from attnedit.arguments import CompileArguments, check_known, shown
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.devices import device_failures
from attnedit.compiler.model_io.heads import check_text_alone
from attnedit.compiler.model_io.live_checks import check_in_memory, check_live
from attnedit.compiler.model_io.remote_code import is_own_class
from attnedit.compiler.model_io.source_checks import check_config, check_weights, model_name
from attnedit.compiler.processes import processes
from attnedit.compiler.rewriting.dumps import Dump
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.options import CompileOptions
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.layers import Layers, fit_layers, single_losses
from attnedit.planning import Plan, check_fresh, check_head
from attnedit.result import CompileResult, load
from attnedit.rows import Fitted
from attnedit.targets.attention.kinds import config_of, kind_of
from attnedit.targets.runtime.eager import share_copy

FITS_DIRECTORY = "fits"
"""In a run directory: closed-form fits."""


@shown(CompileArguments)
def compile(model: PreTrainedModel, target: str | Target = "mla", **options: Unpack[CompileArguments]) -> CompileResult:
    """Rewrite the attention of a trained model so that it caches less: in closed form, then trained if asked for.

    The model is captured as graphs, each attention is replaced and fitted on calibration text, and the result is run to
    check that it keeps what was promised. With `fit_steps` or `distill_steps` it is then trained against its source.

    Args:
        model: a transformers causal language model; not changed unless `in_place`.
        target: what attention becomes: "mla", latent attention; "gateswa", a sliding window in most layers; or
            "gateswa+mla", where the layers without window become latent. Or a `Target`, or names that other packages
            register, which go through `attnedit.rewrite`.
        **options: the fields of `attnedit.options.CompileOptions`, but for those of reading a checkpoint.

    Returns:
        The rewritten model, which shares with its source the tensors that were not edited, and the report.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        RewriteError: a rewrite of a `Target` is written wrongly; addressed to its author.
        VerificationError: the result broke its contract.
        DivergedError: training broke down; its best state is in the run directory, where one is given.
        AttneditError: the device ran out of memory or failed, or the run directory cannot be written. The three before
            are AttneditErrors too.

    Example:
        >>> result = attnedit.compile(model, "mla", kv_budget=0.25, calibration="notes.txt")  # doctest: +SKIP
        >>> result.model.generate(**prompt, max_new_tokens=20)  # doctest: +SKIP
    """
    check_known({**options}, CompileArguments, "is for reading a checkpoint, and the model is live; leave it out")
    return compile_live(model, CompileOptions.of(target=target, **options))


def compile_live(model: PreTrainedModel, options: CompileOptions, name: str | None = None) -> CompileResult:
    """`compile` with options that are checked; the recipe names the model so."""
    directory = options.run_directory
    kept = None if directory is None else KeptFits(Path(directory).expanduser() / FITS_DIRECTORY)
    if not options.steps:
        return _asked(_one_shot(model, options, kept), options, name)
    model_name(model)  # refuses what is no model
    check_head(model, options)
    if options.in_place:
        raise UsageError("in_place leaves no source to learn from; leave it out, or train no steps")
    model = on_device(model, options)
    check_training(options, model)
    if directory is None:
        if processes().count > 1:
            raise UsageError("several processes meet in a directory; give run_directory")
        result = _one_shot(model, options)
    else:
        start = Path(directory) / START_DIRECTORY
        with processes().main_first():  # whose result the others read
            if not start.is_dir():
                _one_shot(model, options, kept).save(start)
        result = load(start, trust_remote_code=is_own_class(type(model)))
        result.tokenizer, result.processor = options.tokenizer, options.processor
    return _asked(train(result, model, options), options, name)


@device_failures(
    "compile",
    "load it in bfloat16, give fewer calibration_tokens, or go layer by layer (--low-memory, compile_checkpoint)",
)
def _one_shot(model: PreTrainedModel, options: CompileOptions, kept: KeptFits | None = None) -> CompileResult:
    """`compile_live` without training."""
    source: Source = LiveSource(model, options, kept) if options.planned else RewriteSource(model, options)
    result, report = run(source, options)
    return CompileResult(result, report, options.tokenizer, processor=options.processor)


class LiveSource(Source):
    """A live model, rewritten in memory; see `attnedit._pipeline.Source`."""

    def __init__(self, model: PreTrainedModel, options: CompileOptions, kept: KeptFits | None) -> None:
        self._limit, self._dump = Fuel(options.fuel), Dump(options.dump_graphs)
        self._options, self._kept = options, kept
        self.name = model_name(model)
        check_fresh(model, self.name)
        check_live(model, self.name)
        check_config(model.config, self.name, trust_remote_code=True)  # what is live has run already
        check_head(model, options)
        check_in_memory(model, self.name)
        if options.profile or options.engine:
            check_text_alone(model.config, self.name, "a profile or an engine")
        check_weights(model, self.name)
        self.model = self.result = on_device(model, options)

    def capture(self) -> list[AttentionSite]:
        """Its attention sites."""
        return capture(self.model)

    def ready(self, plan: Plan) -> None:
        """Make the model that becomes the result."""
        self.result = self.model if self._options.in_place else share_copy(self.model)

    def fit(self, plan: Plan, windows: list[Tensor] | None, log: Log) -> Fitted:
        """Target by target, each on what those before it left."""
        options, left, notes, losses = self._options, plan.chosen, list[str](), dict[str, float]()
        done, changed, spent, full = dict[str, Layers](), dict[int, float](), dict[str, float](), None
        given: dict[str, Any] = {"seed": options.seed, "progress": options.progress}
        for target in plan.targets:
            if not left:
                break
            question, work = plan.question(target, left, changed), (target, self.model, self.result, left)
            claim = target.plan(question)
            if target.allocation != "even" and "allocation" in target.reads:
                with log("allocation") as entry:
                    entry.did = "shares are even, nothing was measured"
                    if windows is not None and target.by_loss(claim, left):
                        alone = single_losses(*work, claim, windows, **given)
                        entry.did = f"{len(alone)} layers measured"
                        claim, losses = target.plan(dataclasses.replace(question, losses=alone)), {**losses, **alone}
                        notes.append(_SHARES_NOTE)
            with log(target.stage) as entry:
                layers = done[target.name] = fit_layers(*work, claim, windows, kept=self._kept, **given)
                entry.did = f"{len(layers.fits)} layers became {target.kind.title}"
                entry.did += f", {len(layers.left)} stay as they are" if target.leaves else ""
            losses |= layers.loss_increases
            notes += [_choice_note(layers.left)] if layers.loss_increases else []
            notes += target.fitted_notes(layers.fits)
            spent[target.name] = entry.seconds
            full = layers.left if target.leaves else full
            changed |= {site.layer_idx: claim.shapes[site.name].values for site in left if site.name in layers.fits}
            left = [site for site in left if site.name not in layers.fits]
        fits = {name: fit for layers in done.values() for name, fit in layers.fits.items()}
        graphs = {name: fit.graph for name, fit in fits.items()}
        graphs = self._limit.limit(graphs, [site.name for site in plan.chosen])
        for site in (site for site in plan.chosen if site.name in graphs):
            kind = kind_of(config_of(graphs[site.name])).name
            self._dump(kind, site.name, graph_module(self.model, site), graphs[site.name])
        return Fitted(
            graphs,
            matched={name: layers.fits for name, layers in done.items()},
            spent=spent,
            contracts={name: fit.contract.kind for name, fit in fits.items()},
            energy_kept={name: fit.energy_kept for name, fit in fits.items() if fit.energy_kept is not None},
            output_error={name: fit.output_error for name, fit in fits.items() if fit.output_error is not None},
            loss_increase=losses,
            full=full,
            notes=[*notes, *self._limit.note()],
        )


def _asked(result: CompileResult, options: CompileOptions, name: str | None) -> CompileResult:
    return dataclasses.replace(result, report=with_recipe(result.report, options, name))


_SHARES_NOTE = "latent layers share the cache by what each costs alone; allocation='even' gives all the same"


def _choice_note(full: list[int]) -> str:
    listed = ",".join(map(str, full)) + ("," if len(full) == 1 else "")
    return f"full layers chosen by measured loss; full_layers={listed!r} takes them again without measuring"

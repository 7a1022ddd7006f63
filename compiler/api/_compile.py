"""`attnedit.compile`: the pipeline from a live model to a rewritten, verified one."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any, Unpack

from transformers import PreTrainedModel

from attnedit._calibrate import START_DIRECTORY, check_length, train
from attnedit._rewrite import rewrite_live
from attnedit.arguments import CompileArguments, check_known, shown
from attnedit.compiler.capture import as_captured, capture, graph_module
from attnedit.compiler.devices import device_failures, resolve_device
from attnedit.compiler.dumps import Dump
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluate import kv_usage
from attnedit.compiler.fuel import Fuel
from attnedit.compiler.lengths import record_lengths
from attnedit.compiler.live_checks import check_in_memory, check_live
from attnedit.compiler.pipeline import Target
from attnedit.compiler.positions import loss_curve
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import stage
from attnedit.compiler.remote_code import is_own_class
from attnedit.compiler.report import Verification, timed
from attnedit.compiler.source_checks import check_config, check_weights, model_name
from attnedit.compiler.verify import check_tokens, decode_error, decode_note, logits_of, same_decode, same_logits
from attnedit.figures import linear_notes, site_graphs
from attnedit.options import CompileOptions
from attnedit.passes.effort import effort_on
from attnedit.passes.gateswa.rewrite import Windowed, window_layers
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.mla.budget import by_loss
from attnedit.passes.mla.rewrite import Latent, latent_layers, single_losses
from attnedit.planning import calibration_windows, check_fresh, plan_sites
from attnedit.recipe import Recipe
from attnedit.result import CompileResult, load
from attnedit.rows import compile_report
from attnedit.targets.attention.kinds import config_of, kind_of
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit, use_captured_implementation
from attnedit.targets.runtime.hf.towards import check_form

FITS_DIRECTORY = "fits"
"""In a run directory: closed-form fits."""


@shown(CompileArguments)
def compile(model: PreTrainedModel, target: str | Target = "mla", **options: Unpack[CompileArguments]) -> CompileResult:
    """Rewrite the attention of a trained model so that it caches less: in closed form, then trained if asked for.

    Args:
        model: a transformers causal language model; not changed unless `in_place`.
        target: what attention becomes: "mla"; "gateswa", a sliding window in most layers; or "gateswa+mla", where the
            layers without window become latent. Or a `Target`, or names that other packages register, which go through
            `attnedit.rewrite`.
        **options: the fields of `attnedit.options.CompileOptions`, but for those of reading a checkpoint.

    Returns:
        The rewritten model and its report.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract.
        DivergedError: training broke down; its best state is in the run directory.
    """
    check_known({**options}, CompileArguments, "is for reading a checkpoint, and the model is live; leave it out")
    return compile_live(model, CompileOptions.of(target=target, **options))


def compile_live(model: PreTrainedModel, options: CompileOptions, name: str | None = None) -> CompileResult:
    """`compile` with options that are checked; the recipe names the model so."""
    directory = options.run_directory
    kept = None if directory is None else KeptFits(Path(directory).expanduser() / FITS_DIRECTORY)
    if not options.steps:
        return _with_recipe(_one_shot(model, options, kept), options, name)
    model_name(model)  # refuses what is no model
    check_length(options, model)
    if options.in_place:
        raise UsageError("in_place leaves no source to learn from; leave it out, or train no steps")
    if options.device is not None:
        model = share_copy(model).to(resolve_device(options.device))  # type: ignore[arg-type]  # transformers wraps it
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
        result.tokenizer = options.tokenizer
    return _with_recipe(train(result, model, options), options, name)


def _with_recipe(result: CompileResult, options: CompileOptions, name: str | None) -> CompileResult:
    """Put into the report what was asked for."""
    recipe = Recipe.from_options(options, result.report.full_layers, result.report.calibration_length, name)
    report = result.report.model_copy(update={"recipe": recipe.model_dump(exclude_defaults=True)})
    return dataclasses.replace(result, report=report)


@device_failures(
    "compile",
    "load it in bfloat16, give fewer calibration_tokens, or go layer by layer (--low-memory, compile_checkpoint)",
)
def _one_shot(model: PreTrainedModel, options: CompileOptions, kept: KeptFits | None = None) -> CompileResult:
    """`compile_live` without training."""
    if not options.ours:
        return rewrite_live(model, options)
    limit, dump, progress = Fuel(options.fuel), Dump(options.dump_graphs), options.progress
    windowing, form, in_place, verify = options.windowing, options.form, options.in_place, options.verify
    name = model_name(model)
    check_fresh(model, name)
    check_live(model, name)
    check_config(model.config, name, trust_remote_code=True)  # what is live has run already
    check_in_memory(model, name)
    check_weights(model, name)
    if options.device is not None:
        moved = model if in_place else share_copy(model)
        model = moved.to(resolve_device(options.device))  # type: ignore[arg-type]  # transformers wraps it
    seconds: dict[str, float] = {}
    modes = {part: module.training for part, module in model.named_modules()}
    model.eval()
    implementation = contextlib.ExitStack()
    try:
        with timed(seconds, "capture"), stage("capture", progress):
            sites = capture(model)
            implementation.enter_context(as_captured(model, sites))
            plan = plan_sites(model, sites, kv_usage(model), options)
            # Which layers are latent need not be known yet to refuse a budget that cannot be met.
            shapes = plan.shapes(plan.latent_sites())
        exact = windowing is None and all(shape.exact for shape in shapes.values())
        data = windows = None
        if not exact:
            with timed(seconds, "data"):
                data = calibration_windows(model, options, options.tokenizer)
            windows = data.parts
            plan.notes.extend(data.notes)
        result = model if in_place else share_copy(model)
        work: dict[str, Any] = {"seed": options.seed, "progress": progress}
        windowed = Windowed({}, {}, [])
        if windowing is not None:
            assert windows is not None
            with timed(seconds, "windows"):
                windowed = window_layers(model, result, plan.chosen, windowing, plan.full, windows, kept=kept, **work)
            if windowed.loss_increases:
                plan.notes.append(_choice_note(windowed.full))
        latent, losses = Latent({}, {}), dict(windowed.loss_increases)
        if plan.latent:
            latent_sites = plan.latent_sites(list(windowed.graphs))
            if latent_sites:
                shapes = plan.shapes(latent_sites)
                by_cost = plan.form is None and by_loss(options.allocation, options.alternations, shapes, latent_sites)
                if by_cost and windows is not None:
                    with timed(seconds, "allocation"):
                        alone = single_losses(model, result, latent_sites, shapes, windows, **work)
                    shapes, losses = plan.shapes(latent_sites, alone), {**losses, **alone}
                    plan.notes.append(_SHARES_NOTE)
                with timed(seconds, "fit"):
                    form_of_work: dict[str, Any] = {"linear": plan.linear, "kept": kept, **work}
                    latent = latent_layers(model, result, latent_sites, shapes, options.fit, windows, **form_of_work)
        made = {**windowed.graphs, **latent.graphs}
        graphs = limit.limit(made, [site.name for site in plan.chosen])
        for site in (site for site in plan.chosen if site.name in graphs):
            dump(kind_of(config_of(graphs[site.name])).name, site.name, graph_module(model, site), graphs[site.name])
        configs = {site.name: config_of(graphs[site.name]) for site in plan.chosen if site.name in graphs}
        ids = check_tokens(windows, model, 0 if windowing is None else windowing.cached_tokens)
        expected = logits_of(model, ids) if verify and exact else None
        own_error = decode_error(model, ids, len(sites)) if verify else 0.0
        drawn = site_graphs(model, plan, graphs, configs)
        splice(result, graphs)
        result = to_attnedit(result, configs)
        record_lengths(result, calibration=None if data is None else data.length)
        if form is not None:
            check_form(result, form)
        checks: list[Verification] = []
        losses_far = None
        if verify:
            with timed(seconds, "verify"), stage("verify", progress):
                if expected is not None:
                    checks.append(same_logits(expected, result, ids))
                checks.append(same_decode(result, ids, own=own_error))
                if windows is not None and options.alternations > 1 and not in_place:
                    long = windows[0][: effort_on(model).measured_long]
                    losses_far = loss_curve(
                        model, result, long, "calibration windows, on which it was fitted", progress
                    )
    finally:
        implementation.close()
        _set_modes(model, modes)
    use_captured_implementation(result, sites)
    _set_modes(result, modes)
    report = compile_report(
        result,
        plan,
        configs,
        matched={"gateswa": windowed.graphs, "mla": latent.graphs},
        spent={"gateswa": seconds.get("windows", 0.0), "mla": seconds.get("fit", 0.0)},
        exact=exact,
        energy_kept={name: fit.energy_kept for name, fit in latent.fits.items()},
        output_error={name: fit.output_error for fits in (windowed.fits, latent.fits) for name, fit in fits.items()},
        loss_increase=losses,
        calibration=options.calibration,
        windows=data,
        source=name,
        target=options.target_name,
        verification=checks,
        kv_budget_asked=plan.budget_asked,
        seconds=seconds,
        full_layers=None if windowing is None else windowed.full,
        notes=[*plan.notes, *linear_notes(latent), *limit.note(), *decode_note(own_error)],
        graphs=drawn,
    )
    return CompileResult(result, report.model_copy(update={"loss_curve": losses_far}), options.tokenizer)


def _set_modes(model: PreTrainedModel, modes: dict[str, bool]) -> None:
    """Training or evaluation as it was for every module; new modules take after what they are in."""
    for name, module in model.named_modules():  # parents come first
        if name in modes:
            module.train(modes[name])


_SHARES_NOTE = "latent layers share the cache by what each costs alone; allocation='even' gives all the same"


def _choice_note(full: list[int]) -> str:
    listed = ",".join(map(str, full)) + ("," if len(full) == 1 else "")
    return f"full layers chosen by measured loss; full_layers={listed!r} takes them again without measuring"

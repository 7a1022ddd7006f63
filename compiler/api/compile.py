"""`attnedit.compile`: the pipeline from a live model to a rewritten, verified one."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.calibrate import START_DIRECTORY, calibrate, check_length
from attnedit.compiler.capture import as_captured, capture, graph_module
from attnedit.compiler.devices import device_failures, resolve_device
from attnedit.compiler.dumps import Dump
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluate import kv_usage
from attnedit.compiler.fuel import Fuel
from attnedit.compiler.lengths import record_lengths
from attnedit.compiler.live_checks import check_in_memory, check_live
from attnedit.compiler.pipeline import Target
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import Progress, stage
from attnedit.compiler.registry import names_of
from attnedit.compiler.remote_code import is_own_class
from attnedit.compiler.report import Verification, timed
from attnedit.compiler.source_checks import check_config, check_weights, model_name
from attnedit.compiler.verify import check_tokens, decode_error, decode_note, logits_of, same_decode, same_logits
from attnedit.figures import linear_notes, site_graphs
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.gateswa.options import FullLayers
from attnedit.passes.gateswa.rewrite import Windowed, window_layers
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.mla.fit import FitOptions
from attnedit.passes.mla.rewrite import Latent, latent_layers, single_losses
from attnedit.planning import (
    DEFAULT_BUDGET,
    TARGETS,
    calibration_windows,
    check_arguments,
    check_fresh,
    check_numbers,
    plan_sites,
)
from attnedit.recipe import Recipe
from attnedit.result import CompileResult, load
from attnedit.rewrite import rewrite
from attnedit.rows import compile_report
from attnedit.targets.attention.kinds import config_of, kind_of
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit, use_captured_implementation
from attnedit.targets.runtime.hf.towards import check_form

FITS_DIRECTORY = "fits"
"""In a run directory: closed-form fits."""


def compile(
    model: PreTrainedModel,
    target: str | Target = "mla",
    *,
    kv_budget: float | None = None,
    window: int | None = None,
    full_layers: FullLayers = None,
    gate: str | None = None,
    sinks: str | None = None,
    profile: str | None = None,
    kernel_dims: bool = False,
    engine: str | None = None,
    allocation: str = "even",
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int | None = None,
    calibration_length: int | None = None,
    alternations: int = FitOptions.alternations,
    seed: int = 0,
    device: str | torch.device | None = None,
    in_place: bool = False,
    verify: bool = True,
    fuel: int | None = None,
    dump_graphs: str | PathLike[str] | None = None,
    run_directory: str | PathLike[str] | None = None,
    progress: Progress | None = None,
    **training: Any,
) -> CompileResult:
    """Rewrite the attention of a trained model so that it caches less: in closed form, then trained if asked for.

    Args:
        model: a transformers causal language model; not changed unless `in_place`.
        target: what attention becomes: "mla"; "gateswa", a sliding window in most layers; or "gateswa+mla", where the
            layers without window become latent. Or a `Target`, or names that other packages register, which go through
            `attnedit.rewrite`.
        kv_budget: cached values per token, averaged over layers at the model's context length, as a fraction of the
            source's. For "mla" 0.5 unless given; at 1.0 the result computes exactly what the source does. For
            "gateswa" it says how many layers stay full, in place of `full_layers`. For "gateswa+mla" it covers both;
            unless given, the layers without window are halved.
        window: GateSWA: tokens each query sees, itself included; 128 unless given.
        full_layers: GateSWA: a number of layers, of which the loss is measured to choose them; "every:N"; or layer
            indices. A quarter unless given.
        gate: GateSWA: output gate per "head", per "element" or "none", the default. It starts without effect.
        sinks: GateSWA: what stands for tokens outside the window: "none", or "logit", "value" (a value for the
            logit) and "keep:N" (the first tokens stay visible) with commas between; "keep:4" unless given.
        profile: of a checkpoint that the result is to become (docs/export-hf.md): what its class lacks is left out
            from the start, so that export changes nothing. For "mla" norms and biases become linear maps.
        kernel_dims: with profile "deepseek_v3" or "youtu": the sizes of engines' kernels, in place of `kv_budget`.
        engine: what will serve the result: "vllm", "sglang" or "llama.cpp" (docs/engines). It implies profile and
            sizes, and refuses arguments that contradict it.
        allocation: of the latent layers' cache: "even", or "loss": more for the layers that cost more when they alone
            are latent, which is measured first (gains: docs/benchmarks.md). A native checkpoint, whose layers have all
            one size, is then as large as the largest.
        calibration: a path (txt, jsonl, parquet), a `datasets` name, a mapping from such to weights, an iterable of
            strings or token tensors, or None for the model's own samples.
        tokenizer: for calibration text; saved with the result.
        calibration_tokens: how many to use: of given data 16 windows of `calibration_length` and 32 of 1,024 (65,536
            tokens where the context is no longer than that), and 8,192 of own samples, unless told.
        calibration_length: of the longest windows of the closed form, in tokens: at most the model's context, and as
            long as what is to be served. The context unless told, up to 32,768 on an accelerator and 8,192 elsewhere.
        alternations: rounds of least squares per layer after the analytic start. 0 and 1 are quick jobs on few
            sampled queries; 2 is nearly converged.
        seed: of sampled text and sampled queries.
        device: where to work; where the model is unless told.
        in_place: rewrite `model` itself instead of a copy that shares its tensors.
        verify: hold the result to its contract on real numbers.
        fuel: rewrite so many layers at most, to find the one that breaks something by bisecting; the environment
            variable ATTNEDIT_FUEL unless given, else all.
        dump_graphs: a directory for the graphs before and after, as text and SVG.
        run_directory: where fits are kept, and training keeps its checkpoints and log. The same call with the same
            directory goes on where an earlier one stopped.
        progress: see `attnedit.compiler.progress`.
        **training: `fit_steps`, `distill_steps` (both 0: no training) and the other fields of
            `attnedit.passes.calibration.options.CalibrationOptions`.

    Returns:
        The rewritten model and its report.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract.
        DivergedError: training broke down; its best state is in the run directory.
    """
    custom = target if isinstance(target, Target) else None
    target = target.name if isinstance(target, Target) else target
    arguments: dict[str, Any] = {
        "target": target,
        "kv_budget": kv_budget,
        "window": window,
        "full_layers": full_layers,
        "gate": gate,
        "sinks": sinks,
        "profile": profile,
        "kernel_dims": kernel_dims,
        "engine": engine,
        "allocation": allocation,
        "calibration": calibration,
        "tokenizer": tokenizer,
        "calibration_tokens": calibration_tokens,
        "calibration_length": calibration_length,
        "alternations": alternations,
        "seed": seed,
        "device": device,
        "in_place": in_place,
        "verify": verify,
        "progress": progress,
        "custom": custom,
        "fuel": fuel,
        "dump_graphs": dump_graphs,
    }
    check_numbers(arguments)
    shared = {name: arguments[name] for name in inspect.signature(check_arguments).parameters if name != "target"}
    check_arguments(custom or target, **shared)
    options = CalibrationOptions.of(**training)
    kept = None if run_directory is None else KeptFits(Path(run_directory).expanduser() / FITS_DIRECTORY)
    if not options.steps:
        return _with_recipe(_one_shot(model, **arguments, kept=kept), arguments, training)
    model_name(model)  # refuses what is no model
    check_length(options, model)
    if in_place:
        raise UsageError("in_place leaves no source to learn from; leave it out, or train no steps")
    if device is not None:
        model = share_copy(model).to(resolve_device(device))  # type: ignore[arg-type]  # transformers wraps it
    if run_directory is None:
        if processes().count > 1:
            raise UsageError("several processes meet in a directory; give run_directory")
        result = _one_shot(model, **arguments)
    else:
        start = Path(run_directory) / START_DIRECTORY
        with processes().main_first():  # whose result the others read
            if not start.is_dir():
                _one_shot(model, **arguments, kept=kept).save(start)
        result = load(start, trust_remote_code=is_own_class(type(model)))
        result.tokenizer = tokenizer
    result = calibrate(
        result,
        model,
        calibration=calibration,
        tokenizer=tokenizer,
        seed=seed,
        verify=verify,
        run_directory=run_directory,
        progress=progress,
        **training,
    )
    return _with_recipe(result, arguments, training)


def _with_recipe(result: CompileResult, arguments: Mapping[str, Any], training: Mapping[str, Any]) -> CompileResult:
    """Put into the report what was asked for."""
    asked = {**arguments, "calibration_length": result.report.calibration_length}
    recipe = Recipe.of(asked, result.report.full_layers, training)
    report = result.report.model_copy(update={"recipe": recipe.model_dump(exclude_defaults=True)})
    return dataclasses.replace(result, report=report)


@device_failures(
    "compile",
    "load it in bfloat16, give fewer calibration_tokens, or go layer by layer (--low-memory, compile_checkpoint)",
)
def _one_shot(
    model: PreTrainedModel,
    target: str,
    *,
    kv_budget: float | None,
    window: int | None,
    full_layers: FullLayers,
    gate: str | None,
    sinks: str | None,
    profile: str | None,
    kernel_dims: bool,
    engine: str | None,
    allocation: str,
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration_tokens: int | None,
    calibration_length: int | None,
    alternations: int,
    seed: int,
    device: str | torch.device | None,
    in_place: bool,
    verify: bool,
    progress: Progress | None,
    custom: Target | None,
    fuel: int | None,
    dump_graphs: str | PathLike[str] | None,
    kept: KeptFits | None = None,
) -> CompileResult:
    """`compile` without training."""
    if custom is not None or names_of(target, TARGETS):
        own = {"calibration": calibration, "tokenizer": tokenizer, "calibration_tokens": calibration_tokens}
        own |= {"seed": seed, "device": device, "in_place": in_place, "verify": verify, "progress": progress}
        return rewrite(model, custom or target, fuel=fuel, dump_graphs=dump_graphs, **own)
    limit, dump = Fuel(fuel), Dump(dump_graphs)
    windowing, form = check_arguments(
        target, kv_budget, window, full_layers, gate, sinks, profile, kernel_dims, engine=engine
    )
    options = FitOptions.of(alternations)
    name = model_name(model)
    check_fresh(model, name)
    check_live(model, name)
    check_config(model.config, name, trust_remote_code=True)  # what is live has run already
    check_in_memory(model, name)
    check_weights(model, name)
    if device is not None:
        moved = model if in_place else share_copy(model)
        model = moved.to(resolve_device(device))  # type: ignore[arg-type]  # transformers wraps it
    seconds: dict[str, float] = {}
    modes = {part: module.training for part, module in model.named_modules()}
    model.eval()
    implementation = contextlib.ExitStack()
    try:
        with timed(seconds, "capture"), stage("capture", progress):
            sites = capture(model)
            implementation.enter_context(as_captured(model, sites))
            plan = plan_sites(model, sites, kv_usage(model), target, windowing, kv_budget, full_layers, form)
            # Which layers are latent need not be known yet to refuse a budget that cannot be met.
            shapes = plan.shapes(plan.latent_sites())
        exact = windowing is None and all(shape.exact for shape in shapes.values())
        data = windows = None
        if not exact:
            with timed(seconds, "data"):
                asked: dict[str, Any] = {"tokens": calibration_tokens, "length": calibration_length}
                asked |= {"seed": seed, "progress": progress}
                data = calibration_windows(calibration, tokenizer, model, windowing, **asked)
            windows = data.parts
            plan.notes.extend(data.notes)
        result = model if in_place else share_copy(model)
        work: dict[str, Any] = {"seed": seed, "progress": progress}
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
                if allocation == "loss" and windows is not None:
                    with timed(seconds, "allocation"):
                        alone = single_losses(model, result, latent_sites, shapes, windows, **work)
                    shapes, losses = plan.shapes(latent_sites, alone), {**losses, **alone}
                with timed(seconds, "fit"):
                    form_of_work: dict[str, Any] = {"linear": plan.linear, "kept": kept, **work}
                    latent = latent_layers(model, result, latent_sites, shapes, options, windows, **form_of_work)
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
        if verify:
            with timed(seconds, "verify"), stage("verify", progress):
                if expected is not None:
                    checks.append(same_logits(expected, result, ids))
                checks.append(same_decode(result, ids, own=own_error))
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
        calibration=calibration,
        windows=data,
        source=name,
        target=target,
        verification=checks,
        kv_budget_asked=DEFAULT_BUDGET if kv_budget is None and windowing is None and not kernel_dims else kv_budget,
        seconds=seconds,
        full_layers=None if windowing is None else windowed.full,
        notes=[*plan.notes, *linear_notes(latent), *limit.note(), *decode_note(own_error)],
        graphs=drawn,
    )
    return CompileResult(result, report, tokenizer)


def _set_modes(model: PreTrainedModel, modes: dict[str, bool]) -> None:
    """Training or evaluation as it was for every module; new modules take after what they are in."""
    for name, module in model.named_modules():  # parents come first
        if name in modes:
            module.train(modes[name])


def _choice_note(full: list[int]) -> str:
    listed = ",".join(map(str, full)) + ("," if len(full) == 1 else "")
    return f"full layers chosen by measured loss; full_layers={listed!r} takes them again without measuring"

"""`attnedit.compile`: the pipeline from a live model to a rewritten, verified one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.capture import capture
from attnedit.compiler.data import DEFAULT_WINDOW as DEFAULT_LENGTH
from attnedit.compiler.data import context_length, position_limit, token_windows
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.evaluate import KVUsage, kv_usage
from attnedit.compiler.progress import Progress, stage, track
from attnedit.compiler.report import LayerReport, Report, Verification, kv_fields, peak_memory_bytes, timed
from attnedit.compiler.sites import AttentionSite
from attnedit.compiler.source_checks import check_config, check_weights
from attnedit.compiler.stream import AttentionInputs, stream
from attnedit.compiler.verify import check_tokens, logits_of, same_decode, same_logits
from attnedit.passes.gateswa.options import (
    DEFAULT_GATE,
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    FullLayers,
    GateSWAOptions,
    Sinks,
    full_count,
    full_layers_of,
)
from attnedit.passes.gateswa.rewrite import Windowed, window_layers
from attnedit.passes.mla.assemble import build, exact_factors
from attnedit.passes.mla.budget import Shape, plan
from attnedit.passes.mla.fit import Fit, FitOptions, fit_layer
from attnedit.passes.site_sample import output_weight, take_sample
from attnedit.result import CompileResult
from attnedit.targets.attention.config import GateSWAConfig, MLAConfig
from attnedit.targets.attention.cost import gateswa_values
from attnedit.targets.attention.kinds import KINDS, AnyConfig, kind_of
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

TARGETS = ("mla", "gateswa", "gateswa+mla")
DEFAULT_BUDGET = 0.5
"""Of the layers that become latent."""


def compile(
    model: PreTrainedModel,
    target: str = "mla",
    *,
    kv_budget: float | None = None,
    window: int | None = None,
    full_layers: FullLayers = None,
    gate: str | None = None,
    sinks: str | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int | None = None,
    alternations: int = FitOptions.alternations,
    seed: int = 0,
    device: str | torch.device | None = None,
    in_place: bool = False,
    verify: bool = True,
    progress: Progress | None = None,
) -> CompileResult:
    """Rewrite the attention of a trained model so that it caches less, in closed form.

    Args:
        model: a transformers causal language model; not changed unless `in_place`.
        target: what attention becomes: "mla"; "gateswa", a sliding window in most layers; or "gateswa+mla", where the
            layers without window become latent.
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
        calibration: a path (txt, jsonl, parquet), a `datasets` name, an iterable of strings or token tensors, or
            None for the model's own samples.
        tokenizer: for calibration text; saved with the result.
        calibration_tokens: how many to use: 65,536 of given data and 8,192 of own samples unless told.
        alternations: rounds of least squares per layer after the analytic start. 0 and 1 are quick jobs on few
            sampled queries; 2 is nearly converged.
        seed: of sampled text and sampled queries.
        device: where to work; where the model is unless told.
        in_place: rewrite `model` itself instead of a copy that shares its tensors.
        verify: hold the result to its contract on real numbers.
        progress: see `attnedit.compiler.progress`.

    Returns:
        The rewritten model and its report.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract.
    """
    windowing = check_arguments(target, kv_budget, window, full_layers, gate, sinks)
    latent = target.endswith("mla")
    options = FitOptions.of(alternations)
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    if rewritten := getattr(model.config, "attnedit", None):
        raise UsageError(
            f"{name} is rewritten already ({_first(list(rewritten['sites']))}); compile the model that it came from"
        )
    check_config(model.config, name)
    check_weights(model, name)
    if device is not None:
        model = (model if in_place else share_copy(model)).to(device)  # type: ignore[arg-type]  # transformers wraps it
    seconds: dict[str, float] = {}
    modes = {part: module.training for part, module in model.named_modules()}
    model.eval()
    try:
        with timed(seconds, "capture"), stage("capture", progress):
            sites = capture(model)
            chosen, notes = choose_sites(sites)
            before = kv_usage(model)
            by_layer = dict(enumerate(before.per_layer))
            full: int | list[int] = 0
            slides: dict[int, float] = {}
            if windowing is not None:
                slides = _windowed_values(chosen, windowing, before)
                if full_layers is None and kv_budget is not None and not latent:
                    full = full_count(kv_budget, by_layer, slides)
                else:
                    full = full_layers_of(full_layers, chosen)
            shapes: dict[str, Shape] = {}
            if latent:  # which layers are latent need not be known yet to refuse a budget that cannot be met
                kept = _first_full(chosen, full) if windowing is not None else chosen
                shapes = _latent_shapes(sites, by_layer, kept, slides, kv_budget)
        windows = None
        if windowing is not None or not all(shape.exact for shape in shapes.values()):
            with timed(seconds, "data"):
                windows = token_windows(
                    calibration,
                    tokenizer,
                    model,
                    tokens=calibration_tokens,
                    window=None if windowing is None else _window_length(model, windowing),
                    seed=seed,
                    progress=progress,
                )
        result = model if in_place else share_copy(model)
        graphs: dict[str, fx.GraphModule] = {}
        windowed: Windowed | None = None
        fits: dict[str, Fit] = {}
        if windowing is not None:
            assert windows is not None
            with timed(seconds, "windows"):
                windowed = window_layers(model, result, chosen, windowing, full, windows, seed=seed, progress=progress)
            graphs |= windowed.graphs
            if windowed.loss_increases:
                notes.append(_choice_note(windowed.full))
        if latent:
            kept = [site for site in chosen if site.name not in graphs]
            if windowed is not None:
                shapes = _latent_shapes(sites, by_layer, kept, slides, kv_budget)
            with timed(seconds, "fit"):
                latent_graphs, fits = _rewrite(model, result, kept, shapes, windows, options, seed, progress)
            graphs |= latent_graphs
        rewritten = [site for site in chosen if site.name in graphs]
        configs = {site.name: _config_of(graphs[site.name]) for site in rewritten}
        ids = check_tokens(windows, model, 0 if windowing is None else windowing.cached_tokens)
        exact = windowing is None and all(shape.exact for shape in shapes.values())
        expected = logits_of(model, ids) if verify and exact else None
        splice(result, graphs)
        result = to_attnedit(result, configs)
        after = kv_usage(result)
        checks: list[Verification] = []
        if verify:
            with timed(seconds, "verify"), stage("verify", progress):
                if expected is not None:
                    checks.append(same_logits(expected, result, ids))
                checks.append(same_decode(result, ids))
    finally:
        _set_modes(model, modes)
    _set_modes(result, modes)
    report = Report(
        source=name,
        target=target,
        sites_matched=len(sites),
        sites_rewritten=len(rewritten),
        layers=_rows(sites, configs, fits, windowed, before, after),
        verification=checks,
        kv_budget_asked=DEFAULT_BUDGET if kv_budget is None and windowing is None else kv_budget,
        calibration="" if windows is None else calibration_name(calibration),
        calibration_tokens=0 if windows is None else windows.numel(),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        full_layers=None if windowed is None else windowed.full,
        notes=notes,
        **kv_fields(before, after),
    )
    return CompileResult(result, report, tokenizer)


def check_arguments(
    target: str,
    kv_budget: float | None = None,
    window: int | None = None,
    full_layers: FullLayers = None,
    gate: str | None = None,
    sinks: str | None = None,
) -> GateSWAOptions | None:
    """Refuse arguments that contradict each other, whatever the model; see `compile`.

    Returns:
        The form of the windowed layers, None for a target without.

    Raises:
        UsageError: one line that names the argument.
    """
    if target not in TARGETS:
        raise UsageError(f"no target {target!r}; there is {', '.join(TARGETS)}")
    if kv_budget is not None and not 0 < kv_budget <= 1:
        raise UsageError(f"kv_budget must be above 0 and at most 1, got {kv_budget:g}")
    if not target.startswith("gateswa"):
        given = {"window": window, "full_layers": full_layers, "gate": gate, "sinks": sinks}
        if needless := [name for name, value in given.items() if value is not None]:
            raise UsageError(f"{needless[0]} is for the targets gateswa and gateswa+mla, not for {target}")
        return None
    if target == "gateswa" and kv_budget is not None and full_layers is not None:
        raise UsageError("kv_budget and full_layers both say how many layers stay full; give one of them")
    return GateSWAOptions(
        window=DEFAULT_WINDOW if window is None else window,
        gate=DEFAULT_GATE if gate is None else gate,  # type: ignore[arg-type]  # refused if it is none
        sinks=Sinks.parse(DEFAULT_SINKS if sinks is None else sinks),
    )


def choose_sites(sites: list[AttentionSite]) -> tuple[list[AttentionSite], list[str]]:
    """Which sites are converted, and what the user should know of the others.

    Layers that slide stay as they are where others do not; a model in which all slide is converted, window kept.

    Raises:
        CaptureError: there is nothing to convert.
    """
    notes: list[str] = []
    able = [site for site in sites if not site.already_mla]
    if not able:
        names = _first([site.name for site in sites])
        raise CaptureError(f"all {len(sites)} attention sites ({names}) are multi-head latent attention already")
    if len(able) < len(sites):
        notes.append(f"{len(sites) - len(able)} sites are latent already and stay as they are")
    full = [site for site in able if site.window is None]
    if full and len(full) < len(able):
        notes.append(f"{len(able) - len(full)} layers already slide over a window and stay as they are")
    return full or able, notes


def _first(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _set_modes(model: PreTrainedModel, modes: dict[str, bool]) -> None:
    """Training or evaluation as it was for every module; new modules take after what they are in."""
    for name, module in model.named_modules():  # parents come first
        if name in modes:
            module.train(modes[name])


def _rewrite(
    source: PreTrainedModel,
    result: PreTrainedModel,
    chosen: list[AttentionSite],
    shapes: dict[str, Shape],
    windows: Tensor | None,
    options: FitOptions,
    seed: int,
    progress: Progress | None,
) -> tuple[dict[str, fx.GraphModule], dict[str, Fit]]:
    """Graphs and fits by site name."""
    graphs: dict[str, fx.GraphModule] = {}
    fits: dict[str, Fit] = {}
    if windows is None:
        for site in track(chosen, "build layers", progress):
            weight, _ = output_weight(source, site)
            shape = shapes[site.name]
            graphs[site.name] = build(result, site, shape, exact_factors(site, shape, weight))
        return graphs, fits
    queries = max(1, options.output_queries // len(windows))

    def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
        shape = shapes[site.name]
        if shape.exact:
            factors = exact_factors(site, shape, output_weight(source, site)[0])
        else:
            sample = take_sample(source, site, inputs, queries, seed)
            fits[site.name] = fit_layer(sample, shape, options)
            factors = fits[site.name].factors
        graphs[site.name] = build(result, site, shape, factors)

    stream(source, chosen, windows, visit, progress=progress, stage="fit layers", exact=options.exact_stream)
    return graphs, fits


def _windowed_values(sites: list[AttentionSite], options: GateSWAOptions, before: KVUsage) -> dict[int, float]:
    """Cached values per token of each site with its window, averaged over the context, by layer."""
    share = min(1.0, options.cached_tokens / before.length)
    return {site.layer_idx: gateswa_values(options.config(site)) * share for site in sites}


def _window_length(model: PreTrainedModel, options: GateSWAOptions) -> int:
    """Tokens per calibration window: several of the attention's windows."""
    wanted = max(DEFAULT_LENGTH, 4 * options.cached_tokens)
    return min(wanted, context_length(model), position_limit(model) or wanted)


def _first_full(sites: list[AttentionSite], full: int | list[int]) -> list[AttentionSite]:
    """As many sites as stay full, those named if any are."""
    return sites[:full] if isinstance(full, int) else [site for site in sites if site.layer_idx in full]


def _latent_shapes(
    sites: list[AttentionSite],
    before: dict[int, float],
    latent: list[AttentionSite],
    slides: dict[int, float],
    kv_budget: float | None,
) -> dict[str, Shape]:
    """Shapes of the latent sites, where the others of `slides` have the cached values given there."""
    own = {site.layer_idx for site in latent}
    changed = {layer: values for layer, values in slides.items() if layer not in own}
    if kv_budget is None:
        after = {**before, **changed, **{layer: DEFAULT_BUDGET * before[layer] for layer in own}}
        kv_budget = sum(after.values()) / sum(before.values()) if changed else DEFAULT_BUDGET
    return plan(sites, before, latent, kv_budget, changed) if latent else {}


def _config_of(graph: fx.GraphModule) -> AnyConfig:
    """Configuration of the new attention in a rewritten graph."""
    found: AnyConfig = next(getattr(graph, name) for name in KINDS if hasattr(graph, name)).config
    return found


def _choice_note(full: list[int]) -> str:
    listed = ",".join(map(str, full)) + ("," if len(full) == 1 else "")
    return f"full layers chosen by measured loss; full_layers={listed!r} takes them again without measuring"


def _rows(
    sites: list[AttentionSite],
    configs: dict[str, AnyConfig],
    fits: dict[str, Fit],
    windowed: Windowed | None,
    before: KVUsage,
    after: KVUsage,
) -> list[LayerReport]:
    rows = []
    for site in sites:
        config, fit = configs.get(site.name), fits.get(site.name)
        window = windowed.fits.get(site.name) if windowed else None
        rows.append(
            LayerReport(
                layer=site.layer_idx,
                name=site.name,
                kind="source" if config is None else kind_of(config).name,
                kv_lora_rank=config.kv_lora_rank if isinstance(config, MLAConfig) else None,
                qk_rope_head_dim=config.qk_rope_head_dim if isinstance(config, MLAConfig) else None,
                sliding_window=config.sliding_window if isinstance(config, GateSWAConfig) else None,
                loss_increase=windowed.loss_increases.get(site.name) if windowed else None,
                values_before=before.per_layer[site.layer_idx],
                values_after=after.per_layer[site.layer_idx],
                energy_kept=fit.energy_kept if fit else None,
                output_error=fit.output_error if fit else window.output_error if window else None,
            )
        )
    return rows


def calibration_name(calibration: Any) -> str:
    """How the report names the data."""
    if calibration is None:
        return "own samples"
    return str(calibration) if isinstance(calibration, str) or hasattr(calibration, "__fspath__") else "given data"

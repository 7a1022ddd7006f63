"""`attnedit.compile`: the pipeline from a live model to a rewritten, verified one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.capture import capture
from attnedit.compiler.data import token_windows
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.evaluate import KVUsage, kv_usage
from attnedit.compiler.progress import Progress, stage, track
from attnedit.compiler.report import LayerReport, Report, Verification, kv_fields, peak_memory_bytes, timed
from attnedit.compiler.sites import AttentionSite
from attnedit.compiler.source_checks import check_config, check_weights
from attnedit.compiler.stream import AttentionInputs, stream
from attnedit.compiler.verify import check_tokens, logits_of, same_decode, same_logits
from attnedit.passes.mla.assemble import build, exact_factors
from attnedit.passes.mla.budget import Shape, plan
from attnedit.passes.mla.fit import Fit, FitOptions, fit_layer
from attnedit.passes.mla.site_sample import output_weight, take_sample
from attnedit.result import CompileResult
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

TARGETS = ("mla",)
DEFAULT_BUDGET = 0.5


def compile(
    model: PreTrainedModel,
    target: str = "mla",
    *,
    kv_budget: float | None = None,
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
        target: what attention becomes: "mla".
        kv_budget: cached values per token, averaged over layers at the model's context length, as a fraction of the
            source's; 0.5 unless given. At 1.0 the result computes exactly what the source does.
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
    if target not in TARGETS:
        raise UsageError(f"no target {target!r}; there is {', '.join(TARGETS)}")
    options = FitOptions.of(alternations)
    budget = DEFAULT_BUDGET if kv_budget is None else kv_budget
    if not 0 < budget <= 1:
        raise UsageError(f"kv_budget must be above 0 and at most 1, got {budget:g}")
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
            shapes = plan(sites, dict(enumerate(before.per_layer)), chosen, budget)
        windows = None
        if not all(shape.exact for shape in shapes.values()):
            with timed(seconds, "data"):
                windows = token_windows(
                    calibration, tokenizer, model, tokens=calibration_tokens, seed=seed, progress=progress
                )
        result = model if in_place else share_copy(model)
        with timed(seconds, "fit"):
            graphs, fits = _rewrite(model, result, chosen, shapes, windows, options, seed, progress)
        ids = check_tokens(windows, model)
        exact = all(shape.exact for shape in shapes.values())
        expected = logits_of(model, ids) if verify and exact else None
        splice(result, graphs)
        result = to_attnedit(result, {site.name: graphs[site.name].mla.config for site in chosen})  # type: ignore[misc, union-attr]
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
        sites_rewritten=len(chosen),
        layers=_rows(sites, shapes, fits, before, after),
        verification=checks,
        kv_budget_asked=budget,
        calibration="" if windows is None else calibration_name(calibration),
        calibration_tokens=0 if windows is None else windows.numel(),
        seconds=seconds,
        peak_memory_bytes=peak_memory_bytes(),
        notes=notes,
        **kv_fields(before, after),
    )
    return CompileResult(result, report, tokenizer)


def choose_sites(sites: list[AttentionSite]) -> tuple[list[AttentionSite], list[str]]:
    """Which sites become latent, and what the user should know of the others.

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


def _rows(
    sites: list[AttentionSite], shapes: dict[str, Shape], fits: dict[str, Fit], before: KVUsage, after: KVUsage
) -> list[LayerReport]:
    rows = []
    for site in sites:
        shape, fit = shapes.get(site.name), fits.get(site.name)
        rows.append(
            LayerReport(
                layer=site.layer_idx,
                name=site.name,
                kind="source" if shape is None else "mla",
                kv_lora_rank=shape.rank if shape else None,
                qk_rope_head_dim=2 * shape.slots if shape else None,
                values_before=before.per_layer[site.layer_idx],
                values_after=after.per_layer[site.layer_idx],
                energy_kept=fit.energy_kept if fit else None,
                output_error=fit.output_error if fit else None,
            )
        )
    return rows


def calibration_name(calibration: Any) -> str:
    """How the report names the data."""
    if calibration is None:
        return "own samples"
    return str(calibration) if isinstance(calibration, str) or hasattr(calibration, "__fspath__") else "given data"

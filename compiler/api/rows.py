"""The report's rows: each attention site before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from transformers import PreTrainedModel

from attnedit._calibrate import calibration_name
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.evaluation.evaluate import KVUsage, kv_usage
from attnedit.compiler.formats import own_version
from attnedit.compiler.reporting.report import LayerReport, Report, RuleReport, kv_fields, peak_memory_bytes
from attnedit.figures import memory_curve
from attnedit.planning import Plan
from attnedit.targets.attention.config import GateSWAConfig, MLAConfig
from attnedit.targets.attention.kinds import AnyConfig, kind_of


@dataclass
class Fitted:
    """New attention, by the site's name.

    Attributes:
        graphs: with their weights, or on meta where these are written already.
        matched: names of the sites that each kind was fitted for.
        spent: seconds for that, by kind.
        energy_kept, output_error, loss_increase: where measured; see `LayerReport`.
        full: layers that keep no window, where others got one.
        notes: what the user should know.
    """

    graphs: dict[str, fx.GraphModule]
    matched: Mapping[str, Collection[str]]
    spent: Mapping[str, float]
    energy_kept: Mapping[str, float]
    output_error: Mapping[str, float]
    loss_increase: Mapping[str, float] = field(default_factory=dict)
    full: list[int] | None = None
    notes: list[str] = field(default_factory=list)


def compile_report(
    result: PreTrainedModel,
    plan: Plan,
    configs: Mapping[str, AnyConfig],
    fitted: Fitted,
    windows: CalibrationWindows | None,
    **facts: Any,
) -> Report:
    """What there is to report of a compilation.

    Args:
        result: the rewritten model, live or on meta.
        plan: with the sites, the source's cache and what was asked for.
        configs: of the new attention, by the site's name.
        fitted: what the fits found.
        windows: of calibration data; None where nothing was to be lost.
        **facts: the other fields of `Report`.
    """
    after, options = kv_usage(result), plan.options
    measured = {name: getattr(fitted, name) for name in ("energy_kept", "output_error", "loss_increase")}
    contracts = {"gateswa": "learned", "mla": "close" if windows is None else "learned"}
    rules = [
        RuleReport(
            name=kind,
            contract=contract,
            matched=len(fitted.matched[kind]),
            rewritten=sum(name in configs for name in fitted.matched[kind]),
            seconds=fitted.spent.get(kind, 0.0),
        )
        for kind, contract in contracts.items()
        if fitted.matched.get(kind)
    ]
    return Report(
        attnedit_version=own_version(),
        target=options.target_name,
        sites_matched=len(plan.sites),
        sites_rewritten=len(configs),
        layers=_layers(plan, configs, after, measured),
        rules=rules,
        calibration="" if windows is None else calibration_name(options.calibration),
        calibration_tokens=0 if windows is None else windows.tokens,
        calibration_length=None if windows is None else windows.length,
        calibration_windows="" if windows is None else str(windows),
        kv_budget_asked=plan.budget_asked,
        full_layers=fitted.full,
        peak_memory_bytes=peak_memory_bytes(),
        kv_curve=memory_curve(result, plan, configs),
        **kv_fields(plan.before, after),
        **facts,
    )


def _layers(
    plan: Plan, configs: Mapping[str, AnyConfig], after: KVUsage, measured: Mapping[str, Mapping[str, float]]
) -> list[LayerReport]:
    """One row per site."""
    rows = []
    for site in plan.sites:
        config = configs.get(site.name)
        rows.append(
            LayerReport(
                layer=site.layer_idx,
                name=site.name,
                kind="source" if config is None else kind_of(config).name,
                kv_lora_rank=config.kv_lora_rank if isinstance(config, MLAConfig) else None,
                qk_rope_head_dim=config.qk_rope_head_dim if isinstance(config, MLAConfig) else None,
                sliding_window=config.sliding_window if isinstance(config, GateSWAConfig) else None,
                values_before=plan.before.per_layer[site.layer_idx],
                values_after=after.per_layer[site.layer_idx],
                **{what: by_site.get(site.name) for what, by_site in measured.items()},
            )
        )
    return rows

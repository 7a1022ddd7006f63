"""The report's rows: each attention site before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedModel

from attnedit._calibrate import calibration_name
from attnedit.compiler.calibration_windows import CalibrationWindows
from attnedit.compiler.evaluate import KVUsage, kv_usage
from attnedit.compiler.report import LayerReport, Report, RuleReport, kv_fields, peak_memory_bytes
from attnedit.figures import memory_curve
from attnedit.planning import Plan
from attnedit.targets.attention.config import GateSWAConfig, MLAConfig
from attnedit.targets.attention.kinds import AnyConfig, kind_of


def compile_report(
    result: PreTrainedModel,
    plan: Plan,
    configs: Mapping[str, AnyConfig],
    *,
    matched: Mapping[str, Collection[str]],
    spent: Mapping[str, float],
    exact: bool,
    energy_kept: Mapping[str, float],
    output_error: Mapping[str, float],
    loss_increase: Mapping[str, float],
    calibration: Any,
    windows: CalibrationWindows | None,
    **facts: Any,
) -> Report:
    """What there is to report of a compilation, whether of a live model or of a checkpoint in parts.

    Args:
        result: the rewritten model, live or on meta.
        plan: with the sites and the source's cache.
        configs: of the new attention, by the site's name.
        matched: names of the sites that each kind of attention was fitted for.
        spent: seconds for that, by kind.
        exact: nothing was to be lost.
        energy_kept: by the site's name, where measured; see `LayerReport`.
        output_error: the same.
        loss_increase: the same.
        calibration: as it was given.
        windows: cut from it; None where nothing was fitted.
        **facts: the other fields of `Report`.
    """
    after = kv_usage(result)
    measured = {"energy_kept": energy_kept, "output_error": output_error, "loss_increase": loss_increase}
    contracts = {"gateswa": "learned", "mla": "close" if exact else "learned"}
    return Report(
        sites_matched=len(plan.sites),
        sites_rewritten=len(configs),
        layers=_layers(plan, configs, after, measured),
        rules=[
            RuleReport(
                name=kind,
                contract=contract,
                matched=len(matched[kind]),
                rewritten=sum(name in configs for name in matched[kind]),
                seconds=spent.get(kind, 0.0),
            )
            for kind, contract in contracts.items()
            if matched.get(kind)
        ],
        calibration="" if windows is None else calibration_name(calibration),
        calibration_tokens=0 if windows is None else windows.tokens,
        calibration_length=None if windows is None else windows.length,
        calibration_windows="" if windows is None else str(windows),
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

"""The report's rows: each attention site before and after."""

from __future__ import annotations

from collections.abc import Mapping

from attnedit.compiler.evaluate import KVUsage
from attnedit.compiler.report import LayerReport
from attnedit.planning import Plan
from attnedit.targets.attention.config import GateSWAConfig, MLAConfig
from attnedit.targets.attention.kinds import AnyConfig, kind_of


def layer_rows(
    plan: Plan,
    configs: Mapping[str, AnyConfig],
    after: KVUsage,
    *,
    energy_kept: Mapping[str, float],
    output_error: Mapping[str, float],
    loss_increase: Mapping[str, float],
) -> list[LayerReport]:
    """One row per site.

    Args:
        plan: with the sites and the source's cache.
        configs: of the new attention, by the site's name.
        after: the result's cache.
        energy_kept: by the site's name, where measured; see `LayerReport`.
        output_error: the same.
        loss_increase: the same.
    """
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
                loss_increase=loss_increase.get(site.name),
                values_before=plan.before.per_layer[site.layer_idx],
                values_after=after.per_layer[site.layer_idx],
                energy_kept=energy_kept.get(site.name),
                output_error=output_error.get(site.name),
            )
        )
    return rows

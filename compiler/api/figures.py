"""What the report of a compilation shows beside its table: memory and graphs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.reporting.graph_svg import sketch
from attnedit.compiler.reporting.records import KVCurve, KVUsage, SiteGraphs
from attnedit.planning import Plan
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.cost import BATCH, LENGTH, attention_cost, attention_values
from attnedit.targets.attention.kinds import kind_of
from attnedit.targets.runtime.engines import window_cache

CURVE_POINTS = 32
"""Of memory against the length of the context."""


def memory_curve(
    model: PreTrainedModel, plan: Plan, configs: Mapping[str, SiteConfig], after_usage: KVUsage
) -> KVCurve:
    """Memory of one sequence up to the model's context; where no cost is known, in proportion to what was measured."""
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    before, after = [], []
    for site in plan.sites:
        own = plan.before.per_layer[site.layer_idx]
        sizes = (site.num_attention_heads, site.num_key_value_heads, site.head_dim, site.v_head_dim)
        values = own * LENGTH if site.already_mla else attention_cost(hidden_size, *sizes, site.window).cached_values
        before.append(values)
        config = configs.get(site.name)
        cost = None if config is None else kind_of(config).cost
        share = after_usage.per_layer[site.layer_idx] / own if own else 1.0
        after.append(values * share if cost is None else cost(config).cached_values)
    lengths = sorted({max(1, plan.before.length * step // CURVE_POINTS) for step in range(1, CURVE_POINTS + 1)})
    totals = [sum(values) * model.dtype.itemsize for values in (before, after)]
    curves = [[float(total.subs({BATCH: 1, LENGTH: length})) for length in lengths] for total in totals]
    return KVCurve(lengths=lengths, before=curves[0], after=curves[1])


def site_graphs(
    model: PreTrainedModel, plan: Plan, graphs: Mapping[str, fx.GraphModule], configs: Mapping[str, SiteConfig]
) -> list[SiteGraphs]:
    """Graphs of the first site of each kind, before and after."""
    alike: dict[tuple[str, str], list[AttentionSite]] = {}
    for site in plan.sites:
        if site.name in configs:
            alike.setdefault((kind_of(configs[site.name]).name, site.kind), []).append(site)
    return [
        SiteGraphs(
            kind=kind,
            layers=[site.layer_idx for site in sites],
            before=sketch(graph_module(model, sites[0]).graph),
            after=sketch(graphs[sites[0].name].graph),
        )
        for (kind, _), sites in alike.items()
    ]


def engine_notes(model: PreTrainedModel, plan: Plan, configs: Mapping[str, SiteConfig]) -> list[str]:
    """What the engine that a result is for allocates for windows, beside what the cost model says that they hold."""
    engine = plan.options.engine
    windows = [getattr(configs.get(site.name), "sliding_window", site.window) for site in plan.sites]
    values = {attention_values(site.num_key_value_heads, site.head_dim, site.v_head_dim) for site in plan.sites}
    # Layers of other widths have pages of other sizes, which no engine's checkpoint with windows holds.
    if engine is None or not any(windows) or len(values) > 1:
        return []
    length = plan.before.length
    found = window_cache(engine, windows, values.pop(), model.dtype.itemsize, length)
    if found is None:
        return []
    size, flags = found
    return [
        f"{engine} allocates {size:,.0f} bytes per token at {length:,} tokens with {flags}: a window and a batch, in "
        "whole blocks"
    ]

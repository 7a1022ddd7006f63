"""What the report of a compilation shows beside its table: memory and graphs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.reporting.graph_svg import sketch
from attnedit.compiler.reporting.report import KVCurve, SiteGraphs
from attnedit.planning import Plan
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.cost import BATCH, LENGTH, attention_cost
from attnedit.targets.attention.kinds import kind_of

CURVE_POINTS = 32
"""Of memory against the length of the context."""


def memory_curve(model: PreTrainedModel, plan: Plan, configs: Mapping[str, SiteConfig]) -> KVCurve:
    """Memory of one sequence up to the model's context."""
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    before, after = [], []
    for site in plan.sites:
        own = plan.before.per_layer[site.layer_idx]
        sizes = (site.num_attention_heads, site.num_key_value_heads, site.head_dim, site.v_head_dim)
        values = own * LENGTH if site.already_mla else attention_cost(hidden_size, *sizes, site.window).cached_values
        before.append(values)
        config = configs.get(site.name)
        cost = None if config is None else kind_of(config).cost
        after.append(values if cost is None else cost(config).cached_values)
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

"""From a fitted window to the graph that takes the place of an attention module."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.passes.gateswa.fit import WindowFit
from attnedit.passes.site_sample import output_weight
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE, doubled, gateswa_graph


@torch.no_grad()
def build(model: nn.Module, site: AttentionSite, config: GateSWAConfig, fit: WindowFit) -> fx.GraphModule:
    """Graph of the windowed attention with its weights.

    A gate starts at 0, where it is 1/2, so the output projection's weight is doubled.

    Args:
        model: the live model.
        site: its attention site.
        config: shape of the windowed attention.
        fit: its weights.
    """
    projection: nn.Module | None = None
    if fit.output_weight is not None:
        projection = copy.deepcopy(output_weight(model, site)[1])
        weight = fit.output_weight.transpose(0, 1).flatten(1) / site.o_proj.scale
        own = site.o_proj.weight.removeprefix(f"{site.o_proj.module}.")
        projection.get_parameter(own).copy_(weight.mT if site.o_proj.transposed else weight)
    if config.gate != "none":
        projection = doubled(output_weight(model, site)[1] if projection is None else projection)
    graph = gateswa_graph(model, site, config, projection)
    module = graph.get_submodule(GATESWA_MODULE)
    for name, found in (("sink_logit", fit.sink_logit), ("sink_value", fit.sink_value)):
        if found is not None:
            module.get_parameter(name).copy_(found)
    return graph

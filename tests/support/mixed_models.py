"""Models with random new attention of two kinds, and arguments of `generate` that go beyond the window."""

from __future__ import annotations

import functools
from typing import Any

import torch
from families import shared
from gateswa_models import WINDOW, batch, sites
from torch import nn
from transformers import PreTrainedModel

from attnedit.targets.attention import MLAConfig
from attnedit.targets.attention.gateswa.graph import gateswa_config, gateswa_graph
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

TARGETS = ["mla", "gateswa", "gateswa+mla", "gateswa+source"]
TOKENS = 3 * WINDOW  # the ring wraps around more than once


@functools.cache
def rewritten(family: str, target: str) -> PreTrainedModel:
    """Random new attention in the layers; `target` names the first and the last layer's."""
    model = share_copy(shared(family))
    kinds = (target.split("+") * 2)[:2]
    configs: dict[str, Any] = {}
    graphs = {}
    torch.manual_seed(2)
    for kind, site in zip(kinds, sites(family), strict=True):
        if kind == "source":
            continue
        if kind == "gateswa":
            config = gateswa_config(site, WINDOW, gate="head", sink_logit=True, sink_tokens=2)
            graph = gateswa_graph(model, site, config)
        else:
            config = MLAConfig(
                layer_idx=site.layer_idx,
                num_attention_heads=site.num_attention_heads,
                head_dim=site.head_dim,
                v_head_dim=site.v_head_dim,
                kv_lora_rank=10,
                rope_columns=(0, 2, 3),
                qk_nope_head_dim=site.head_dim,
                input_size=site.num_key_value_heads * (site.head_dim + site.v_head_dim),
                scale=site.scale,
            )
            graph = mla_graph(model, site, config)
        for parameter in graph.get_submodule(kind).parameters():
            nn.init.normal_(parameter, std=0.4)
        configs[site.name], graphs[site.name] = config, graph
    splice(model, graphs)
    return to_attnedit(model, configs)


def arguments(padded: bool) -> dict[str, Any]:
    inputs = batch()
    if not padded:
        inputs = {name: value[1:] for name, value in inputs.items()}
    return {**inputs, "max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}

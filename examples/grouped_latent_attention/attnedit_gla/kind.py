"""How grouped latent attention gets into a graph, what it costs, and what a report shows of it."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.targets.attention.cost import AttentionCost, cached_cost
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.mla.graph import latent_inputs
from attnedit.targets.attention.site_graph import AnchorCall, check_facts, replace_attention, weights_like
from attnedit_gla.config import GroupedLatentConfig
from attnedit_gla.module import GroupedLatent

NAME = "gla"


def graph(
    model: nn.Module, site: AttentionSite, config: GroupedLatentConfig, output_projection: nn.Module | None = None
) -> fx.GraphModule:
    """The graph of one attention module with rope and attention replaced; the new module's weights are random.

    Raises:
        UsageError: the configuration does not fit the site.
        CaptureError: the attention module is not given the cache, or lacks a rotary embedding that is asked for.
    """
    facts = ("layer_idx", "num_attention_heads", "head_dim", "v_head_dim", "window")
    check_facts(site, config, {name: getattr(site, name) for name in facts})

    def arguments(call: AnchorCall) -> tuple[Any, ...]:
        rotary = bool(config.rope_columns)
        return call.node(site.query), *latent_inputs(call, site, rotary=rotary, folded=config.folded)

    module = GroupedLatent(config, **weights_like(model, site))
    return replace_attention(model, site, NAME, module, arguments, output_projection)


def cost(config: GroupedLatentConfig) -> AttentionCost:
    """What it caches and computes, decoding absorbed."""
    heads, rope = config.num_attention_heads, config.qk_rope_head_dim
    own = heads // config.latent_groups  # each head meets the latent of its group alone
    parameters = config.input_size * heads * (config.head_dim + config.v_head_dim)
    parameters += (config.input_size + config.kv_bias) * (config.kv_lora_rank + rope)
    parameters += own * config.kv_lora_rank * (config.head_dim + config.v_head_dim) + heads * rope * config.head_dim
    per_key = 2 * own * config.kv_lora_rank + heads * rope
    return cached_cost(config.kv_lora_rank + rope, config.window, parameters, per_key, heads * config.sinks)


KIND = AttentionKind(
    NAME,
    "grouped latent attention (GLA)",
    GroupedLatentConfig,
    graph,
    cost,
    figures=("latent_groups", "kv_lora_rank", "qk_rope_head_dim"),
)

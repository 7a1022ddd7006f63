"""The graph of an attention module with rope and attention replaced by latent attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.module import MLA
from attnedit.targets.attention.site_graph import AnchorCall, check_facts, replace_attention, weights_like

MLA_MODULE = "mla"
QUERY_MODULE = "q_proj"
"""Projection of the query where `MLAConfig.linear` gives it one of its own."""


def mla_graph(
    model: nn.Module, site: AttentionSite, config: MLAConfig, output_projection: nn.Module | None = None
) -> fx.GraphModule:
    """Build the graph of one attention module with rope and attention replaced by latent attention.

    The weights of the new module ``mla`` are random, in dtype and on the device of the output projection; all other
    modules are the source's own.

    Args:
        model: the live model that ``site`` was captured from, or one of the same shape.
        site: the attention site.
        config: shape of the latent attention; it must fit the site.
        output_projection: a module to use in place of the source's, with parameters of the same names and shapes.

    Returns:
        A GraphModule with the signature of the source's attention module. Parts that nothing uses any more are gone.

    Raises:
        UsageError: ``config`` or ``output_projection`` does not fit the site.
        CaptureError: the attention module is not given the cache, or lacks a rotary embedding that is asked for.
    """
    _check_fit(site, config)

    def arguments(call: AnchorCall) -> tuple[Any, ...]:
        query = call.node(site.query)
        if config.linear:
            projected = call.graph.call_module(QUERY_MODULE, (call.node(site.hidden),))
            heads = call.graph.call_method("unflatten", (projected, -1, (config.num_attention_heads, config.head_dim)))
            query = call.graph.call_method("transpose", (heads, 1, 2))
        return query, *latent_inputs(call, site, rotary=bool(config.rope_columns), folded=config.folded)

    module = MLA(config, **weights_like(model, site))
    others = _linear_modules(model, site, config) if config.linear else {}
    return replace_attention(model, site, MLA_MODULE, module, arguments, output_projection, others)


def latent_inputs(call: AnchorCall, site: AttentionSite, *, rotary: bool, folded: bool) -> tuple[Any, ...]:
    """What latent attention is called with after its query: what the cache is made of, cos, sin, mask and cache.

    Args:
        call: the attention in the graph that is edited.
        site: its site.
        rotary: whether parts of what is cached are rotated.
        folded: whether the cache is made of the hidden states [B, T, D]; else of keys and values [B, T, G (d + dv)].

    Raises:
        CaptureError: the site lacks the rotary embedding that is asked for.
    """
    cos = sin = None
    if rotary:
        if site.rope is None:
            raise CaptureError(f"{site.name}: it has no rotary embedding, so it can have no rotary slots")
        cos, sin = call.node(site.rope.cos), call.node(site.rope.sin)
    if folded:
        kv_input = call.node(site.hidden)
    else:
        key, value = (
            call.graph.call_method("flatten", (call.graph.call_method("transpose", (call.node(name), 1, 2)), 2))
            for name in (site.key, site.value)
        )
        kv_input = call.graph.call_function(torch.cat, ((key, value),), {"dim": -1})
    return kv_input, cos, sin, call.arguments.get("mask"), call.cache


def _linear_modules(model: nn.Module, site: AttentionSite, config: MLAConfig) -> dict[str, nn.Module]:
    """Make what a linear attention has of its own: the query's projection, and an output projection without bias."""
    like = weights_like(model, site)
    query = nn.Linear(config.input_size, config.num_attention_heads * config.head_dim, bias=False, **like)
    modules: dict[str, nn.Module] = {QUERY_MODULE: query}
    if site.o_proj.bias is not None:
        modules[site.o_proj.module] = without_bias(model.get_submodule(f"{site.name}.{site.o_proj.module}"))
    return modules


def without_bias(projection: nn.Module) -> nn.Linear:
    """Return a linear module with the same weight and no bias."""
    weight = projection.get_parameter("weight")
    result = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    result.weight = weight
    return result


def _check_fit(site: AttentionSite, config: MLAConfig) -> None:
    expected = {
        "num_attention_heads": site.num_attention_heads,
        "head_dim": site.head_dim,
        "v_head_dim": site.v_head_dim,
        "layer_idx": site.layer_idx,
    }
    if not config.folded:
        expected["input_size"] = site.num_key_value_heads * (site.head_dim + site.v_head_dim)
    check_facts(site, config, expected)
    if config.linear and site.o_proj.transposed:
        raise UsageError(f"{site.name}: its output projection is stored transposed, which a linear attention has not")
    if config.folded and not (site.linear_kv or config.linear):
        raise UsageError(f"{site.name}: keys or values are not linear in the hidden states, so they cannot be folded")

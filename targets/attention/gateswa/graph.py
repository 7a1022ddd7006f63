"""The graph of an attention module with its attention replaced by gated sliding-window attention; rope stays."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import CaptureError
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.module import GateSWA
from attnedit.targets.attention.site_graph import (
    AnchorCall,
    anchor_arguments,
    check_facts,
    replace_attention,
    weights_like,
)

GATESWA_MODULE = "gateswa"


def gateswa_config(site: AttentionSite, sliding_window: int, **options: Any) -> GateSWAConfig:
    """Describe gated sliding-window attention for a site.

    Args:
        site: the attention site.
        sliding_window: tokens each query sees, itself included.
        **options: further fields of `GateSWAConfig`: gate, gate_bias, sink_logit, sink_value, sink_tokens.

    Raises:
        UsageError: a value makes no sense, or the window is larger than the source's own.
        CaptureError: the graph of the site does not tell the hidden size.
    """
    return GateSWAConfig(**_facts(site), sliding_window=sliding_window, **options)


def gateswa_graph(
    model: nn.Module, site: AttentionSite, config: GateSWAConfig, output_projection: nn.Module | None = None
) -> fx.GraphModule:
    """Build the graph of one attention module with its attention replaced by gated sliding-window attention.

    The weights of the new module ``gateswa`` are 0, in dtype and on the device of the output projection; all other
    modules are the source's own. Sink logits that the source has stay its own parameter.

    Args:
        model: the live model that ``site`` was captured from, or one of the same shape.
        site: the attention site.
        config: shape of the new attention; it must fit the site (`gateswa_config`).
        output_projection: a module to use in place of the source's, with parameters of the same names and shapes:
            `doubled` makes the one that undoes a gate of 1/2.

    Returns:
        A GraphModule with the signature of the source's attention module.

    Raises:
        UsageError: ``config`` or ``output_projection`` does not fit the site.
        CaptureError: the attention module is not given the cache.
    """
    check_facts(site, config, _facts(site))

    def arguments(call: AnchorCall) -> tuple[Any, ...]:
        given = call.arguments
        query, key, value = given["q"], given["k"], given["v"]
        return query, key, value, call.node(site.hidden), given.get("mask"), call.cache, given.get("sinks")

    module = GateSWA(config, **weights_like(model, site))
    return replace_attention(model, site, GATESWA_MODULE, module, arguments, output_projection)


def doubled(projection: nn.Module) -> nn.Module:
    """Return a copy of an output projection with its weight doubled, its bias not.

    With a gate whose weights are 0 the layer then computes just what it did without gate, as long as nothing but
    movements (and products with other gates) stands between attention and projection.
    """
    result = copy.deepcopy(projection)
    with torch.no_grad():
        for name, parameter in result.named_parameters():
            if name.rpartition(".")[2] == "weight":
                parameter.mul_(2)
    return result


def _facts(site: AttentionSite) -> dict[str, Any]:
    """Fields of the configuration that the site decides."""
    arguments = anchor_arguments(site)
    shape = getattr(site.node(site.hidden).meta.get("val"), "shape", (None,))
    if not isinstance(shape[-1], int):
        raise CaptureError(f"{site.name}: node {site.hidden} does not tell the hidden size")
    return {
        "layer_idx": site.layer_idx,
        "num_attention_heads": site.num_attention_heads,
        "num_key_value_heads": site.num_key_value_heads,
        "head_dim": site.head_dim,
        "v_head_dim": site.v_head_dim,
        "hidden_size": shape[-1],
        # Not the site's: factors that go with rope are in its queries and keys here.
        "scale": float(arguments["scale"]),
        "softcap": arguments.get("softcap"),
        "sinks": arguments.get("sinks") is not None,
        "source_window": site.window,
    }

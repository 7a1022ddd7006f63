"""What gated sliding-window attention costs; see `attnedit.targets.attention.cost`."""

from __future__ import annotations

from attnedit.targets.attention.cost import AttentionCost, attention_cost, attention_values, cached_cost
from attnedit.targets.attention.gateswa.config import GateSWAConfig


def gateswa_values(config: GateSWAConfig) -> int:
    """Cached values per token that the window or the sinks keep: those of the source.

    Args:
        config: the shape.

    Returns:
        Values per kept token and layer.

    >>> gateswa_values(GateSWAConfig(0, 9, 3, 64, 64, 576, 128, 0.125))
    384
    """
    return attention_values(config.num_key_value_heads, config.head_dim, config.v_head_dim)


def gateswa_cost(config: GateSWAConfig) -> AttentionCost:
    """Cost of gated sliding-window attention; it caches ``min(sliding_window + sink_tokens, length)`` tokens.

    Args:
        config: the shape.

    Returns:
        Expressions of sympy over ``batch``, ``length`` and ``dtype_bytes``.

    >>> config = GateSWAConfig(0, 9, 3, 64, 64, 576, 128, 0.125, gate="head", sink_tokens=4)
    >>> gateswa_cost(config).cached_values
    384*batch*Min(132, length)
    """
    heads, size = config.num_attention_heads, config.v_head_dim
    source = attention_cost(
        config.hidden_size, heads, config.num_key_value_heads, config.head_dim, size, config.cached_tokens
    )
    gates = {"head": heads, "element": heads * size, "none": 0}[config.gate]
    products = source.parameters + gates * config.hidden_size
    others = gates * config.gate_bias + heads * (config.sink_logit + config.sinks)
    others += config.num_key_value_heads * size * config.sink_value
    return cached_cost(gateswa_values(config), config.cached_tokens, products, heads * (config.head_dim + size), others)

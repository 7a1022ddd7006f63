"""What latent attention costs; see `attnedit.targets.attention.cost`."""

from __future__ import annotations

from attnedit.targets.attention.cost import AttentionCost, cached_cost
from attnedit.targets.attention.mla.config import MLAConfig


def mla_values(config: MLAConfig) -> int:
    """Cached values per token of latent attention: the latent and both parts of each slot.

    Args:
        config: the shape.

    Returns:
        Values per token and layer.
    """
    return config.kv_lora_rank + config.qk_rope_head_dim


def mla_cost(config: MLAConfig, hidden_size: int, source_key_value_size: int | None = None) -> AttentionCost:
    """Cost of latent attention, decoding absorbed (`attnedit.targets.attention.mla.module`).

    Args:
        config: the shape.
        hidden_size: width of the residual stream.
        source_key_value_size: outputs of the source's key and value projections, which stay where the
            configuration is not folded; ``config.input_size`` unless told.

    Returns:
        Expressions of sympy over ``batch``, ``length`` and ``dtype_bytes``.

    >>> config = MLAConfig(0, 9, 64, 64, 160, tuple(range(16)), 64, 384, 0.125)
    >>> str(mla_cost(config, 576).kv_bytes)
    '192*batch*dtype_bytes*length'
    """
    heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
    parameters = hidden_size * heads * (config.head_dim + config.v_head_dim)
    if not config.folded:
        parameters += hidden_size * (source_key_value_size or config.input_size)
    parameters += (config.input_size + config.kv_bias) * (rank + rope)
    parameters += heads * (rank * (config.qk_nope_head_dim + config.v_head_dim) + rope * config.head_dim)
    sinks = heads if config.sinks else 0
    scored = rank if config.qk_nope_head_dim else 0
    return cached_cost(mla_values(config), config.window, parameters, heads * (scored + rope + rank), sinks)

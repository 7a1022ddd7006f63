"""What attention costs, as sympy expressions over batch, length and bytes per cached value.

One multiply-add is 2 FLOPs. Norms, rope and softmax are left out: they are small beside the products.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

import sympy

BATCH = sympy.Symbol("batch", integer=True, positive=True)
LENGTH = sympy.Symbol("length", integer=True, positive=True)
DTYPE_BYTES = sympy.Symbol("dtype_bytes", integer=True, positive=True)


@dataclass(frozen=True)
class AttentionCost:
    """Cost of one attention site.

    Attributes:
        values_per_token: cached values per token that is still cached.
        cached_values: cached values in all, over ``batch`` and ``length``.
        kv_bytes: the same times ``dtype_bytes``.
        decode_flops: FLOPs of one new token per sequence, with ``length`` tokens to attend to.
        parameters: weights, from hidden states to hidden states.
    """

    values_per_token: int
    cached_values: Any
    kv_bytes: Any
    decode_flops: Any
    parameters: int

    def at(self, length: int, batch: int = 1, dtype_bytes: int = 2) -> dict[str, int]:
        """Return every figure as a number.

        Args:
            length: tokens of context.
            batch: sequences side by side.
            dtype_bytes: of one cached value.

        Returns:
            Figures by the names of the attributes.

        >>> cost = attention_cost(576, 9, 3, 64, 64)
        >>> cost.at(1024)["kv_bytes"]
        786432
        """
        values = {LENGTH: length, BATCH: batch, DTYPE_BYTES: dtype_bytes}
        figures = ("values_per_token", "cached_values", "kv_bytes", "decode_flops", "parameters")
        return {name: int(sympy.sympify(getattr(self, name)).subs(values)) for name in figures}


def attention_values(num_key_value_heads: int, head_dim: int, v_head_dim: int) -> int:
    """Cached values per token of grouped-query attention.

    Args:
        num_key_value_heads: G.
        head_dim: d, size of keys.
        v_head_dim: dv, size of values.

    Returns:
        Values per token and layer; times the size of the cache's dtype, bytes.

    >>> attention_values(3, 64, 64)
    384
    """
    return num_key_value_heads * (head_dim + v_head_dim)


def attention_cost(
    hidden_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    head_dim: int,
    v_head_dim: int,
    window: int | None = None,
) -> AttentionCost:
    """Cost of (grouped-query) attention, full or in a sliding window.

    Args:
        hidden_size: width of the residual stream.
        num_attention_heads: H.
        num_key_value_heads: G.
        head_dim: d, size of queries and keys.
        v_head_dim: dv.
        window: tokens each query sees; a cache then holds ``min(window, length)`` slots.

    Returns:
        Expressions of sympy over ``batch``, ``length`` and ``dtype_bytes``.

    >>> attention_cost(576, 9, 3, 64, 64, window=128).cached_values
    384*batch*Min(128, length)
    """
    keys = num_key_value_heads * head_dim + num_key_value_heads * v_head_dim
    parameters = hidden_size * (num_attention_heads * (head_dim + v_head_dim) + keys)
    per_key = num_attention_heads * (head_dim + v_head_dim)
    return cached_cost(attention_values(num_key_value_heads, head_dim, v_head_dim), window, parameters, per_key)


def cached_cost(values: int, window: int | None, products: int, per_key: int, others: int = 0) -> AttentionCost:
    """Put together the cost of an attention from what it caches and multiplies.

    Args:
        values: cached per token.
        window: tokens that the cache holds at most; None for all.
        products: weights of matrix products, each used once per new token.
        per_key: products of a new token with each token attended to.
        others: weights that take part in no product, such as biases.

    Returns:
        Expressions of sympy over ``batch``, ``length`` and ``dtype_bytes``.

    >>> cached_cost(8, None, 100, 4).kv_bytes
    8*batch*dtype_bytes*length
    """
    slots = LENGTH if window is None else sympy.Min(window, LENGTH)
    cached = values * BATCH * slots
    flops = 2 * BATCH * (products + per_key * slots)
    return AttentionCost(values, cached, cached * DTYPE_BYTES, sympy.expand(flops), products + others)


def __getattr__(name: str) -> Any:
    """Where 0.1 documented names that stand in the folders of their kinds now."""
    if name in {"gateswa_cost", "gateswa_values", "mla_cost", "mla_values"}:
        return getattr(import_module(str(__package__)), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

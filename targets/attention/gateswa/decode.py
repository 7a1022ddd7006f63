"""One decode step of windowed attention in one kernel: when it applies, and the operator itself.

In plain torch a step is some twenty operations on little data, which take their launches' time: the token is written
into the ring, the ring is read, sinks join, a gate closes the output. `attnedit::ring_decode` does all of it.

Shapes: B batch, H heads, G key/value heads, n sink slots, W window, d query and key size, dv value size.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from attnedit.compiler.compatibility.live import recorded_attention
from attnedit.compiler.compatibility.torch_names import exporting
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.layers import bounded_layer
from attnedit.targets.attention.gateswa.ring import RingLayer
from attnedit.targets.attention.kernels import kernel_for
from attnedit.targets.attention.triton_support import learns, power, runs_on

__all__ = ["ring_decode", "ring_for_step", "steps_fused"]

MOST_SIZE, MOST_HEADS = 256, 64
"""Of queries and values, and of a group's heads: what the registers of one program hold."""
BLOCK = 64
"""Keys that a program takes at a time."""


def ring_for_step(query: Tensor, mask: Any, cache: Any, config: GateSWAConfig) -> RingLayer | None:
    """The ring of a static cache, where one token without padding before it comes in; None otherwise."""
    plain = query.shape[2] == 1 and mask is None and recorded_attention() is None
    if not plain or cache is None or exporting():
        return None
    layer = bounded_layer(cache, config)
    return layer if isinstance(layer, RingLayer) else None


def steps_fused(query: Tensor, ring: RingLayer, config: GateSWAConfig, learning: Iterable[Tensor]) -> bool:
    """Say whether `ring_decode` takes a step: half precision on a GPU with triton, and no gradient is asked for.

    Args:
        query: [B, H, 1, d].
        ring: which the token goes into.
        config: of the attention.
        learning: whatever else of what goes in might want a gradient, weights that are still to be applied too.
    """
    if query.dtype not in (torch.float16, torch.bfloat16) or config.softcap is not None or kernel_for(query):
        return False
    if any(x is not None and (x.dtype != query.dtype or not x.is_contiguous()) for x in (ring.keys, ring.values)):
        return False
    rep = config.num_attention_heads // config.num_key_value_heads
    if max(config.head_dim, config.v_head_dim) > MOST_SIZE or rep > MOST_HEADS:
        return False
    return not learns(query, *learning) and runs_on(query.device)


def ring_decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring: tuple[Tensor, Tensor],
    past: Tensor,
    config: GateSWAConfig,
    sinks: Tensor | None = None,
    sink: tuple[Tensor | None, Tensor | None] = (None, None),
    gate: Tensor | None = None,
) -> Tensor:
    """Put one token without padding before it into a ring, and attend with it.

    Args:
        query: [B, H, 1, d], fp16 or bf16.
        key: [B, G, 1, d].
        value: [B, G, 1, dv].
        ring: keys [B, G, n + W, d] and values [B, G, n + W, dv] as `RingLayer` has them; both are written.
        past: tokens before, int64, one element on the device.
        config: of the attention: window, slots, scale.
        sinks: [H], the source's own sink logits.
        sink: of a key without a token its logit [H], and its value [G, dv] or None for 0.
        gate: [B, 1, H] or [B, 1, H dv], before the sigmoid.

    Returns:
        [B, 1, H, dv] in the dtype of the query.
    """
    result: Tensor = torch.ops.attnedit.ring_decode(
        query, key, value, *ring, past, sinks, *sink, gate, config.sliding_window, config.scale
    )
    return result


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ring_keys: Tensor,
    ring_values: Tensor,
    past: Tensor,
    sinks: Tensor | None,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    gate: Tensor | None,
    window: int,
    scale: float,
) -> Tensor:
    from attnedit.targets.attention.gateswa.decode_kernels import attend_ring

    batch, heads, _, size = query.shape
    groups, wide = key.shape[1], value.shape[-1]
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if not (ring_keys.is_contiguous() and ring_values.is_contiguous()):
        raise AssertionError("a ring is made contiguous, and written in place")
    out = query.new_empty((batch, 1, heads, wide))
    gating = "none" if gate is None else "head" if gate.shape[-1] == heads else "element"
    with torch.cuda.device_of(query):  # triton launches on the current device
        attend_ring[(batch * groups,)](
            query,
            key,
            value,
            ring_keys,
            ring_values,
            past,
            out if sinks is None else sinks.contiguous(),
            out if sink_logit is None else sink_logit.contiguous(),
            out if sink_value is None else sink_value.contiguous(),
            out if gate is None else gate.contiguous(),
            out,
            scale,
            groups,
            *query.stride()[:2],
            *key.stride()[:2],
            *value.stride()[:2],
            D=size,
            DV=wide,
            REP=heads // groups,
            WINDOW=window,
            SLOTS=ring_keys.shape[2] - window,
            SINKS=sinks is not None,
            SINK=sink_logit is not None,
            SINK_VALUE=sink_value is not None,
            GATE=gating,
            BLOCK_D=power(size),
            BLOCK_V=power(wide),
            BLOCK_H=power(heads // groups),
            BLOCK_N=BLOCK,
            num_warps=4,
        )
    return out


def _fake(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    return query.new_empty((query.shape[0], 1, query.shape[1], value.shape[-1]))


# A copy of this file may be loaded beside it, from a checkpoint with code.
if not hasattr(torch.ops.attnedit, "ring_decode"):
    _OPERATOR = torch.library.custom_op("attnedit::ring_decode", _launch, mutates_args=("ring_keys", "ring_values"))
    _OPERATOR.register_fake(_fake)

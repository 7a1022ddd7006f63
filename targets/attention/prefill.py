"""Causal attention over new tokens in one kernel where torch has none: when it applies, and the operator itself.

Torch's fused kernels know no window, and a mask for each block of queries costs them most of what a window saves. Nor
do they take queries of more than 256 values, which latent attention with many rotary slots has.

Shapes: B batch, T new tokens, H heads, G key/value heads, n sink slots, C columns, d query and key size, dv value size,
2s rotary values.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from attnedit.targets.attention.kernels import Virtual
from attnedit.targets.attention.triton_support import learns, power, runs_on

__all__ = ["one_sink", "prefill_attention", "prefills_fused"]

MOST_SIZE = 256
"""Of queries, values and rotary values: beyond it a block leaves the chip's registers."""
WHOLE = 16
"""On a GPU sizes of queries and values, and steps from row to row, are multiples of this. Compiled for queries of 24
and values of 16 (triton 3.6, H200) the kernel gives wrong numbers, in triton's interpreter right ones: keys are then
copied one number at a time, values are not. Sizes of 32 and 64 are right."""


def prefills_fused(query: Tensor, learning: Iterable[Tensor], sizes: Sequence[int]) -> bool:
    """Say whether `prefill_attention` takes these: half precision on a GPU with triton, and no gradient is asked for.

    Args:
        query: [B, H, T, d].
        learning: whatever else of what goes in might want a gradient, weights that are still to be applied too.
        sizes: of queries, of values, and of the second part of the logits where there is one.
    """
    if query.dtype not in (torch.float16, torch.bfloat16) or not all(0 < size <= MOST_SIZE for size in sizes):
        return False
    return not learns(query, *learning) and runs_on(query.device)


def prefill_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    past: Tensor,
    before: int,
    scale: float,
    window: int | None = None,
    slots: Tensor | None = None,
    sink: tuple[Tensor | None, Tensor | None] = (None, None),
    query_rope: Tensor | None = None,
    keys_rope: Tensor | None = None,
) -> Tensor:
    """Attend with each query to the columns up to its own, to the sink slots behind its window, and to the sink.

    Args:
        query: [B, H, T, d], fp16 or bf16.
        keys: [B, G, n + C, d], slots first, then columns: neighbouring positions in order.
        values: [B, G, n + C, dv].
        past: position of the first query, int64, one element on the device.
        before: columns before that of the first query. Those at positions before 0 are not seen.
        scale: of the logits.
        window: columns that a query sees, its own included; None for all before it.
        slots: positions of the slots' tokens, int64 [B, n]; None without any.
        sink: of a key without a token its logit [H] and its value [H, dv], as `one_sink` has them.
        query_rope: [B, H, T, 2 s], whose product with `keys_rope` adds to the logits; None without.
        keys_rope: [B, C, 2 s], shared by all heads.

    Returns:
        [B, T, H, dv] in the dtype of the query.
    """
    slots = past.new_empty((query.shape[0], 0)) if slots is None else slots
    result: Tensor = torch.ops.attnedit.prefill_attention(
        query, keys, values, slots, past, before, window or 0, scale, *sink, query_rope, keys_rope
    )
    return result


def one_sink(virtual: Virtual, heads: int) -> tuple[Tensor | None, Tensor | None]:
    """Bring keys without a token to one of the same effect: their mass, and the mean of their values.

    Args:
        virtual: logits [H], and values [G, dv] or None for 0.
        heads: H.

    Returns:
        Logit [H] and value [H, dv], both float32; None without any, and a value of None where all are 0.
    """
    if not virtual:
        return None, None
    logits = torch.stack([logit.float() for logit, _ in virtual])
    mass = logits.logsumexp(0)
    value: Tensor | None = None
    for logit, own in zip(logits, (own for _, own in virtual), strict=True):
        if own is not None:
            part = own.float().repeat_interleave(heads // own.shape[0], dim=0) * (logit - mass).exp()[:, None]
            value = part if value is None else value + part
    return mass, value


def _launch(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    slots: Tensor,
    past: Tensor,
    before: int,
    window: int,
    scale: float,
    sink_logit: Tensor | None,
    sink_value: Tensor | None,
    query_rope: Tensor | None,
    keys_rope: Tensor | None,
) -> Tensor:
    from attnedit.targets.attention.prefill_kernels import attend_new

    batch, heads, length, size = query.shape
    query, keys, values = map(_with_whole_rows, (query, keys, values))
    wide, count = values.shape[-1], slots.shape[1]
    out = query.new_empty((batch, length, heads, wide))
    if sink_logit is not None:
        sink_logit = sink_logit.float().contiguous()
        sink_value = (query.new_zeros((heads, wide)) if sink_value is None else sink_value).float().contiguous()
    rope, rope_steps = 0, [0] * 5
    if query_rope is not None and keys_rope is not None:
        query_rope, keys_rope = (x if x.stride(-1) == 1 else x.contiguous() for x in (query_rope, keys_rope))
        rope, rope_steps = query_rope.shape[-1], [*query_rope.stride()[:3], *keys_rope.stride()[:2]]
    block_m, block_n, warps = _blocks(power(size), power(wide), power(rope) if rope else 0)
    with torch.cuda.device_of(query):  # triton launches on the current device
        attend_new[(-(-length // block_m), batch * heads)](
            query,
            keys,
            values,
            query if query_rope is None else query_rope,
            query if keys_rope is None else keys_rope,
            slots.contiguous(),
            past,
            out if sink_logit is None else sink_logit,
            out if sink_value is None else sink_value,
            out,
            scale,
            length,
            keys.shape[2] - count,
            before,
            heads,
            heads // keys.shape[1],
            *query.stride()[:3],
            *keys.stride()[:3],
            *values.stride()[:3],
            *rope_steps,
            D=size,
            DV=wide,
            ROPE=rope,
            WINDOW=window,
            SLOTS=count,
            SINK=sink_logit is not None,
            BLOCK_D=power(size),
            BLOCK_V=power(wide),
            BLOCK_R=power(max(1, rope)),
            BLOCK_S=power(max(1, count)),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=2,
        )
    return out


def _with_whole_rows(x: Tensor) -> Tensor:
    """The same numbers, neighbours beside each other and rows where copies of 16 bytes may begin."""
    return x if x.stride(-1) == 1 and x.stride(-2) % WHOLE == 0 else x.contiguous()


def _blocks(size: int, wide: int, rope: int) -> tuple[int, int, int]:
    """Queries and keys of a block, and warps: what registers and shared memory hold, the fastest first (one H200)."""
    if wide <= 128 and size + rope <= 384:
        return 128, 64, 8
    return 64, 32, 4


def _fake(query: Tensor, keys: Tensor, values: Tensor, *_: object) -> Tensor:
    return query.new_empty((query.shape[0], query.shape[2], query.shape[1], values.shape[-1]))


# A copy of this file may be loaded beside it, from a checkpoint with code.
if not hasattr(torch.ops.attnedit, "prefill_attention"):
    _OPERATOR = torch.library.custom_op("attnedit::prefill_attention", _launch, mutates_args=())
    _OPERATOR.register_fake(_fake)

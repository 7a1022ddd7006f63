"""Triton kernel of causal attention over new tokens: each block of queries reads the keys that it sees only.

Method: FlashAttention-2 (arXiv 2307.08691) over the columns that some query of the block sees, begun with the sink: a
key without a token, which has a logit and a value. Logits may have a second part, from keys that all heads share.
Imported by `attnedit.targets.attention.prefill` only, as triton is not everywhere.
"""

# triton compiles these functions from their source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

try:  # a checkpoint with a copy of this file loads without triton: transformers looks for all other imports at once
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel of a prefill needs triton") from error

LOWEST = tl.constexpr(-1.0e30)
"""Finite, so that a row without any visible key is no infinity less infinity."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fold(logits, v, seen, scale, highest, total, mean):
    """Take more keys, their logits [M, N] and values [N, DV], into a running softmax to the base of 2."""
    logits = tl.where(seen, logits * scale, float("-inf"))
    higher = tl.maximum(highest, tl.max(logits, 1))
    weights, shrink = tl.exp2(logits - higher[:, None]), tl.exp2(highest - higher)
    total = total * shrink + tl.sum(weights, 1)
    mean = tl.dot(weights.to(v.dtype), v, mean * shrink[:, None])
    return higher, total, mean


@triton.jit
def rows_of(x, row, step, inside, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Rows [N, BLOCK] of SIZE columns, zeros beyond and where a row is not inside."""
    column = tl.arange(0, BLOCK)
    wanted = inside[:, None] & (column < SIZE)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * step + column[None, :], mask=wanted, other=0.0)


@triton.jit(do_not_specialize=["length", "columns", "before"])
def attend_new(
    query,  # [B, H, T, D]
    keys,  # [B, G, SLOTS + C, D]: sink slots, then columns
    values,  # [B, G, SLOTS + C, DV]
    query_rope,  # [B, H, T, ROPE]: of the second part of the logits; unused without
    keys_rope,  # [B, C, ROPE], shared by all heads
    slots,  # int64 [B, SLOTS]: positions of the slots' tokens
    past,  # int64 [1]: position of the first query
    sink_logit,  # float32 [H]; unused unless SINK
    sink_value,  # float32 [H, DV]; unused unless SINK
    out,  # [B, T, H, DV]
    scale,  # of the logits
    length,  # T
    columns,  # C
    before,  # columns before the first query's own
    heads,
    rep,  # heads of a group
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    value_batch,
    value_head,
    value_row,
    query_rope_batch,
    query_rope_head,
    query_rope_row,
    keys_rope_batch,
    keys_rope_row,
    D: tl.constexpr,
    DV: tl.constexpr,
    ROPE: tl.constexpr,  # 0 without
    WINDOW: tl.constexpr,  # 0 for all columns
    SLOTS: tl.constexpr,
    SINK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of queries of one head of one sequence."""
    # Blocks that see most come first, so that none of them is last.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    batch, head = tl.program_id(1) // heads, tl.program_id(1) % heads
    row, value_feature = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_V)
    here = row < length
    query += batch.to(tl.int64) * query_batch + head * query_head
    keys += batch.to(tl.int64) * key_batch + (head // rep) * key_head
    values += batch.to(tl.int64) * value_batch + (head // rep) * value_head
    q = rows_of(query, row, query_row, here, D, BLOCK_D)
    if ROPE > 0:
        query_rope += batch.to(tl.int64) * query_rope_batch + head * query_rope_head
        keys_rope += batch.to(tl.int64) * keys_rope_batch
        turned = rows_of(query_rope, row, query_rope_row, here, ROPE, BLOCK_R)
    highest = tl.full([BLOCK_M], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mean = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    factor = scale * LOG2E
    if SINK:
        highest = tl.zeros([BLOCK_M], tl.float32) + tl.load(sink_logit + head) * LOG2E
        total += 1.0
        own = tl.load(sink_value + head * DV + value_feature, mask=value_feature < DV, other=0.0)
        mean += own[None, :]
    start = tl.load(past)
    if SLOTS > 0:
        slot = tl.arange(0, BLOCK_S)
        held = slot < SLOTS
        at = tl.load(slots + batch * SLOTS + slot, mask=held, other=0)
        far = ((start + row)[:, None] - at[None, :] >= WINDOW) & held[None, :]
        k, v = rows_of(keys, slot, key_row, held, D, BLOCK_D), rows_of(values, slot, value_row, held, DV, BLOCK_V)
        highest, total, mean = fold(tl.dot(q, tl.trans(k)), v, far, factor, highest, total, mean)
    # Columns at positions before 0 are places of a ring that nothing fills yet.
    low = before - tl.minimum(start, before).to(tl.int32)
    if WINDOW > 0:
        low = tl.maximum(low, before + first - WINDOW + 1)
    high = tl.minimum(before + first + BLOCK_M, columns)
    keys += SLOTS * key_row
    values += SLOTS * value_row
    for begin in tl.range(low // BLOCK_N * BLOCK_N, high, BLOCK_N):
        column = begin + tl.arange(0, BLOCK_N)
        inside = column < columns
        logits = tl.dot(q, tl.trans(rows_of(keys, column, key_row, inside, D, BLOCK_D)))
        if ROPE > 0:
            logits = tl.dot(turned, tl.trans(rows_of(keys_rope, column, keys_rope_row, inside, ROPE, BLOCK_R)), logits)
        behind = (before + row)[:, None] - column[None, :]
        seen = (behind >= 0) & (start - before + column >= 0)[None, :]
        if WINDOW > 0:
            seen = seen & (behind < WINDOW)
        value = rows_of(values, column, value_row, inside, DV, BLOCK_V)
        highest, total, mean = fold(logits, value, seen, factor, highest, total, mean)
    mean = mean / tl.maximum(total, 1.0e-30)[:, None]
    target = out + ((batch.to(tl.int64) * length + row)[:, None] * heads + head) * DV + value_feature[None, :]
    tl.store(target, mean.to(out.dtype.element_ty), mask=here[:, None] & (value_feature < DV)[None, :])

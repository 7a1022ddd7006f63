"""Triton kernel of one decode step of windowed attention: a program for each key/value head of each sequence.

It reads what the ring holds once for all heads of a group, and puts the new token into it: what would be written is not
read again, so that nothing has to wait. Imported by `attnedit.targets.attention.gateswa.decode` only, as triton is not
everywhere.
"""

# triton compiles these functions from their source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

from attnedit.targets.attention.prefill_kernels import LOG2E, fold, rows_of

try:  # a checkpoint with a copy of this file loads without triton: transformers looks for all other imports at once
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel of a windowed step needs triton") from error


@triton.jit
def attend_ring(
    query,  # [B, H, D]
    key,  # [B, G, D] of the new token
    value,  # [B, G, DV]
    ring_keys,  # [B, G, SLOTS + WINDOW, D], contiguous; gets the new token
    ring_values,  # [B, G, SLOTS + WINDOW, DV], likewise
    past,  # int64 [1]: tokens before
    sinks,  # [H]: logits without a value; unused unless SINKS
    sink_logit,  # [H]; unused unless SINK
    sink_value,  # [G, DV]; unused unless SINK_VALUE
    gate,  # [B, H] or [B, H, DV], before the sigmoid; unused for "none"
    out,  # [B, H, DV]
    scale,  # of the logits
    groups,
    query_batch,
    query_head,
    key_batch,
    key_head,
    value_batch,
    value_head,
    D: tl.constexpr,
    DV: tl.constexpr,
    REP: tl.constexpr,  # heads of a group
    WINDOW: tl.constexpr,
    SLOTS: tl.constexpr,
    SINKS: tl.constexpr,
    SINK: tl.constexpr,
    SINK_VALUE: tl.constexpr,
    GATE: tl.constexpr,  # "none", "head" or "element"
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One group of heads of one sequence."""
    batch, group = (tl.program_id(0) // groups).to(tl.int64), tl.program_id(0) % groups
    lane, feature, value_feature = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V)
    here, head, wide = lane < REP, group * REP + lane, value_feature < DV
    q = rows_of(query + batch * query_batch, head, query_head, here, D, BLOCK_D)
    new_key = tl.load(key + batch * key_batch + group * key_head + feature, mask=feature < D, other=0.0)
    new_value = tl.load(value + batch * value_batch + group * value_head + value_feature, mask=wide, other=0.0)
    start = tl.load(past)
    place = SLOTS + start % WINDOW
    factor = scale * LOG2E
    # The new token sees itself.
    highest = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], 1) * factor
    total = tl.full([BLOCK_H], 1.0, tl.float32)
    mean = tl.zeros([BLOCK_H, BLOCK_V], tl.float32) + new_value.to(tl.float32)[None, :]
    if SINKS:
        logit = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(highest, logit)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.exp2(logit - higher)
        mean = mean * shrink[:, None]
        highest = higher
    if SINK:
        logit = tl.load(sink_logit + head, mask=here, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(highest, logit)
        shrink, weight = tl.exp2(highest - higher), tl.exp2(logit - higher)
        total = total * shrink + weight
        mean = mean * shrink[:, None]
        if SINK_VALUE:
            own = tl.load(sink_value + group * DV + value_feature, mask=wide, other=0.0).to(tl.float32)
            mean += weight[:, None] * own[None, :]
        highest = higher
    row = (batch * groups + group) * (SLOTS + WINDOW)
    ring_keys += row * D
    ring_values += row * DV
    for begin in tl.range(0, SLOTS + WINDOW, BLOCK_N):
        at = begin + tl.arange(0, BLOCK_N)
        # A slot shows once its token has left the window, a place of the ring once it was filled.
        seen = (at >= SLOTS) & (at - SLOTS <= start) & (at != place) & (at < SLOTS + WINDOW)
        seen = seen | ((at < SLOTS) & (at + WINDOW <= start))
        k, v = rows_of(ring_keys, at, D, seen, D, BLOCK_D), rows_of(ring_values, at, DV, seen, DV, BLOCK_V)
        highest, total, mean = fold(tl.dot(q, tl.trans(k)), v, seen[None, :], factor, highest, total, mean)
    mean = mean / total[:, None]
    target = (batch * groups * REP + head)[:, None] * DV + value_feature[None, :]
    inside = here[:, None] & wide[None, :]
    if GATE == "head":
        opening = tl.load(gate + batch * groups * REP + head, mask=here, other=0.0).to(tl.float32)
        mean = mean * tl.sigmoid(opening)[:, None]
    if GATE == "element":
        mean = mean * tl.sigmoid(tl.load(gate + target, mask=inside, other=0.0).to(tl.float32))
    tl.store(out + target, mean.to(out.dtype.element_ty), mask=inside)
    tl.store(ring_keys + place * D + feature, new_key, mask=feature < D)
    tl.store(ring_values + place * DV + value_feature, new_value, mask=wide)
    if start < SLOTS:
        tl.store(ring_keys + start * D + feature, new_key, mask=feature < D)
        tl.store(ring_values + start * DV + value_feature, new_value, mask=wide)

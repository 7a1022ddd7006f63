"""Triton kernels of one decode step of latent attention: splits of the sequence, then their sum.

Method: Flash-Decoding (split softmax, https://crfm.stanford.edu/2023/10/12/flashdecoding.html) over an absorbed
latent (DeepSeek-V2, arXiv 2405.04434): logits and output are products with the same tile of the cache, so a tile is
read once for all heads. Imported by `attnedit.targets.attention.mla.decode` only, as triton is not everywhere.
"""

# triton compiles these functions from their source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

try:  # a checkpoint with a copy of this file loads without triton: transformers looks for all other imports at once
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernel of latent attention needs triton") from error

LOWEST = tl.constexpr(-1.0e30)
"""Finite, so that a row without any visible key is no infinity less infinity."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["keys", "splits", "mask_row"])
def attend_split(
    query,  # [B, H, RANK], scaled; unused unless NOPE
    query_rope,  # [B, H, ROPE], scaled; unused without slots
    latent,  # [B, keys, RANK], rows LATENT_ROW apart
    slots,  # [B, keys, ROPE], rows SLOT_ROW apart
    mask,  # [B or 1, keys], rows mask_row apart; int8 (0 hides) or floats to add
    length,  # int64 [1]: keys filled so far
    context,  # [B, splits, H, RANK]: each split's own mean
    mass,  # float32 [B, splits, H]: log2 of each split's sum of exponentials
    keys,
    heads,
    splits,
    mask_row,
    query_batch,
    query_head,
    rope_batch,
    rope_head,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,
    LATENT_ROW: tl.constexpr,
    SLOT_ROW: tl.constexpr,
    NOPE: tl.constexpr,
    MASK: tl.constexpr,  # "none", "bool" or "add"
    LENGTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One split of one block of heads of one sequence."""
    blocks = tl.cdiv(heads, BLOCK_H)
    batch = tl.program_id(0) // blocks
    split = tl.program_id(1)
    head = (tl.program_id(0) % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
    column, slot, token = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_N)
    wanted = (head < heads)[:, None] & (column < RANK)[None, :]
    if NOPE:
        query += batch.to(tl.int64) * query_batch
        turned = tl.trans(tl.load(query + head[:, None] * query_head + column[None, :], mask=wanted, other=0.0))
    if ROPE > 0:
        wanted_rope = (head < heads)[:, None] & (slot < ROPE)[None, :]
        query_rope += batch.to(tl.int64) * rope_batch
        rows = query_rope + head[:, None] * rope_head
        turned_rope = tl.trans(tl.load(rows + slot[None, :], mask=wanted_rope, other=0.0))
    filled = keys
    if LENGTH:
        filled = tl.minimum(tl.load(length).to(tl.int32), keys)
    share = tl.cdiv(tl.cdiv(filled, splits), BLOCK_N) * BLOCK_N
    first = split * share
    last = tl.minimum(first + share, filled)
    latent += batch.to(tl.int64) * keys * LATENT_ROW
    slots += batch.to(tl.int64) * keys * SLOT_ROW
    mask += batch.to(tl.int64) * mask_row
    highest = tl.full([BLOCK_H], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    mean = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    # Latent by heads: the tensor cores take 64 rows at a time, which heads would seldom fill.
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        key = start + token
        seen = key < last
        inside = seen[:, None] & (column < RANK)[None, :]
        if MASK != "none":  # first, so that it is there when the logits are
            shown = tl.load(mask + key, mask=seen, other=0)
        tile = tl.load(latent + key[:, None] * LATENT_ROW + column[None, :], mask=inside, other=0.0)
        logits = tl.zeros([BLOCK_N, BLOCK_H], tl.float32)
        if NOPE:
            logits = tl.dot(tile, turned, logits)
        if ROPE > 0:
            inside_rope = seen[:, None] & (slot < ROPE)[None, :]
            rotated = tl.load(slots + key[:, None] * SLOT_ROW + slot[None, :], mask=inside_rope, other=0.0)
            logits = tl.dot(rotated, turned_rope, logits)
        if MASK == "bool":
            seen = seen & (shown != 0)
        if MASK == "add":
            logits += shown.to(tl.float32)[:, None]
        logits = tl.where(seen[:, None], logits * LOG2E, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 0))
        weights = tl.exp2(logits - higher[None, :])
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.sum(weights, 0)
        mean = tl.dot(tl.trans(tile), weights.to(tile.dtype), mean * shrink[None, :])
        highest = higher
    total = tl.maximum(total, 1.0e-30)
    row = (batch * splits + split) * heads + head
    mean = tl.trans(mean / total[None, :])
    tl.store(context + row[:, None] * RANK + column[None, :], mean.to(context.dtype.element_ty), mask=wanted)
    tl.store(mass + row, highest + tl.log2(total), mask=head < heads)


@triton.jit(do_not_specialize=["splits"])
def sum_splits(
    parts,  # float32 [B, splits, H, RANK]
    mass,  # float32 [B, splits, H]
    context,  # [B, H, RANK]
    heads,
    splits,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least splits
    BLOCK_R: tl.constexpr,
):
    """One block of columns of one head of one sequence."""
    batch, head = tl.program_id(0) // heads, tl.program_id(0) % heads
    column, split = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, SPLITS)
    row = (batch * splits + split) * heads + head
    own = tl.load(mass + row, mask=split < splits, other=2 * LOWEST)
    weight = tl.exp2(own - tl.max(own, 0))
    inside = (split < splits)[:, None] & (column < RANK)[None, :]
    part = tl.load(parts + row.to(tl.int64)[:, None] * RANK + column[None, :], mask=inside, other=0.0)
    mean = tl.sum(part * weight[:, None], 0) / tl.sum(weight, 0)
    target = context + tl.program_id(0).to(tl.int64) * RANK + column
    tl.store(target, mean.to(context.dtype.element_ty), mask=column < RANK)

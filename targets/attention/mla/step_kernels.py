"""Triton kernels around the decode kernel, for a few sequences: the products before it, and those after it.

What they read is weights, once each: many programs with a part of one weight each are as fast as memory, where products
one after the other take their launches' time. Imported by `attnedit.targets.attention.mla.step` only, as triton is not
everywhere.

Shapes: B batch, H heads, E size of the states, d query size, dv value size, r latent, s slots.
"""

# triton compiles these functions from their source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

try:  # a checkpoint with a copy of this file loads without triton: transformers looks for all other imports at once
    import triton
    import triton.language as tl
except ImportError as error:
    raise ImportError("the kernels around a latent step need triton") from error

LOWEST = tl.constexpr(-1.0e30)
"""Finite: of a split that is not there."""


@triton.jit
def part_of(x, row, step, column, rows, columns):
    """Rows and columns of a matrix, zeros beyond it."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + row.to(tl.int64)[:, None] * step + column[None, :], mask=inside, other=0.0)


@triton.jit
def cached_rows(
    states, state_row, weight, bias, row, last, batch, E, BIAS, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr
):
    """States [B, E] times some rows of a weight, those before `last`: float32 [BLOCK_B, rows]."""
    sequence = tl.arange(0, BLOCK_B)
    sums = tl.zeros([BLOCK_B, row.shape[0]], tl.float32)
    for begin in range(0, E, BLOCK_E):
        column = begin + tl.arange(0, BLOCK_E)
        x = part_of(states, sequence, state_row, column, batch, E)
        sums = tl.dot(x, tl.trans(part_of(weight, row, E, column, last, E)), sums)
    if BIAS:
        sums += tl.load(bias + row, mask=row < last, other=0.0).to(tl.float32)[None, :]
    return sums


@triton.jit
def store_turned(target, row, step, real, imaginary, slot, cos, sin, table_row, factor, batch, SLOTS):
    """Turn pairs [BLOCK_B, slots] and store them, real parts first."""
    c = part_of(cos, row, table_row, slot, batch, SLOTS).to(tl.float32)
    s = part_of(sin, row, table_row, slot, batch, SLOTS).to(tl.float32)
    inside = (row < batch)[:, None] & (slot < SLOTS)[None, :]
    place = target + row.to(tl.int64)[:, None] * step + slot[None, :]
    dtype = target.dtype.element_ty
    tl.store(place, ((real * c - imaginary * s) * factor).to(dtype), mask=inside)
    tl.store(place + SLOTS, ((imaginary * c + real * s) * factor).to(dtype), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def before_step(
    query,  # [B, H, D], before rotation and scale
    states,  # [B, E], what is projected to the latent
    kv_weight,  # [RANK + 2 SLOTS, E]
    kv_bias,  # [RANK + 2 SLOTS]; unused unless BIAS
    up_weight,  # [H UP, RANK], the first D rows of a head take its query down
    rope_weight,  # [H, 2 SLOTS, D]; unused without slots
    cos,  # [B or 1, SLOTS]
    sin,  # likewise
    down,  # [B, H, RANK], scaled
    rotary,  # [B, H, 2 SLOTS], turned and scaled
    latent,  # [B, RANK]
    slots,  # [B, 2 SLOTS], turned
    scale,
    batch,
    heads,
    query_batch,
    query_head,
    state_row,
    table_row,  # 0 where all sequences share a table
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,
    D: tl.constexpr,
    UP: tl.constexpr,  # rows of a head
    E: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_R: tl.constexpr,  # columns that a query is taken down to
    BLOCK_S: tl.constexpr,  # holds all slots
    BLOCK_C: tl.constexpr,  # columns of the latent, or slots, that a program projects
):
    """One part of one product; those of the states come first, as they take longest."""
    program = tl.program_id(0)
    row, feature = tl.arange(0, BLOCK_B), tl.arange(0, BLOCK_D)
    of_latent, of_slots = tl.cdiv(RANK, BLOCK_C), tl.cdiv(SLOTS, BLOCK_C)
    of_rope = heads if SLOTS > 0 else 0
    if program < of_latent:
        column = program * BLOCK_C + tl.arange(0, BLOCK_C)
        made = cached_rows(states, state_row, kv_weight, kv_bias, column, RANK, batch, E, BIAS, BLOCK_B, BLOCK_E)
        inside = (row < batch)[:, None] & (column < RANK)[None, :]
        tl.store(latent + row[:, None] * RANK + column[None, :], made.to(latent.dtype.element_ty), mask=inside)
    elif program < of_latent + of_slots:
        slot = (program - of_latent) * BLOCK_C + tl.arange(0, BLOCK_C)
        real = cached_rows(
            states, state_row, kv_weight, kv_bias, RANK + slot, RANK + SLOTS, batch, E, BIAS, BLOCK_B, BLOCK_E
        )
        imaginary = cached_rows(
            states,
            state_row,
            kv_weight,
            kv_bias,
            RANK + SLOTS + slot,
            RANK + 2 * SLOTS,
            batch,
            E,
            BIAS,
            BLOCK_B,
            BLOCK_E,
        )
        store_turned(slots, row, 2 * SLOTS, real, imaginary, slot, cos, sin, table_row, 1.0, batch, SLOTS)
    elif program < of_latent + of_slots + of_rope:
        head = program - of_latent - of_slots
        slot = tl.arange(0, BLOCK_S)
        q = part_of(query + head * query_head, row, query_batch, feature, batch, D)
        turned = rope_weight + head * 2 * SLOTS * D
        real = tl.dot(q, tl.trans(part_of(turned, slot, D, feature, SLOTS, D)))
        imaginary = tl.dot(q, tl.trans(part_of(turned + SLOTS * D, slot, D, feature, SLOTS, D)))
        place = rotary + head * 2 * SLOTS
        store_turned(place, row, heads * 2 * SLOTS, real, imaginary, slot, cos, sin, table_row, scale, batch, SLOTS)
    else:
        left = program - of_latent - of_slots - of_rope
        head, column = left // tl.cdiv(RANK, BLOCK_R), left % tl.cdiv(RANK, BLOCK_R) * BLOCK_R + tl.arange(0, BLOCK_R)
        q = part_of(query + head * query_head, row, query_batch, feature, batch, D)
        w = part_of(up_weight + (head * UP).to(tl.int64) * RANK, feature, RANK, column, D, RANK)
        made = (tl.dot(q, w) * scale).to(down.dtype.element_ty)
        inside = (row < batch)[:, None] & (column < RANK)[None, :]
        tl.store(down + (row * heads + head)[:, None] * RANK + column[None, :], made, mask=inside)


@triton.jit(do_not_specialize=["batch", "splits"])
def after_step(
    parts,  # [B, splits, H, RANK]: each split's own mean
    mass,  # float32 [B, splits, H]: log2 of each split's sum of exponentials
    up_weight,  # [H UP, RANK], the last DV rows of a head raise its mean
    out,  # [B, H, DV]
    batch,
    heads,
    splits,
    RANK: tl.constexpr,
    DV: tl.constexpr,
    UP: tl.constexpr,
    BLOCK_B: tl.constexpr,
    SPLITS: tl.constexpr,  # a power of two, at least splits
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Some values of one head of all sequences. Splits are raised before they are summed: rows of one product."""
    head, value = tl.program_id(0), tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    row = tl.arange(0, BLOCK_B * SPLITS)
    sequence, split = row // SPLITS, row % SPLITS
    here = (sequence < batch) & (split < splits)
    at = (sequence * splits + split) * heads + head
    own = tl.reshape(tl.load(mass + at, mask=here, other=2 * LOWEST), (BLOCK_B, SPLITS))
    weight = tl.exp2(own - tl.max(own, 1)[:, None])
    weight = weight / tl.sum(weight, 1)[:, None]
    raised = tl.zeros([BLOCK_B * SPLITS, BLOCK_V], tl.float32)
    up_weight += (head * UP + UP - DV).to(tl.int64) * RANK
    for begin in range(0, RANK, BLOCK_R):
        column = begin + tl.arange(0, BLOCK_R)
        inside = here[:, None] & (column < RANK)[None, :]
        part = tl.load(parts + at.to(tl.int64)[:, None] * RANK + column[None, :], mask=inside, other=0.0)
        raised = tl.dot(part, tl.trans(part_of(up_weight, value, RANK, column, DV, RANK)), raised)
    summed = tl.sum(tl.reshape(raised, (BLOCK_B, SPLITS, BLOCK_V)) * weight[:, :, None], 1)
    row = tl.arange(0, BLOCK_B)
    target = out + (row * heads + head)[:, None] * DV + value[None, :]
    tl.store(target, summed.to(out.dtype.element_ty), mask=(row < batch)[:, None] & (value < DV)[None, :])

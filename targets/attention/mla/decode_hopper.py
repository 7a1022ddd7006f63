"""Gluon kernel of one decode step of latent attention on Hopper, whose warps have roles.

Method: Flash-Decoding over an absorbed latent, as in `attnedit.targets.attention.mla.decode_kernels`; roles as in
FlashAttention-3 (arXiv 2407.08608). One warp has the copy engine bring the cache in chunks of 64 tokens by 64 columns;
four warps turn a tile of 64 tokens into weights; twice four warps weigh half of the latent's columns each. A tile is
read from memory once and from the chip twice, and while one is weighed the next arrives, so that the memory is what
the step waits for: 4.0 of 4.8 TB/s (docs/notebook/2026-11-gpu-decode.md). Chunks lie in shared memory tile after tile,
the rotary slots' first. What the copy engine brings beyond the keys of a split has a weight of 0, so it must be
finite. Imported by `attnedit.targets.attention.mla.decode` only: gluon is not everywhere.
"""

# triton compiles these functions from their source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator,assignment"
# Nor does gluon know all of Python, unpacking within a tuple for one.
# ruff: noqa: B007, RUF005, SIM113

from __future__ import annotations

import torch

try:  # a checkpoint with a copy of this file loads without triton: transformers looks for all other imports at once
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
except ImportError as error:
    raise ImportError("the kernel of latent attention needs triton") from error

COPY = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared  # its name in triton 3.6
LOWEST = gl.constexpr(-1.0e30)
"""Finite, so that a row without any visible key is no infinity less infinity."""
LOG2E = gl.constexpr(1.4426950408889634)
WIDTH = gl.constexpr(64)
"""Columns of a chunk: what one row of the copy engine's swizzle holds in half precision."""


def described(x: torch.Tensor, tokens: int) -> TensorDescriptor:
    """What the copy engine is told of a cache [B, S, .], or of pages [blocks, tokens, .]: rows in boxes of a chunk."""
    box = [tokens, WIDTH.value]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16 if x.dtype == torch.bfloat16 else gl.float16)
    return TensorDescriptor(x, [x.shape[0] * x.stride(0) // x.stride(1), x.shape[2]], [x.stride(1), 1], box, layout)


@gluon.jit
def bring(
    latent,
    slots,
    chunks,
    full,
    empty,
    table,
    page_rows,
    row,
    first,
    last,
    PAGE: gl.constexpr,
    SLOT: gl.constexpr,
    CR: gl.constexpr,
    CS: gl.constexpr,
    TILES: gl.constexpr,
):
    """Copy chunk by chunk, as places become empty."""
    tokens: gl.constexpr = chunks.type.shape[1]
    tile = 0
    for start in range(first, last, tokens):
        base = tile % TILES * (CS + CR)
        phase = tile // TILES & 1
        at = row + start
        if PAGE > 0:
            at = gl.load(table + start // PAGE) * page_rows + start % PAGE
        for j in gl.static_range(CS + CR):
            mbarrier.wait(empty.index(base + j), phase ^ 1)
            mbarrier.expect(full.index(base + j), latent.block_type.nbytes)
            here = chunks.index(base + j)
            if j < CS:
                COPY(slots, [at, SLOT + j * WIDTH], full.index(base + j), here)
            else:
                COPY(latent, [at, (j - CS) * WIDTH], full.index(base + j), here)
        tile += 1


@gluon.jit
def score(
    chunks,
    query,
    shared,
    mask,
    mass,
    heads,
    first,
    last,
    out_row,
    MASK: gl.constexpr,
    CR: gl.constexpr,
    CS: gl.constexpr,
    TILES: gl.constexpr,
):
    """Turn tiles into weights, and say by how much earlier sums shrink; at the end, what sums are to be divided by."""
    full, empty, weights, shrinks, ready, free = shared
    tokens: gl.constexpr = chunks.type.shape[1]
    block: gl.constexpr = query.type.shape[1]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block, 16])
    highest = gl.full([block], LOWEST, gl.float32, gl.SliceLayout(0, mma))
    sums = gl.zeros([tokens, block], gl.float32, mma)
    token = gl.arange(0, tokens, gl.SliceLayout(1, mma))
    tile = 0
    for start in range(first, last, tokens):
        seen = start + token < last
        if MASK != "none":  # first, so that it is there when the logits are
            shown = gl.load(mask + start + token, mask=seen, other=0)
        base = tile % TILES * (CS + CR)
        phase = tile // TILES & 1
        logits = gl.zeros([tokens, block], gl.float32, mma)
        for j in gl.static_range(CS + CR):
            mbarrier.wait(full.index(base + j), phase)
            turned = query.index(j).permute((1, 0))
            logits = warpgroup_mma(chunks.index(base + j), turned, logits, is_async=True)
        logits = warpgroup_mma_wait(0, deps=(logits,))
        for j in gl.static_range(CS):
            mbarrier.arrive(empty.index(base + j))
        if MASK == "bool":
            seen = seen & (shown != 0)
        if MASK == "add":
            logits += shown.to(gl.float32)[:, None]
        logits = gl.where(seen[:, None], logits * LOG2E, float("-inf"))
        higher = gl.maximum(highest, gl.max(logits, 0))
        own = gl.exp2(logits - higher[None, :])
        shrink = gl.exp2(highest - higher)
        sums = sums * shrink[None, :] + own
        highest = higher
        buffer = tile % 2
        mbarrier.wait(free.index(buffer), (tile // 2 & 1) ^ 1)
        weights.index(buffer).store(own.to(weights.dtype))
        shrinks.index(buffer).store(shrink)
        fence_async_shared()
        mbarrier.arrive(ready.index(buffer))
        tile += 1
    total = gl.maximum(gl.sum(sums, 0), 1.0e-30)
    buffer = tile % 2
    mbarrier.wait(free.index(buffer), (tile // 2 & 1) ^ 1)
    shrinks.index(buffer).store(1.0 / total)
    mbarrier.arrive(ready.index(buffer))
    head = gl.arange(0, block, gl.SliceLayout(0, mma))
    gl.store(mass + out_row + head, highest + gl.log2(total), mask=head < heads)


@gluon.jit
def weigh(
    chunks,
    shared,
    context,
    heads,
    first,
    last,
    out_row,
    RANK: gl.constexpr,
    CR: gl.constexpr,
    CS: gl.constexpr,
    TILES: gl.constexpr,
    FIRST: gl.constexpr,  # of every other chunk of the latent: 0 or 1
):
    """Sum weighted tokens, in every other chunk of the latent."""
    full, empty, weights, shrinks, ready, free = shared
    tokens: gl.constexpr = chunks.type.shape[1]
    block: gl.constexpr = weights.type.shape[2]
    mma: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, block, 16])
    own: gl.constexpr = (CR + 1 - FIRST) // 2
    sums = ()
    for j in gl.static_range(own):
        sums = sums + (gl.zeros([WIDTH, block], gl.float32, mma),)
    tile = 0
    for start in range(first, last, tokens):
        buffer = tile % 2
        mbarrier.wait(ready.index(buffer), tile // 2 & 1)
        shrink = shrinks.index(buffer).load(gl.SliceLayout(0, mma))
        base = tile % TILES * (CS + CR) + CS + FIRST
        phase = tile // TILES & 1
        begun = ()
        for j in gl.static_range(own):
            mbarrier.wait(full.index(base + 2 * j), phase)
            turned = chunks.index(base + 2 * j).permute((1, 0))
            begun = begun + (warpgroup_mma(turned, weights.index(buffer), sums[j] * shrink[None, :], is_async=True),)
        sums = ()
        for j in gl.static_range(own):
            sums = sums + (warpgroup_mma_wait(own - 1 - j, deps=(begun[j],)),)
            mbarrier.arrive(empty.index(base + 2 * j))
        mbarrier.arrive(free.index(buffer))
        tile += 1
    buffer = tile % 2
    mbarrier.wait(ready.index(buffer), tile // 2 & 1)
    scale = shrinks.index(buffer).load(gl.SliceLayout(0, mma))
    head = gl.arange(0, block, gl.SliceLayout(0, mma))
    for j in gl.static_range(own):
        column = (2 * j + FIRST) * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(1, mma))
        target = context + (out_row + head).to(gl.int64)[None, :] * RANK + column[:, None]
        mean = (sums[j] * scale[None, :]).to(context.dtype.element_ty)
        gl.store(target, mean, mask=(head < heads)[None, :] & (column < RANK)[:, None])


@gluon.jit
def hold(query, source, row, step, heads, SIZE: gl.constexpr, FROM: gl.constexpr, CHUNKS: gl.constexpr):
    """Put queries [heads, SIZE] into shared memory, chunk by chunk from FROM on, with zeros beyond."""
    block: gl.constexpr = query.type.shape[1]
    flat: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    head = gl.arange(0, block, gl.SliceLayout(1, flat))
    for j in gl.static_range(CHUNKS):
        column = j * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, flat))
        inside = (head < heads)[:, None] & (column < SIZE)[None, :]
        query.index(FROM + j).store(
            gl.load(source + row + head[:, None] * step + column[None, :], mask=inside, other=0.0)
        )


@gluon.jit(do_not_specialize=["keys", "splits", "mask_row", "table_row", "page_rows"])
def attend_split(
    latent,  # descriptor of [B keys, RANK] in boxes of a chunk
    slots,  # descriptor of [B keys, ROPE], likewise
    query,  # [B, H, RANK], scaled
    query_rope,  # [B, H, ROPE], scaled; unused without slots
    mask,  # [B or 1, keys], rows mask_row apart; int8 (0 hides) or floats to add
    length,  # int64 [1]: keys filled so far; int32 [B] with pages
    table,  # int32 [B, pages of a sequence], rows table_row apart; unused unless PAGE
    context,  # [B, splits, H, RANK]: each split's own mean
    mass,  # float32 [B, splits, H]: log2 of each split's sum of exponentials
    keys,
    heads,
    splits,
    mask_row,
    table_row,
    page_rows,  # rows from the beginning of a page to that of the next
    query_batch,
    query_head,
    rope_batch,
    rope_head,
    RANK: gl.constexpr,
    ROPE: gl.constexpr,
    MASK: gl.constexpr,  # "none", "bool" or "add"
    LENGTH: gl.constexpr,
    PAGE: gl.constexpr,  # tokens of a page, a multiple of BLOCK_N; 0 where a sequence's rows follow each other
    SLOT: gl.constexpr,  # column of the slots in their rows
    CR: gl.constexpr,  # chunks of the latent in a tile
    CS: gl.constexpr,  # chunks of the slots
    BLOCK_H: gl.constexpr,
    BLOCK_N: gl.constexpr,
    TILES: gl.constexpr,
    REGISTERS: gl.constexpr,  # of a thread that weighs
):
    """One split of one block of heads of one sequence."""
    dtype: gl.constexpr = latent.dtype
    blocks = gl.cdiv(heads, BLOCK_H)
    batch = (gl.program_id(0) // blocks).to(gl.int64)
    head = gl.program_id(0) % blocks * BLOCK_H
    split = gl.program_id(1)
    filled = keys
    if LENGTH:
        filled = gl.minimum(gl.load(length + batch if PAGE > 0 else length).to(gl.int32), keys)
    share = gl.cdiv(gl.cdiv(filled, splits), BLOCK_N) * BLOCK_N
    first = split * share
    last = gl.minimum(first + share, filled)
    places: gl.constexpr = TILES * (CS + CR)
    chunks = gl.allocate_shared_memory(dtype, [places, BLOCK_N, WIDTH], latent.layout)
    held: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_H, WIDTH], dtype)
    turned = gl.allocate_shared_memory(dtype, [CS + CR, BLOCK_H, WIDTH], held)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_H], dtype)
    weights = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_H], layout)
    shrinks = gl.allocate_shared_memory(gl.float32, [2, BLOCK_H], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    full = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [places, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(places):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=2)  # both that weigh
    left = heads - head
    if ROPE > 0:
        hold(turned, query_rope, batch * rope_batch + head * rope_head, rope_head, left, ROPE, 0, CS)
    hold(turned, query, batch * query_batch + head * query_head, query_head, left, RANK, CS, CR)
    fence_async_shared()
    out_row = (batch.to(gl.int32) * splits + split) * heads + head
    mask += batch * mask_row
    table += batch * table_row
    row = batch.to(gl.int32) * keys
    shared = (full, empty, weights, shrinks, ready, free)
    gl.warp_specialize(
        [
            (score, (chunks, turned, shared, mask, mass, left, first, last, out_row, MASK, CR, CS, TILES)),
            (weigh, (chunks, shared, context, left, first, last, out_row, RANK, CR, CS, TILES, 0)),
            (weigh, (chunks, shared, context, left, first, last, out_row, RANK, CR, CS, TILES, 1)),
            (
                bring,
                (latent, slots, chunks, full, empty, table, page_rows, row, first, last, PAGE, SLOT, CR, CS, TILES),
            ),
        ],
        [4, 4, 1],
        [REGISTERS, REGISTERS, 24],
    )

"""Triton kernel of attention over a paged cache of latents: a program for some queries and heads of one request.

All heads of a token read the same cache, so heads and queries are rows of one product. Imported by
`attnedit.targets.runtime.vllm.paged_latents` only, as triton is not everywhere.
"""

# triton compiles these functions from their source: no annotations but constexpr.
# mypy: disable-error-code="no-untyped-def,untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl

from attnedit.targets.attention.prefill_kernels import LOG2E


@triton.jit(do_not_specialize=["tokens", "tiles"])
def attend_pages(
    query,  # [N, H, w]
    cache,  # [blocks, SIZE, w]
    out,  # [PARTS, N, H, RANK], contiguous; zeros
    sums,  # float32 [PARTS, N, H], contiguous: logarithm of the sum of all weights
    starts,  # int32 [R + 1]
    lengths,  # int32 [R]
    table,  # int32 [R, blocks of a request]
    sinks,  # [H]; unused unless SINKS
    scale,
    softcap,
    window,
    tokens,  # N
    heads,  # H
    tiles,  # programs for the queries of a request
    query_token,
    query_head,
    cache_block,
    cache_row,
    table_row,
    RANK: tl.constexpr,
    SLOTS: tl.constexpr,  # rotary values of a token
    SIZE: tl.constexpr,  # tokens of a block
    PARTS: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Rows are BLOCK_T queries times BLOCK_H heads; the tokens that they see are read in PARTS."""
    request, tile, part = tl.program_id(0) // tiles, tl.program_id(0) % tiles, tl.program_id(2)
    begin, length = tl.load(starts + request), tl.load(lengths + request)
    new = tl.load(starts + request + 1) - begin
    first = tile * BLOCK_T
    if first < new:
        row = tl.arange(0, BLOCK_T * BLOCK_H)
        token, head = first + row // BLOCK_H, tl.program_id(1) * BLOCK_H + row % BLOCK_H
        here = (token < new) & (head < heads)
        position = length - new + token
        feature, near = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_N)
        at = (begin + token).to(tl.int64) * query_token + head * query_head
        q = tl.load(query + at[:, None] + feature, mask=here[:, None] & (feature < RANK), other=0.0)
        if BLOCK_S > 0:
            slot = tl.arange(0, BLOCK_S)
            turned = tl.load(query + at[:, None] + RANK + slot, mask=here[:, None] & (slot < SLOTS), other=0.0)
        # What any of these queries sees, and this part of it.
        low, high = 0, length - new + tl.minimum(first + BLOCK_T, new)
        if WINDOW:
            low = tl.maximum(0, length - new + first - window + 1) // BLOCK_N * BLOCK_N
        share = tl.cdiv(tl.cdiv(high - low, PARTS), BLOCK_N) * BLOCK_N
        low += part * share
        high = tl.minimum(high, low + share)
        highest = tl.full([BLOCK_T * BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T * BLOCK_H], tl.float32)
        if SINKS:  # once
            logit = tl.load(sinks + head, mask=here, other=0.0).to(tl.float32) * LOG2E
            highest = tl.where(part == 0, logit, highest)
            total = tl.where(part == 0, total + 1.0, total)
        mean = tl.zeros([BLOCK_T * BLOCK_H, BLOCK_R], tl.float32)
        for start in range(low, high, BLOCK_N):
            key = start + near
            block = tl.load(table + request * table_row + key // SIZE, mask=key < high, other=0).to(tl.int64)
            where = block * cache_block + (key % SIZE) * cache_row
            latent = tl.load(cache + where[:, None] + feature, mask=(key < high)[:, None] & (feature < RANK), other=0.0)
            latent = latent.to(q.dtype)
            logits = tl.dot(q, tl.trans(latent), input_precision="ieee")
            if BLOCK_S > 0:
                kept = tl.load(
                    cache + where[:, None] + RANK + slot, mask=(key < high)[:, None] & (slot < SLOTS), other=0.0
                )
                logits += tl.dot(turned, tl.trans(kept.to(q.dtype)), input_precision="ieee")
            logits *= scale
            if SOFTCAP:
                # tanh, which has no name in the language
                logits = softcap * (2.0 / (1.0 + tl.exp2(logits * LOG2E * (-2.0 / softcap))) - 1.0)
            shown = (key[None, :] <= position[:, None]) & (key < high)[None, :]
            if WINDOW:
                shown = shown & (key[None, :] > position[:, None] - window)
            logits = tl.where(shown, logits * LOG2E, float("-inf"))
            higher = tl.maximum(highest, tl.max(logits, 1))
            # Nothing seen yet: any finite number in its place leaves all weights zero.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(logits - base[:, None])
            shrink = tl.exp2(highest - base)
            total = total * shrink + tl.sum(weights, 1)
            mean = mean * shrink[:, None] + tl.dot(weights.to(q.dtype), latent, input_precision="ieee")
            highest = higher
        mean = mean / tl.where(total == 0.0, 1.0, total)[:, None]
        place = (part * tokens + begin + token).to(tl.int64) * heads + head
        tl.store(
            out + place[:, None] * RANK + feature,
            mean.to(out.dtype.element_ty),
            mask=here[:, None] & (feature < RANK),
        )
        # `highest` is a power of two's exponent; the sums are compared by exponentials of e.
        tl.store(sums + place, (highest + tl.log2(total)) / LOG2E, mask=here)


@triton.jit
def write_rows(
    rows,  # [N, WIDTH]
    cache,  # [blocks, SIZE, WIDTH]
    places,  # int64 [N]: block times SIZE and place in it; below 0 for what is not kept
    row_step,
    cache_block,
    cache_row,
    WIDTH: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program for each token."""
    token, feature = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    place = tl.load(places + token).to(tl.int64)
    if place >= 0:
        row = tl.load(rows + token * row_step + feature, mask=feature < WIDTH)
        target = cache + (place // SIZE) * cache_block + (place % SIZE) * cache_row
        tl.store(target + feature, row.to(cache.dtype.element_ty), mask=feature < WIDTH)

"""Attention over a paged cache of latents: any rank, any slots, windows, softcap and sink logits.

Every query goes the absorbed way, over the cache, so that prompts in parts and prompts that share a prefix need nothing
of their own. One function in plain torch, and one for a GPU.

Shapes: N new tokens of R requests, one request after the other, H heads, r latent, w what a token has in the cache (the
latent, then its rotary slots).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnedit.targets.attention.triton_support import power

QUERIES = 256
"""Queries of a prompt that attend at a time in plain torch: their logits [H, queries, S] are in memory at once."""
ROWS = 64
"""Queries times heads that a program of the kernel holds: fewer where the latent has more than 512 values."""
KEYS = 32
"""Cached tokens that it reads at a time."""
PARTS = 64
"""At most so many programs share the tokens of a request, each at least `PART` of them."""
PART = 512
PROGRAMS = 512
"""So many keep a GPU busy: more of them only add to what is put together at the end."""


@dataclass
class Pages:
    """Which tokens of the cache belong to which request.

    Attributes:
        starts: int32 [R + 1], first new token of each request, and N.
        lengths: int32 [R], tokens of each request in the cache, the new ones included.
        table: int32 [R, blocks], blocks of each request.
        most_new: of the new tokens of a request.
        longest: of the lengths.
    """

    starts: Tensor
    lengths: Tensor
    table: Tensor
    most_new: int
    longest: int

    @cached_property
    def on_host(self) -> tuple[list[int], list[int]]:
        """`starts` and `lengths`, read once for all layers: the device is waited for."""
        return self.starts.tolist(), self.lengths.tolist()


@dataclass(frozen=True)
class Logits:
    """What becomes of the products of queries and keys.

    Attributes:
        scale: factor.
        window: tokens each query sees, itself included; None is all.
        softcap: they become ``softcap * tanh(logits / softcap)``.
        sinks: [H] logits of a key that carries no value.
    """

    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None


def attend(query: Tensor, cache: Tensor, rank: int, pages: Pages, logits: Logits) -> Tensor:
    """Attend with absorbed queries.

    Args:
        query: [N, H, w].
        cache: [blocks, tokens of a block, w], the new tokens in it.
        rank: r.
        pages: of the batch.
        logits: what becomes of them.

    Returns:
        [N, H, r], in the query's dtype.
    """
    if query.is_cuda:
        return attend_on_gpu(query, cache, rank, pages, logits)
    out = query.new_zeros(*query.shape[:2], rank)
    size, (starts, lengths) = cache.shape[1], pages.on_host
    for request, length in enumerate(lengths):
        begin, end = starts[request : request + 2]
        for first in range(begin, end, QUERIES):
            last = min(first + QUERIES, end)
            seen = length - (end - last)  # tokens up to the last of these queries
            low = 0 if logits.window is None else max(0, seen - (last - first) - logits.window + 1)
            # Blocks that a window has left behind are not this request's any more.
            blocks = pages.table[request, low // size : -(-seen // size)].long()
            start = low // size * size
            rows = cache[blocks].flatten(0, 1)[low - start : seen - start]
            out[first:last] = _attend(query[first:last], rows.to(query.dtype), rank, logits)
    return out


def _attend(query: Tensor, rows: Tensor, rank: int, logits: Logits) -> Tensor:
    """Attend with the last queries [t, H, w] of a sequence to all its rows [S, w]."""
    products = torch.einsum("thc,sc->hts", query, rows).float() * logits.scale
    if logits.softcap is not None:
        products = logits.softcap * torch.tanh(products / logits.softcap)
    new, keys = query.shape[0], rows.shape[0]
    position = torch.arange(keys - new, keys, device=rows.device)[:, None]
    key = torch.arange(keys, device=rows.device)
    shown = key <= position
    if logits.window is not None:
        shown &= key > position - logits.window
    products = products.masked_fill(~shown, float("-inf"))
    if logits.sinks is None:
        weights = products.softmax(dim=-1)
    else:
        sinks = logits.sinks.float()[:, None, None].expand(-1, new, 1)
        weights = torch.cat((products, sinks), dim=-1).softmax(dim=-1)[..., :-1]
    return torch.einsum("hts,sr->thr", weights.to(rows.dtype), rows[:, :rank])


def write(rows: Tensor, cache: Tensor, places: Tensor) -> None:
    """Put new tokens into the cache, in place.

    Args:
        rows: [N, w].
        cache: [blocks, tokens of a block, w].
        places: int64 [N], block times its size and place in it; below 0 for what is not kept.
    """
    if rows.is_cuda:
        write_on_gpu(rows, cache, places)
        return
    kept = places >= 0
    places = places[kept].long()
    cache[places // cache.shape[1], places % cache.shape[1]] = rows[kept].to(cache.dtype)


def write_on_gpu(rows: Tensor, cache: Tensor, places: Tensor) -> None:
    """The same in one launch."""
    from attnedit.targets.runtime.vllm.paged_kernels import write_rows

    (tokens, width), steps = rows.shape, (rows.stride(0), *cache.stride()[:2])
    with torch.cuda.device_of(rows):  # triton launches on the current device
        write_rows[(tokens,)](rows, cache, places, *steps, WIDTH=width, SIZE=cache.shape[1], BLOCK=power(width))


def choose_sizes(requests: int, heads: int, rank: int, slots: int, most_new: int, longest: int) -> dict[str, int]:
    """Return how the kernel's work is cut, as its arguments.

    Args:
        requests: R.
        heads: H.
        rank: r.
        slots: rotary values of a token.
        most_new: new tokens of the request that has most.
        longest: cached tokens of the request that has most.
    """
    block_rank = power(rank)
    rows = min(ROWS, max(16, ROWS * 512 // block_rank))
    # A step's heads share all that is read; the rows of a prompt are queries, too.
    block_heads = min(rows, power(heads)) if most_new == 1 else 16
    # A power of two: each number of parts is a kernel of its own, compiled when it is first needed.
    wanted = min(PARTS, longest // PART, PROGRAMS // (requests * -(-heads // block_heads)))
    parts = 1 << (max(1, wanted).bit_length() - 1)
    return {
        "PARTS": parts if most_new == 1 else 1,
        "BLOCK_R": block_rank,
        "BLOCK_S": power(slots) if slots else 0,
        "BLOCK_T": 1 if most_new == 1 else rows // block_heads,
        "BLOCK_H": block_heads,
        "BLOCK_N": KEYS,
        "num_warps": 8 if block_rank > 512 or (most_new > 1 and block_rank >= 256) else 4,
        "num_stages": 2,
    }


def attend_on_gpu(query: Tensor, cache: Tensor, rank: int, pages: Pages, logits: Logits) -> Tensor:
    """The same by `attnedit.targets.runtime.vllm.paged_kernels`, for which triton is needed."""
    from attnedit.targets.runtime.vllm.paged_kernels import attend_pages

    tokens, heads, width = query.shape
    requests = pages.lengths.shape[0]
    sizes = choose_sizes(requests, heads, rank, width - rank, pages.most_new, pages.longest)
    parts, block_tokens = sizes["PARTS"], sizes["BLOCK_T"]
    tiles = -(-pages.most_new // block_tokens)
    out = query.new_zeros((parts, tokens, heads, rank), dtype=torch.float32 if parts > 1 else query.dtype)
    sums = torch.zeros((parts, tokens, heads), dtype=torch.float32, device=query.device)
    sinks = query if logits.sinks is None else logits.sinks
    with torch.cuda.device_of(query):  # triton launches on the current device
        attend_pages[(requests * tiles, -(-heads // sizes["BLOCK_H"]), parts)](
            query,
            cache,
            out,
            sums,
            pages.starts,
            pages.lengths,
            pages.table,
            sinks,
            logits.scale,
            logits.softcap or 0.0,
            logits.window or 0,
            tokens,
            heads,
            tiles,
            query.stride(0),
            query.stride(1),
            cache.stride(0),
            cache.stride(1),
            pages.table.stride(0),
            RANK=rank,
            SLOTS=width - rank,
            SIZE=cache.shape[1],
            WINDOW=logits.window is not None,
            SOFTCAP=logits.softcap is not None,
            SINKS=logits.sinks is not None,
            **sizes,
        )
    if parts == 1:
        return out[0]
    weights = sums.softmax(dim=0)  # of what each part has seen, over all of it
    return torch.einsum("pth,pthr->thr", weights, out).to(query.dtype)

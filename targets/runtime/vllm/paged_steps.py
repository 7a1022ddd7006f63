"""One new token of each request over a paged cache of latents, by the kernel that Hopper has for contiguous ones.

Shapes: N new tokens of as many requests and padding, R requests, H heads, r latent, w what a token has in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnedit.targets.attention.mla.decode import attend_in_roles, hopper_roles, processors, sum_parts
from attnedit.targets.attention.mla.decode_sizes import Roles, choose_splits
from attnedit.targets.runtime.vllm.paged_latents import Logits, Pages


def roles_for(query: Tensor, cache: Tensor, rank: int, pages: Pages, logits: Logits) -> Roles | None:
    """How the kernel is cut, where it takes a batch: steps with nothing but a softmax, blocks of whole tiles.

    Rows must begin at multiples of 16 bytes, and blocks at whole rows.

    Args:
        query: [N, H, w].
        cache: [blocks, tokens of a block, w].
        rank: r.
        pages: of the batch.
        logits: what becomes of them.
    """
    plain = logits.window is None and logits.softcap is None and logits.sinks is None
    if not query.is_cuda or pages.most_new != 1 or not plain:
        return None
    if query.dtype != cache.dtype or query.element_size() != 2:
        return None
    roles = hopper_roles(query.shape[1], rank, query.shape[2] - rank, query.device)
    row, block = cache.stride(1), cache.stride(0)
    if roles is None or cache.shape[1] % roles.tokens or block % row:
        return None
    aligned = cache.data_ptr() % 16 == 0 and row * cache.element_size() % 16 == 0
    return roles if aligned and cache.shape[0] * (block // row) < 1 << 31 else None


def attend_steps(query: Tensor, cache: Tensor, rank: int, pages: Pages, logits: Logits, roles: Roles) -> Tensor:
    """Attend as `attnedit.targets.runtime.vllm.paged_latents.attend` does.

    What the cache holds behind the tokens of a request, in its last block, must be finite.

    Args:
        query: [N, H, w], as `roles_for` was asked, like the others.
        cache: [blocks, tokens of a block, w].
        rank: r.
        pages: of the batch.
        logits: plain.
        roles: what `roles_for` said.

    Returns:
        [N, H, r]; zeros for padding.
    """
    requests, (heads, width) = pages.lengths.shape[0], query.shape[1:]
    programs = requests * -(-heads // roles.heads)
    splits = choose_splits(programs, pages.longest, roles.resident * processors(query.device), roles.tokens)
    parts = query.new_empty((requests, splits, heads, rank), dtype=torch.float32 if splits > 1 else query.dtype)
    mass = parts.new_empty((requests, splits, heads), dtype=torch.float32)
    scaled = query * logits.scale
    common = {
        "query": scaled,
        "query_rope": scaled[..., rank:],
        "mask": query,
        "length": pages.lengths,
        "table": pages.table,
        "context": parts,
        "mass": mass,
        "keys": pages.longest,
        "heads": heads,
        "splits": splits,
        "mask_row": 0,
        "table_row": pages.table.stride(0),
        "page_rows": cache.stride(0) // cache.stride(1),
        "query_batch": scaled.stride(0),
        "query_head": scaled.stride(1),
        "rope_batch": scaled.stride(0),
        "rope_head": scaled.stride(1),
        "RANK": rank,
        "ROPE": width - rank,
        "MASK": "none",
        "LENGTH": True,
        "PAGE": cache.shape[1],
        "SLOT": rank,
        "BLOCK_H": roles.heads,
        "BLOCK_N": roles.tokens,
    }
    with torch.cuda.device_of(query):  # triton launches on the current device
        attend_in_roles((programs, splits), cache, cache, roles, common)
        found = sum_parts(parts, mass, query.dtype)
    if query.shape[0] == requests:
        return found
    out = query.new_zeros((query.shape[0], heads, rank))
    out[:requests] = found
    return out

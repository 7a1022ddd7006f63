"""Latent attention of one batch over vLLM's paged cache, without vLLM: steps absorbed, prompts with keys and values.

Shapes: N new tokens of R requests, one request after the other, H heads, d query size, v value size, r latent, s rotary
slots, w = r + s what a token has in the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.compiler.graph.masks import causal
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.expanded import attend_expanded
from attnedit.targets.attention.mla.paths import choose_path
from attnedit.targets.attention.prefill import prefills_fused
from attnedit.targets.runtime.vllm.paged_latents import Logits, Pages, attend
from attnedit.targets.runtime.vllm.paged_steps import attend_steps, roles_for

EXPANDED_BYTES = 512 << 20
"""Of a prompt's keys and values, of some heads at a time."""


class Run(NamedTuple):
    """Requests in a row that are computed by one call.

    Attributes:
        first: request.
        end: request after the last.
        expanded: with keys and values of each head; then it is one request.
    """

    first: int
    end: int
    expanded: bool


def runs(new: Sequence[int], lengths: Sequence[int], config: MLAConfig) -> Iterator[Run]:
    """Say how the requests of a batch are computed.

    Args:
        new: tokens of each request.
        lengths: tokens of each in the cache, the new ones included.
        config: of the attention, whose sizes decide.
    """
    begin = 0
    for request, (count, length) in enumerate(zip(new, lengths, strict=True)):
        if choose_path(count, length, config) == "expanded":
            if begin < request:
                yield Run(begin, request, False)
            yield Run(request, request + 1, True)
            begin = request + 1
    if begin < len(new):
        yield Run(begin, len(new), False)


def expands(query: Tensor, config: MLAConfig, sinks: Tensor | None) -> bool:
    """Say whether prompts can go through keys and values: without a mask of all their tokens on a GPU.

    Args:
        query: [N, H, d].
        config: of the attention.
        sinks: [H] logits of a key that carries no value.
    """
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    if config.softcap is not None or sinks is not None or not nope:
        return False
    return not query.is_cuda or prefills_fused(query[None], (), (nope, config.v_head_dim, *([rope] if rope else [])))


def attend_batch(
    query: Tensor,
    turned: Tensor,
    weight: Tensor,
    cache: Tensor,
    pages: Pages,
    config: MLAConfig,
    sinks: Tensor | None = None,
) -> Tensor:
    """Attend with the new tokens of all requests.

    Args:
        query: [N or more, H, d], before rotation and scale; behind the tokens there may be padding.
        turned: [N or more, H, s], what meets the slots.
        weight: [H (nope + v), r], keys and values of each head from the latent.
        cache: [blocks, tokens of a block, w], the new tokens in it.
        pages: of the batch.
        config: of the attention, for these heads.
        sinks: [H] logits of a key that carries no value.

    Returns:
        [N or more, H, v]; zeros for padding.
    """
    logits = Logits(config.scale, config.window, config.softcap, sinks)
    keys, values = weight.unflatten(0, (query.shape[1], -1)).split((config.qk_nope_head_dim, config.v_head_dim), 1)

    def absorbed(pages: Pages, span: slice) -> Tensor:
        # Without rows for keys their product is zero.
        down = torch.einsum("nhd,hdr->nhr", query[span, :, : keys.shape[1]], keys)
        whole, rank = torch.cat((down, turned[span]), dim=-1), config.kv_lora_rank
        roles = roles_for(whole, cache, rank, pages, logits)
        if roles is not None:
            found = attend_steps(whole, cache, rank, pages, logits, roles)
        else:
            found = attend(whole, cache, rank, pages, logits)
        return torch.einsum("nhr,hvr->nhv", found, values)

    if pages.most_new == 1 or not expands(query, config, sinks):
        return absorbed(pages, slice(None))
    starts, lengths = pages.on_host
    new = [end - begin for begin, end in pairwise(starts)]
    out = query.new_zeros((*query.shape[:2], config.v_head_dim))
    for first, end, expanded in runs(new, lengths, config):
        span = slice(starts[first], starts[end])
        if expanded:
            rows = cache[pages.table[first, : -(-lengths[first] // cache.shape[1])].long()]
            rows = rows.flatten(0, 1)[: lengths[first]].to(query.dtype)
            out[span] = attend_prompt(query[span], turned[span], rows, weight, config)
        else:
            part = replace(
                pages,
                starts=pages.starts[first : end + 1] - starts[first],
                lengths=pages.lengths[first:end],
                table=pages.table[first:end],
                most_new=max(new[first:end]),
                longest=max(lengths[first:end]),
            )
            out[span] = absorbed(part, span)
    return out


def attend_prompt(query: Tensor, turned: Tensor, rows: Tensor, weight: Tensor, config: MLAConfig) -> Tensor:
    """Attend with the last tokens of one request to keys and values of all of it.

    Args:
        query: [T, H, d], before rotation and scale.
        turned: [T, H, s].
        rows: [S, w], latents and slots of the request.
        weight: [H (nope + v), r].
        config: of the attention, for these heads.

    Returns:
        [T, H, v].
    """
    length, heads, seen = query.shape[0], query.shape[1], rows.shape[0]
    nope, rope = config.qk_nope_head_dim, config.qk_rope_head_dim
    latent, slots = rows[None].split((config.kv_lora_rank, rope), dim=-1)
    windowed = config.window is not None and config.window < seen
    mask = None
    if not query.is_cuda and (windowed or seen > length):
        mask = causal(length, seen, seen - length, config.window, query.device)
    size = (2 * seen + length) * (nope + rope + config.v_head_dim) * query.element_size()
    block = max(1, min(heads, EXPANDED_BYTES // size))
    parts = []
    for own, rotary, some in zip(
        query.transpose(0, 1)[None].split(block, dim=1),
        turned.transpose(0, 1)[None].split(block, dim=1),
        weight.split(block * (nope + config.v_head_dim)),
        strict=True,
    ):
        part = attend_expanded(
            own,
            rotary if rope else None,
            F.linear(latent, some),
            slots,
            mask,
            config=config,
            sinks=None,
            dropout=0.0,
            in_kernel=query.is_cuda,  # torch's know no window and no past, and vLLM turns its fastest off
            probabilities=_no_probabilities,
        )
        parts.append(part[0])
    return torch.cat(parts, dim=1)


def _no_probabilities(logits: Tensor, mask: Tensor | None, sinks: Tensor | None) -> Tensor:
    raise AssertionError("attention with a softcap or sink logits is computed over the latents")

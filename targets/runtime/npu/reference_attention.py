"""References of fused attention: for inference over a paged cache, and for training.

Shapes: B batch, N query heads, G key/value heads, S queries, K keys, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from attnedit.compiler.errors import AttneditError
from attnedit.targets.runtime.npu.limits import MASK, AttentionCall, attention_refusal

ALL = 2**31 - 1
"""How many tokens before and after a query are seen where nothing else is said."""

_as_half: ContextVar[bool] = ContextVar("attnedit_npu_as_half", default=False)


@contextmanager
def float32_allowed() -> Iterator[None]:
    """Let float32 pass for bfloat16 inside the block, so that graphs can be compared tightly; no kernel takes it."""
    token = _as_half.set(True)
    try:
        yield
    finally:
        _as_half.reset(token)


def infer(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    query_rope: Tensor | None = None,
    key_rope: Tensor | None = None,
    atten_mask: Tensor | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    block_table: Tensor | None = None,
    num_query_heads: int = 1,
    num_key_value_heads: int = 0,
    softmax_scale: float = 1.0,
    pre_tokens: int = ALL,
    next_tokens: int = ALL,
    input_layout: str = "BSH",
    sparse_mode: int = 0,
    block_size: int = 0,
    inner_precise: int = 0,
    return_softmax_lse: bool = False,
    **others: Any,
) -> tuple[Tensor, Tensor]:
    """Compute ``npu_fused_infer_attention_score_v2``.

    Args:
        query: [B, N, S, D].
        key: [B, G, K, D], or pages [blocks, block, G * D] or [blocks, G, block, D].
        value: like `key`.
        query_rope: [B, N, S, 64], the rotary part of latent attention.
        key_rope: pages like `key`'s.
        atten_mask: bool, True where not to attend; [.., 2048, 2048] for sparse modes 2, 3 and 4.
        actual_seq_kvlen: keys of each row; one number is for all.
        block_table: int32 [B, blocks of a row].
        num_query_heads: N.
        num_key_value_heads: G; 0 is N.
        softmax_scale: factor of the logits.
        pre_tokens: keys before a query's own position that it sees, in mode 4.
        next_tokens: keys after it.
        input_layout: "BNSD", the one known here.
        sparse_mode: 0, 1: the mask as it stands; 2: causal from the top left; 3: from the bottom right; 4: a band.
        block_size: tokens per page.
        inner_precise: 2 and 3 give 0 to queries that see no key; else they get NaN here, for the result is undefined.
        return_softmax_lse: whether the logarithm of the softmax's sum is wanted.
        **others: not modelled, so they must be off.

    Returns:
        [B, N, S, D], and float32 [B, N, S, 1] or [0].

    Raises:
        AttneditError: the kernel refuses such a call, or the reference does not know an argument.
    """
    name = "npu_fused_infer_attention_score_v2"
    _refuse_unknown(name, input_layout, others)
    heads, groups = num_query_heads, num_key_value_heads or num_query_heads
    batch, length, size = query.shape[0], query.shape[2], query.shape[3]
    paged = block_table is not None
    value_size = value.shape[-1] // (groups if paged and value.dim() == 3 else 1)
    call = AttentionCall(
        heads,
        groups,
        length,
        size,
        value_size,
        _dtype(query),
        rope=None if query_rope is None else query_rope.shape[-1],
        sparse_mode=sparse_mode,
        mask=None if atten_mask is None else tuple(atten_mask.shape),
        block_size=block_size if paged else 0,
        lengths=actual_seq_kvlen is not None,
    )
    if query.shape[1] != heads:
        raise AttneditError(f"{name}: num_query_heads is {heads}, but query has {query.shape[1]}")
    if refusal := attention_refusal(call):
        raise AttneditError(f"{name}: {refusal}")
    keys, values = (_rows(x, block_table, groups, block_size) for x in (key, value))
    logits = _logits(query, keys)
    if query_rope is not None and key_rope is not None:
        logits = logits + _logits(query_rope, _rows(key_rope, block_table, groups, block_size))
    logits = logits * softmax_scale
    columns = logits.shape[-1]
    if length == 1 and query_rope is None:
        sparse_mode, pre_tokens, next_tokens = 0, ALL, ALL
    hidden = []
    for row in range(batch):
        seen = columns if actual_seq_kvlen is None else int(actual_seq_kvlen[min(row, len(actual_seq_kvlen) - 1)])
        if seen > columns:
            raise AttneditError(f"{name}: row {row} has {seen} keys in a cache for {columns}")
        masked = _hidden(sparse_mode, length, columns, seen, pre_tokens, next_tokens)
        if atten_mask is not None and sparse_mode in (0, 1):
            own = atten_mask.reshape(-1, *atten_mask.shape[-2:]) if atten_mask.dim() > 2 else atten_mask[:, None]
            masked = masked | own[min(row, own.shape[0] - 1)][:length, :columns].bool()
        hidden.append(masked)
    out, lse = _softmax(logits, torch.stack(hidden)[:, None], values, inner_precise >= 2)
    return out.to(query.dtype), lse if return_softmax_lse else lse.new_zeros(0)


def infer_shapes(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """Shapes of `infer`."""
    lse = (*query.shape[:3], 1) if options.get("return_softmax_lse") else (0,)
    groups = options.get("num_key_value_heads") or options.get("num_query_heads", 1)
    packed = options.get("block_table") is not None and value.dim() == 3
    size = value.shape[-1] // (groups if packed else 1)
    return query.new_empty((*query.shape[:3], size)), query.new_empty(lse, dtype=torch.float32)


def train(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = ALL,
    next_tockens: int = ALL,
    inner_precise: int = 0,
    prefix: Sequence[int] | None = None,
    actual_seq_qlen: Sequence[int] | None = None,
    actual_seq_kvlen: Sequence[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
    sink: Tensor | None = None,
    dropout_mask: Tensor | None = None,
    seed: int = 0,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Compute ``npu_fusion_attention`` in layout BNSD, differentiably; arguments as in `infer`, keys not paged.

    Returns:
        Output [B, N, S, Dv], the softmax's largest logit and its sum [B, N, S, 8], an empty tensor, and three zeros.

    Raises:
        AttneditError: the kernel refuses such a call, or the reference does not know an argument.
    """
    name = "npu_fusion_attention"
    known = {"pse": pse, "padding_mask": padding_mask, "prefix": prefix, "sink": sink, "dropout_mask": dropout_mask}
    known |= {"actual_seq_qlen": actual_seq_qlen, "actual_seq_kvlen": actual_seq_kvlen}
    _refuse_unknown(name, input_layout, {**known, "keep_prob": keep_prob != 1.0})
    size, groups = query.shape[-1], key.shape[1]
    if not 1 <= size <= 768 or key.shape[-1] != size or value.shape[-1] > size:
        raise AttneditError(f"{name}: sizes {size}, {key.shape[-1]} and {value.shape[-1]} of query, key and value")
    if head_num != query.shape[1] or head_num > 256 or head_num % groups or value.shape[1] != groups:
        raise AttneditError(f"{name}: {head_num} heads over {groups}")
    if not query.dtype == key.dtype == value.dtype:
        raise AttneditError(f"{name}: query, key and value are {query.dtype}, {key.dtype} and {value.dtype}")
    if sparse_mode not in (0, 1, 2, 3, 4):
        raise AttneditError(f"{name}: the reference does not know sparse_mode {sparse_mode}")
    logits = _logits(query, key) * scale
    length, columns = logits.shape[-2:]
    hidden = torch.zeros((1, 1, length, columns), dtype=torch.bool)
    if atten_mask is not None and sparse_mode >= 2:
        if tuple(atten_mask.shape) != (MASK, MASK):
            raise AttneditError(f"{name}: sparse_mode {sparse_mode} needs a mask of [{MASK}, {MASK}]")
        hidden = hidden | _hidden(sparse_mode, length, columns, columns, pre_tockens, next_tockens)
    elif atten_mask is not None:
        hidden = hidden | atten_mask.bool()
    out, lse = _softmax(logits, hidden.to(logits.device), value, inner_precise == 2)
    most = logits.detach().masked_fill(hidden.to(logits.device), -torch.inf).amax(-1, keepdim=True)
    total = (lse.detach() - most).exp()
    return out.to(query.dtype), most.expand(*most.shape[:3], 8), total.expand_as(most), query.new_empty(0), 0, 0, 0


def _refuse_unknown(name: str, layout: str, others: dict[str, Any]) -> None:
    """Refuse arguments that no reference models."""
    if layout != "BNSD":
        raise AttneditError(f"{name}: the reference does not know layout {layout}")
    for argument, value in others.items():
        if value is not None and value is not False and not (isinstance(value, int) and value == 0):
            raise AttneditError(f"{name}: the reference does not know {argument}")


def _dtype(x: Tensor) -> str:
    """Name of the dtype, as the limits are to see it."""
    return "bfloat16" if x.dtype == torch.float32 and _as_half.get() else str(x.dtype).removeprefix("torch.")


def _rows(cache: Tensor, table: Tensor | None, groups: int, block_size: int) -> Tensor:
    """Keys or values of each row [B, G, K, D], out of pages where they are paged."""
    if table is None:
        return cache
    if table.dim() != 2 or table.dtype != torch.int32:
        raise AttneditError(f"block_table is {table.dtype} {tuple(table.shape)}, not int32 [B, blocks]")
    pages = cache.unflatten(-1, (groups, -1)).transpose(1, 2) if cache.dim() == 3 else cache
    if pages.shape[2] != block_size:
        raise AttneditError(f"block_size is {block_size}, and the pages hold {pages.shape[2]} tokens")
    return pages[table.long()].transpose(1, 2).flatten(2, 3)


def _logits(query: Tensor, key: Tensor) -> Tensor:
    """Products [B, N, S, K] in float32."""
    shared = query.shape[1] // key.shape[1]
    return query.float() @ key.float().repeat_interleave(shared, dim=1).transpose(-1, -2)


def _hidden(mode: int, length: int, columns: int, seen: int, before: int, after: int) -> Tensor:
    """Which keys a row's queries do not see because of their number and the sparse mode, bool [S, K]."""
    query, key = torch.arange(length)[:, None], torch.arange(columns)[None]
    hidden = (key >= seen).expand(length, columns)
    if mode == 2:
        return hidden | (key > query)
    own = query + seen - length  # aligned at the bottom right
    if mode == 3:
        return hidden | (key > own)
    if mode == 4:
        return hidden | (key > own + after) | (key < own - before)
    return hidden


def _softmax(logits: Tensor, hidden: Tensor, value: Tensor, empty_is_zero: bool) -> tuple[Tensor, Tensor]:
    """Attend in float32: [B, N, S, D], and the logarithm of the sum [B, N, S, 1]."""
    logits = logits.masked_fill(hidden, -torch.inf)
    weights = logits.softmax(dim=-1)
    if empty_is_zero:
        weights = weights.nan_to_num(0.0)
    values = value.float().repeat_interleave(logits.shape[1] // value.shape[1], dim=1)
    # What is hidden is not read: it may be NaN.
    values = values.masked_fill(hidden.all(dim=-2).expand(len(values), -1, -1)[..., None], 0.0)
    return weights @ values, logits.logsumexp(dim=-1, keepdim=True)

"""Attention masks in one form."""

from __future__ import annotations

import torch
from torch import Tensor


def causal(
    length: int, keys: int, past: int | Tensor, window: int | None = None, device: torch.device | None = None
) -> Tensor:
    """Mask [1, 1, T, S], True where query t, at position ``past + t``, sees key s.

    Args:
        length: T, queries.
        keys: S.
        past: position of the first query.
        window: keys that a query sees, its own included; None for all before it.
        device: of the mask.
    """
    behind = (torch.arange(length, device=device) + past)[:, None] - torch.arange(keys, device=device)
    visible = behind >= 0
    if window is not None:
        visible = visible & (behind < window)
    return visible[None, None]


HIDDEN = torch.finfo(torch.float32).min / 2
"""Half of the lowest number: a float32 logit added to it stays finite, and a row that sees nothing stays defined."""


def as_bias(visible: Tensor) -> Tensor:
    """Turn a mask, True where to attend, into float32 to add to logits."""
    return (~visible).float() * HIDDEN


def hidden_value(mask: Tensor) -> float:
    """What a mask, bool or floats to add, holds where nothing is seen."""
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min


def shown(mask: Tensor) -> Tensor:
    """Turn a mask of either kind, bool or floats to add, into bool, True where to attend."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def masked(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits with what a mask of either kind hides at the lowest number: a row of -inf only would be 0 / 0."""
    lowest = torch.finfo(logits.dtype).min
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, lowest)
    return (logits + mask.to(logits.dtype)).clamp(min=lowest)


def dense_mask(mask: Tensor | None, hidden: Tensor, keys: int, window: int | None = None) -> Tensor:
    """A mask to add to logits, in the dtype of the hidden states.

    Args:
        mask: as transformers makes them: None (causal), padding [B, S], or [B or 1, 1 or H, T, S], boolean (True:
            attend) or floats to add.
        hidden: [B, T, D], the new tokens.
        keys: S, how many keys there are; the new tokens' come last.
        window: tokens that a query sees, itself included, where the mask is not itself a full one.

    Returns:
        [B or 1, 1 or H, T, S].

    >>> dense_mask(None, torch.zeros(1, 2, 4), 3).eq(0).int().tolist()
    [[[[1, 1, 0], [1, 1, 1]]]]
    """
    lowest = torch.finfo(hidden.dtype).min
    if mask is not None and mask.dim() == 4:
        mask = mask[..., :keys]
        if mask.dtype != torch.bool:
            return mask.to(hidden.dtype).clamp(min=lowest)
        visible = mask
    else:
        length = hidden.shape[1]
        visible = causal(length, keys, keys - length, window, hidden.device)
        if mask is not None:
            visible = visible & mask[:, None, None, -keys:].to(torch.bool)
    nothing = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(visible, nothing, lowest)

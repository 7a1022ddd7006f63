"""Attention masks in one form."""

from __future__ import annotations

import torch
from torch import Tensor


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
        position = torch.arange(keys, device=hidden.device)
        behind = position[keys - length :, None] - position[None, :]
        visible = behind >= 0
        if window is not None:
            visible = visible & (behind < window)
        visible = visible[None, None]
        if mask is not None:
            visible = visible & mask[:, None, None, -keys:].to(torch.bool)
    nothing = torch.zeros((), dtype=hidden.dtype, device=hidden.device)
    return torch.where(visible, nothing, lowest)

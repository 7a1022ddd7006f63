"""Masks of windowed attention, brought to one form.

Shapes: B batch, T new tokens, S keys, H heads, M columns of a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph.masks import hidden_value, shown

__all__ = ["by_query", "last_columns", "real_keys"]


def by_query(mask: Tensor | None, length: int, layer_idx: int) -> Tensor | None:
    """Bring every form of mask to None or [B, 1 or H, T, M], bool or float; M columns, the last for the newest.

    Raises:
        UsageError: the mask has another form.
    """
    if mask is None:
        return None
    if isinstance(mask, Tensor) and mask.dim() == 4:
        return mask
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask.to(torch.bool)[:, None, None].expand(-1, -1, length, -1)
    form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise UsageError(
        f"layer {layer_idx}: attention mask {form} is neither None nor [B, S] nor [B, 1, T, S]; "
        "use attn_implementation 'sdpa' or 'eager'"
    )


def last_columns(mask: Tensor, columns: int, layer_idx: int, longer_cache: bool = False) -> Tensor:
    """Return the last columns of a mask [B, 1 or H, T, M]; a cache with free slots at its end may be longer.

    Raises:
        UsageError: there are fewer columns than keys.
    """
    missing = columns - mask.shape[-1]
    if missing <= 0:
        return mask[..., mask.shape[-1] - columns :]
    if not longer_cache:
        raise UsageError(f"layer {layer_idx}: the attention mask has {mask.shape[-1]} columns for {columns} keys")
    return F.pad(mask, (0, missing), value=hidden_value(mask))


def real_keys(mask: Tensor) -> Tensor:
    """Say which keys of a mask [B, 1 or H, T, S] some query sees, bool [B, S]: all but padding and the future."""
    return shown(mask).any(dim=1).any(dim=1)

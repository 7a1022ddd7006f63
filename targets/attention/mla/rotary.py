"""Turning rotary slots: tables of cos and sin for the slots of a layer, and the turn itself."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rotate", "slot_table"]


def slot_table(table: Tensor, columns: tuple[int, ...], like: Tensor) -> Tensor:
    """Columns of cos or sin, one per slot, [.., T, s] in the dtype of what they turn."""
    step = columns[1] - columns[0] if len(columns) > 1 else 1
    stop = columns[0] + step * len(columns)
    if step > 0 and columns == tuple(range(columns[0], stop, step)):
        picked = table[..., columns[0] : columns[-1] + 1 : step]
    else:
        picked = table.index_select(-1, _index(columns, table.device))
    return picked.to(like.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [.., 2 s], real parts first, by cos and sin [.., s]."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)


_INDICES: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def _index(columns: tuple[int, ...], device: torch.device) -> Tensor:
    """Index tensor of the columns, made once per device.

    Not a buffer: a non-persistent one is lost by loading through the meta device, a persistent one would stand in
    every checkpoint.
    """
    key = (columns, device)
    if key in _INDICES and not torch.compiler.is_compiling():
        return _INDICES[key]
    index = torch.tensor(columns, dtype=torch.long, device=device)
    # Fake tensors of a tracer must not outlive it.
    if type(index) is Tensor and not torch.compiler.is_compiling():
        _INDICES[key] = index
    return index

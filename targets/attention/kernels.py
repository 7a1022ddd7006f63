"""Fused attention that a runtime brings for a kind of device, in place of torch's own.

Shapes: B batch, H heads, G key/value heads, T queries, S keys, d query and key size, dv value size, m virtual keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Virtual: TypeAlias = Sequence[tuple[Tensor, Tensor | None]]
"""Keys that are no tokens and that every query sees: logits [H], and values [G, dv]; None is 0."""


class Kernel(Protocol):
    """Fused attention, differentiable."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """Attend with queries [B, H, T, d] to keys [B, G, S, d]; returns [B, H, T, dv].

        The mask is True where to attend, bool [B or 1, 1 or H, T, S]; None is causal, aligned at the last key.
        """
        ...


# Not thread-local: what is computed anew in a backward pass runs in autograd's threads.
_KERNELS: dict[str, Kernel] = {}


@contextmanager
def using(device_type: str, kernel: Kernel) -> Iterator[None]:
    """Inside the block attention on such devices is computed by `kernel`."""
    before = _KERNELS.get(device_type)
    _KERNELS[device_type] = kernel
    try:
        yield
    finally:
        if before is None:
            del _KERNELS[device_type]
        else:
            _KERNELS[device_type] = before


def kernel_for(x: Tensor, mask: Tensor | None = None) -> Kernel | None:
    """The kernel for the device of a tensor; None where torch's own is to be used.

    A mask of floats that differs by head is a bias, which kernels do not add.
    """
    bias = mask is not None and mask.dtype != torch.bool and mask.shape[1] > 1
    return None if bias else _KERNELS.get(x.device.type)


def as_virtual(sinks: Tensor | None, logit: Tensor | None, value: Tensor | None) -> Virtual:
    """Sinks of the source [H], and a sink of the new attention [H] that may have a value [G, dv], where there are."""
    given: Virtual = () if sinks is None else ((sinks, None),)
    return given if logit is None else (*given, (logit, value))


def with_virtual_keys(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    scale: float,
    virtual: Virtual,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Append keys that are mere logits, so that any attention computes them, gradients included.

    Query and key get one component more for each: the logit over the scale in the query, 1 in its key, 0 elsewhere.

    Args:
        query: [B, H, T, d].
        key: [B, G, S, d].
        value: [B, G, S, dv].
        mask: bool [B or 1, 1 or H, T, S], True where to attend.
        scale: of the logits.
        virtual: such keys.

    Returns:
        Query [B, H, T, d + m], key [B, G, S + m, d + m], value [B, G, S + m, dv], mask [.., T, S + m].
    """
    batch, heads, length, _ = query.shape
    count = len(virtual)
    logits = torch.stack([logit for logit, _ in virtual], dim=-1)[None, :, None] / scale
    query = torch.cat((query, logits.expand(batch, heads, length, count).to(query.dtype)), dim=-1)
    unit = torch.eye(count, dtype=key.dtype, device=key.device).expand(batch, key.shape[1], count, count)
    key = torch.cat((F.pad(key, (0, count)), F.pad(unit, (key.shape[-1], 0))), dim=2)
    rows = [value.new_zeros(value.shape[1], value.shape[3]) if own is None else own for _, own in virtual]
    more = torch.stack([row.to(value.dtype) for row in rows], dim=1)
    value = torch.cat((value, more.expand(batch, -1, -1, -1)), dim=2)
    return query, key, value, F.pad(mask, (0, count), value=True)

"""Where triton kernels run, and the sizes that they take."""

from __future__ import annotations

import functools
import os

import torch
from torch import Tensor

__all__ = ["learns", "power", "runs_on"]


def learns(*tensors: Tensor | None) -> bool:
    """Whether one of these wants a gradient, which no kernel here computes."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def power(size: int) -> int:
    """The least power of two that holds a size and that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


@functools.cache
def runs_on(device: torch.device) -> bool:
    """Whether triton kernels run there: a GPU of NVIDIA's since Hopper, or any processor under triton's interpreter."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"

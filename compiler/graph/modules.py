"""Copies of module trees."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


def share_copy(model: ModelT) -> ModelT:
    """Copy the module tree, its configuration and its hooks; parameters and buffers keep the source's memory.

    They are tensor objects of their own, though: moving, casting or freezing the copy leaves the source alone. Only
    writing into one of them in place, as an optimiser does, reaches the source.

    Args:
        model: any module; left as it was.

    Returns:
        A model whose modules can be replaced without the source noticing, at no cost in memory.
    """
    memo: dict[int, Any] = {id(tensor): _alias(tensor) for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, memo)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """Return another tensor object on the same memory; tensors of unknown kinds are shared themselves."""
    if type(tensor) is nn.Parameter and type(tensor.data) is torch.Tensor:
        alias: torch.Tensor = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
    elif type(tensor) is torch.Tensor:
        alias = tensor.detach()
    else:
        return tensor
    # transformers marks tensors it has initialised.
    alias.__dict__.update(tensor.__dict__)
    return alias

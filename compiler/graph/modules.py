"""Module trees: copies, and the modes of their modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
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


def evaluating(model: nn.Module) -> dict[str, bool]:
    """Put a model into evaluation mode: no dropout, no gradient checkpointing; its modes before, for `set_modes`."""
    modes = {name: module.training for name, module in model.named_modules()}
    model.eval()
    return modes


def set_modes(model: nn.Module, modes: dict[str, bool]) -> None:
    """Training or evaluation as it was for every module; new modules take after what they are in."""
    for name, module in model.named_modules():  # parents come first
        if name in modes:
            module.train(modes[name])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """`evaluating` inside the block; every module's mode is as it was afterwards."""
    modes = evaluating(model)
    try:
        yield
    finally:
        set_modes(model, modes)

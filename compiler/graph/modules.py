"""Module trees: copies, and the modes of their modules."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn

from attnedit.compiler.compatibility.torch_names import forward_hooks
from attnedit.compiler.compatibility.transformers_names import ATTENTION_FIELD

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


def shadow(
    module: nn.Module, implementation: str, device: str, dtype: torch.dtype, seed: int | None = None
) -> nn.Module:
    """A copy of `module` that shares no storage with it and whose attention implementation is `implementation`.

    Args:
        module: any attention module.
        implementation: for the copy of its configuration; the module's own is left alone.
        device: "meta", or where parameters are made.
        dtype: of the floating parameters and buffers.
        seed: for random parameters; None for empty ones.
    """
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        floating = tensor.is_floating_point()
        replacement: torch.Tensor
        if generator is None:
            replacement = torch.empty_like(tensor, device=device, dtype=dtype if floating else tensor.dtype)
        elif floating and (isinstance(tensor, nn.Parameter) or tensor.is_meta):
            # Variance 1/fan_in keeps activations near 1, vectors near 1 keep norms from vanishing.
            spread = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
            replacement = torch.empty(tensor.shape, dtype=dtype).uniform_(-1.7, 1.7, generator=generator) * spread
        else:
            replacement = tensor.detach().to(device=device, dtype=dtype if floating else tensor.dtype, copy=True)
        if isinstance(tensor, nn.Parameter):
            replacement = nn.Parameter(replacement, requires_grad=False)
        memo[id(tensor)] = replacement
    for child in module.modules():
        config = getattr(child, "config", None)
        if config is not None and id(config) not in memo:
            twin = copy.copy(config)
            if hasattr(twin, ATTENTION_FIELD):
                setattr(twin, ATTENTION_FIELD, implementation)
            memo[id(config)] = twin
    hooks = {id(hook): hook for child in module.modules() for hook in forward_hooks(child)}
    memo.update(hooks)
    return copy.deepcopy(module, memo).eval()


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


def lists_around(model: nn.Module, name: str) -> Iterator[tuple[str, nn.ModuleList]]:
    """The module lists that the module of a name lies in, outermost first, by their names."""
    parts = name.split(".")
    for end in range(1, len(parts)):
        prefix = ".".join(parts[:end])
        container = model.get_submodule(prefix)
        if isinstance(container, nn.ModuleList):
            yield prefix, container

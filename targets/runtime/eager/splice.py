"""Put rewritten attention graphs into a live transformers model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from attnedit.compiler.errors import UsageError

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


def splice(model: nn.Module, graphs: Mapping[str, nn.Module]) -> None:
    """Put each graph in place of the attention module of its name, in place.

    Whatever the replaced module had and the graph does not use is gone, from ``state_dict`` too. Plain attributes
    (``layer_idx``, ``is_sliding``, ``config``) are carried over, since decoder layers read them.

    Args:
        model: the live model.
        graphs: by module name, such as "model.layers.0.self_attn".

    Raises:
        UsageError: the model has no module of that name.
    """
    for name, graph in graphs.items():
        try:
            replaced = model.get_submodule(name)
        except AttributeError as error:
            raise UsageError(f"{type(model).__name__} has no module {name!r} to replace") from error
        for attribute, value in vars(replaced).items():
            if not attribute.startswith("_") and not hasattr(graph, attribute):
                setattr(graph, attribute, value)
        graph.train(replaced.training)
        model.set_submodule(name, graph)

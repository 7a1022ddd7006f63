"""The part of a remote-code checkpoint that is the same for every model: attention put in place as a model is built.

This file and those that it imports from attnedit are copied into the checkpoint (`attnedit.targets.runtime.hf.remote`),
so they need nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.caches import cache_parameter
from attnedit.targets.attention.module import AttentionModule
from attnedit.targets.runtime.eager.splice import splice


class GraphAttention(nn.Module):
    """Base of the attention modules whose forward is a printed graph.

    Args:
        source: the source's attention module, whose parts are used.
        new: the new part.

    Attributes:
        kind: name of the new part, in configurations too.
        module: its class.
        parts: what the forward uses of the source: modules and parameters by name.
        tables: shape and dtype of the other tensors that it reads, by name; their values are in the checkpoint, and
            loading in another dtype leaves theirs as it is.
    """

    kind: ClassVar[str]
    module: ClassVar[type[AttentionModule]]
    parts: ClassVar[tuple[str, ...]] = ()
    tables: ClassVar[Mapping[str, tuple[tuple[int, ...], str]]] = {}

    def __init__(self, source: nn.Module, new: nn.Module) -> None:
        super().__init__()
        for name in self.parts:
            place, last = self._place(name)
            found: Any = source
            for step in name.split("."):
                found = getattr(found, step)
            setattr(place, last, found)
        for name, (shape, dtype) in self.tables.items():
            place, last = self._place(name)
            place.register_buffer(last, torch.empty(shape, dtype=getattr(torch, dtype)))
        self.add_module(self.kind, new)
        # The transformers that printed the graph may have called the cache otherwise than the one that runs it.
        theirs, ours = cache_parameter(source), cache_parameter(self)
        if theirs != ours:
            self.register_forward_pre_hook(partial(_renamed, {theirs: ours}), with_kwargs=True)

    def _place(self, name: str) -> tuple[nn.Module, str]:
        """The module that holds what has a name, made where there is none, and the last part of the name."""
        *path, last = name.split(".")
        place: nn.Module = self
        for step in path:
            if not hasattr(place, step):
                place.add_module(step, nn.Module())
            place = getattr(place, step)
        return place, last


def _renamed(
    names: Mapping[Any, Any], _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Rename keyword arguments of a call."""
    return args, {names.get(name, name): value for name, value in kwargs.items()}


def put_attention_in(model: PreTrainedModel, classes: Mapping[str, type[GraphAttention]]) -> None:
    """Replace the attention modules that a model's configuration names, their weights yet to be loaded.

    Classes are by the name of the module that they replace.
    """
    record: Any = model.config
    new = {}
    for name, cls in classes.items():
        values = dict(record.attnedit["sites"][name])
        values.pop("kind", None)
        new[name] = cls(model.get_submodule(name), cls.module(cls.module.config_class.from_dict(values)))
    splice(model, new)

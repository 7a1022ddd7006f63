"""The part of a remote-code checkpoint that is the same for every model: attention put in place as a model is built.

This file and those that it imports from attnedit are copied into the checkpoint (`attnedit.targets.runtime.hf.remote`),
so they need nothing else of ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel

from attnedit.targets.attention.config import GateSWAConfig, MLAConfig
from attnedit.targets.attention.gateswa import GateSWA
from attnedit.targets.attention.mla import MLA
from attnedit.targets.runtime.eager.splice import splice

MODULES: dict[str, Any] = {"mla": (MLAConfig, MLA), "gateswa": (GateSWAConfig, GateSWA)}


class GraphAttention(nn.Module):
    """Base of the attention modules whose forward is a printed graph.

    Args:
        source: the source's attention module, whose parts are used.
        kind: name of the new part.
        new: that part.

    Attributes:
        parts: what the forward uses of the source: modules and parameters by name.
    """

    parts: ClassVar[tuple[str, ...]] = ()

    def __init__(self, source: nn.Module, kind: str, new: nn.Module) -> None:
        super().__init__()
        for name in self.parts:
            *path, last = name.split(".")
            place: nn.Module = self
            found: Any = source
            for step in path:
                if not hasattr(place, step):
                    place.add_module(step, nn.Module())
                place, found = getattr(place, step), getattr(found, step)
            setattr(place, last, getattr(found, last))
        self.add_module(kind, new)


def put_attention_in(model: PreTrainedModel, classes: Mapping[str, type[GraphAttention]]) -> None:
    """Replace the attention modules that a model's configuration names, their weights yet to be loaded.

    Args:
        model: just built as the source.
        classes: of the new modules, by name of the replaced ones.
    """
    record: Any = model.config
    new = {}
    for name, cls in classes.items():
        values = dict(record.attnedit["sites"][name])
        kind = values.pop("kind", "mla")
        config_class, module_class = MODULES[kind]
        new[name] = cls(model.get_submodule(name), kind, module_class(config_class.from_dict(values)))
    splice(model, new)

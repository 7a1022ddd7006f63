"""What there is to say of one kind of attention: how it is named, built, counted and lowered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.cost import AttentionCost


@dataclass(frozen=True, eq=False)
class AttentionKind:
    """One kind of attention.

    Attributes:
        name: in config.json, and of the child module in the graph of a rewritten layer.
        title: what people call it, in messages and on model cards.
        config: its configuration class.
        graph: builds the graph of one attention module with the new module in it, ``graph(model, site, config)``;
            see `attnedit.targets.attention.site_graph.replace_attention`.
        cost: what a configuration costs (`attnedit.targets.attention.cost`); None where nobody can say.
        figures: fields and properties of the configuration that a report shows for each layer.
        lowerings: what a runtime needs of the kind, by the runtime's name, as ``module:name``. "onnx" and "npu": the
            class that takes the module's place, made from the module; without one they trace the module, if they can.
            "gguf": a function that brings a model into a `attnedit.targets.runtime.gguf.form.Form`; "vllm": a
            `attnedit.targets.runtime.vllm.served.Served`; "engines": an `attnedit.targets.runtime.engines.Taken` by
            engine. Without one these refuse the kind.
        profiles: of checkpoints that classes of transformers load, by name: ``module:name`` of a
            `attnedit.targets.runtime.hf.profiles.Profile`.
        cache_layer: puts a layer of its own into a cache, as the module's ``bind_cache`` does, where there is no module
            yet: ``cache_layer(cache, config)``.
    """

    name: str
    title: str
    config: type[SiteConfig]
    graph: Callable[[nn.Module, AttentionSite, Any], fx.GraphModule]
    cost: Callable[[Any], AttentionCost] | None = None
    figures: tuple[str, ...] = ()
    lowerings: Mapping[str, str] = field(default_factory=dict)
    profiles: Mapping[str, str] = field(default_factory=dict)
    cache_layer: Callable[[Any, Any], object] | None = None

    def lowering(self, runtime: str) -> Any:
        """What a runtime needs of the kind; None where there is none."""
        return _found(self.lowerings.get(runtime))

    def profile(self, name: str) -> Any:
        """The profile of checkpoints of that name; None where it is none of this kind's."""
        return _found(self.profiles.get(name))

    def figures_of(self, config: SiteConfig) -> dict[str, Any]:
        """What a report shows of a configuration, by name."""
        return {name: getattr(config, name) for name in self.figures}


def _found(place: str | None) -> Any:
    """The object at ``module:name``."""
    if place is None:
        return None
    module, _, name = place.partition(":")
    return getattr(import_module(module), name)

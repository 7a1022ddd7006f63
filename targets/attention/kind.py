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


@dataclass(frozen=True)
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
        lowerings: by runtime ("onnx", "npu"), ``module:name`` of the class that takes the module's place in an export;
            made from the module. A runtime without one traces the module itself, if it can.
    """

    name: str
    title: str
    config: type[SiteConfig]
    graph: Callable[[nn.Module, AttentionSite, Any], fx.GraphModule]
    cost: Callable[[Any], AttentionCost] | None = None
    figures: tuple[str, ...] = ()
    lowerings: Mapping[str, str] = field(default_factory=dict)

    def lowering(self, runtime: str) -> Any:
        """The class that takes the module's place in exports to a runtime; None where there is none."""
        if runtime not in self.lowerings:
            return None
        module, _, name = self.lowerings[runtime].partition(":")
        return getattr(import_module(module), name)

    def figures_of(self, config: SiteConfig) -> dict[str, Any]:
        """What a report shows of a configuration, by name."""
        return {name: getattr(config, name) for name in self.figures}

"""The kinds of attention that a rewritten layer can have: how each is named, built, counted and lowered.

Ours are in `KINDS`. A package adds one by registering, under the entry points `attnedit.targets`, a target whose kind
has the entry point's name; a saved result names the kind, and never a module.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.rewriting.registry import TARGETS, load, registered
from attnedit.targets.attention.config import GateSWAConfig, MLAConfig, SiteConfig
from attnedit.targets.attention.cost import AttentionCost, gateswa_cost, mla_cost
from attnedit.targets.attention.gateswa_graph import GATESWA_MODULE, gateswa_graph
from attnedit.targets.attention.mla_graph import MLA_MODULE, mla_graph
from attnedit.targets.attention.rewritten import KV_CACHE_MODULE, RewrittenConfig, rewritten_graph

_RUNTIME = "attnedit.targets.runtime"


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


KINDS = {
    kind.name: kind
    for kind in (
        AttentionKind(
            MLA_MODULE,
            "multi-head latent attention (MLA)",
            MLAConfig,
            mla_graph,
            lambda config: mla_cost(config, config.input_size),
            figures=("kv_lora_rank", "qk_rope_head_dim"),
            lowerings={
                "onnx": f"{_RUNTIME}.onnx.attention:LatentAttention",
                "npu": f"{_RUNTIME}.npu.latent:LatentAttention",
            },
        ),
        AttentionKind(
            GATESWA_MODULE,
            "gated sliding-window attention (GateSWA)",
            GateSWAConfig,
            gateswa_graph,
            gateswa_cost,
            figures=("sliding_window",),
            lowerings={
                "onnx": f"{_RUNTIME}.onnx.attention:WindowAttention",
                "npu": f"{_RUNTIME}.npu.attention:WindowAttention",
            },
        ),
        AttentionKind(KV_CACHE_MODULE, "rewritten attention", RewrittenConfig, rewritten_graph),
    )
}
_OTHERS: dict[str, AttentionKind] = {}
"""Of other packages, that were used so far."""


def use_kind(kind: AttentionKind) -> AttentionKind:
    """Make a kind known for as long as the process lives; its name must be its own.

    Raises:
        UsageError: another kind has the name.
    """
    known = KINDS.get(kind.name) or _OTHERS.setdefault(kind.name, kind)
    if known.config is not kind.config:
        raise UsageError(f"there is an attention of kind {kind.name!r} already ({known.title}); rename yours")
    return known


def find_kind(name: str) -> AttentionKind | None:
    """The kind of a name, ours or of a package that registers it; None where nobody does.

    Raises:
        UsageError: the package cannot be imported, or what it registers is of another kind.
    """
    if name in KINDS or name in _OTHERS:
        return KINDS.get(name) or _OTHERS[name]
    point = registered(TARGETS, dict.fromkeys(KINDS, "")).get(name)
    if point is None:
        return None
    kind = getattr(load(point, "target"), "kind", None)
    # Others are made of rewrites.
    return use_kind(kind) if isinstance(kind, AttentionKind) and kind.name == name else None


def kind_of(config: SiteConfig) -> AttentionKind:
    """Return the kind that a configuration describes.

    Raises:
        UsageError: no kind that is known has such configurations.
    """
    found = next((kind for kind in (*KINDS.values(), *_OTHERS.values()) if type(config) is kind.config), None)
    if found is None:
        raise UsageError(f"{type(config).__name__} belongs to no kind of attention that is known here")
    return found


def config_to_dict(config: SiteConfig) -> dict[str, Any]:
    """Return the fields as JSON values, and the name of the kind as "kind"."""
    return {"kind": kind_of(config).name, **config.to_dict()}


def config_from_dict(values: Mapping[str, Any]) -> SiteConfig:
    """Read what `config_to_dict` wrote.

    Raises:
        UsageError: nobody knows the kind, this version does not know a field, or a field is missing.
    """
    rest = dict(values)
    # The first files knew latent attention only, and did not say so.
    name = rest.pop("kind", MLA_MODULE)
    kind = find_kind(str(name))
    if kind is None:
        raise UsageError(
            f"attention of kind {name!r} is not known to this version (it knows {', '.join(KINDS)}); install the "
            f"package that registers it under the entry points {TARGETS}"
        )
    return kind.config.from_dict(rest)


def config_of(graph: nn.Module) -> SiteConfig:
    """Configuration of the new attention in a rewritten graph."""
    found = next(config for _, config in configs_in(graph))
    return found


def configs_in(graph: nn.Module) -> list[tuple[str, SiteConfig]]:
    """The children of a graph that are attention of some kind: names and configurations."""
    children = ((name, getattr(child, "config", None)) for name, child in graph.named_children())
    return [(name, config) for name, config in children if isinstance(config, SiteConfig)]

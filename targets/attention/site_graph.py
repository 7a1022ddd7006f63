"""Attention replaced in the graph of one attention module: what all targets have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.caches import CACHE_NAMES, known_cache
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.graph import provenance
from attnedit.compiler.graph.spec import verify
from attnedit.compiler.graph.surgery import prune, with_graph

_ANCHOR_ARGUMENTS = ("q", "k", "v", "mask", "scale", "softcap", "sinks", "window", "layer")


@dataclass(frozen=True)
class AnchorCall:
    """The attention of a site as it stands in a graph.

    Attributes:
        graph: the graph that is edited; new nodes go before the anchor.
        node: a node by its name.
        arguments: the anchor's arguments by name (q, k, v, mask, scale, softcap, sinks, window, layer).
        cache: the cache that the module is given, once it is known to be one (`known_cache`).
    """

    graph: fx.Graph
    node: Callable[[str], fx.Node]
    arguments: dict[str, Any]
    cache: fx.Node


def replace_attention(
    model: nn.Module,
    site: AttentionSite,
    name: str,
    module: nn.Module,
    arguments: Callable[[AnchorCall], tuple[Any, ...]],
    output_projection: nn.Module | None = None,
    others: Mapping[str, nn.Module] | None = None,
) -> fx.GraphModule:
    """Build the graph of one attention module with its attention replaced by one call of a new module.

    Args:
        model: the live model that ``site`` was captured from, or one of the same shape.
        site: the attention site.
        name: of the new module in the graph; provenance of the new nodes is "attnedit." and this name.
        module: the new module (`weights_like` says in which dtype, on which device); it returns [B, T, H, dv].
        arguments: makes the arguments of its call; may add nodes.
        output_projection: a module to use in place of the source's, with parameters of the same names and shapes.
        others: modules by name that come first: in place of the source's, or for nodes that ``arguments`` adds.

    Returns:
        A GraphModule with the signature of the source's attention module. Parts that nothing uses any more are gone.

    Raises:
        UsageError: ``output_projection`` does not fit the site.
        CaptureError: the attention module is not given the cache, or the graph is none any more.
    """
    root = graph_module(model, site)
    for other, replacement in {name: module, **(others or {})}.items():
        root.set_submodule(other, replacement)
    projection = root.get_submodule(site.o_proj.module)
    if output_projection is not None:
        _check_same_parameters(site, projection, output_projection)
        root.set_submodule(site.o_proj.module, output_projection)
    graph = copy.deepcopy(root.graph)
    placed = _rewrite(graph, site, name, arguments)
    prune(graph)
    verify(graph, f"attnedit.{name}", root=root, anchored=False, loose=site.mask, placed=placed)
    result = with_graph(root, graph, f"{type(module).__name__}{type(root).__name__}")
    # For the loader, which empties what no checkpoint holds (`attnedit.targets.runtime.eager.classes`).
    tables = {name: site.constants[name] for name, _ in result.named_buffers() if name in site.constants}
    object.__setattr__(result, "tables", tables)
    result.train(root.training)
    return result


def weights_like(model: nn.Module, site: AttentionSite) -> dict[str, Any]:
    """Device and dtype for the weights of a site's new module.

    Args:
        model: the live model that ``site`` was captured from.
        site: the attention site.

    Returns:
        Those of its output projection, as keyword arguments of a module.
    """
    like = next(model.get_submodule(f"{site.name}.{site.o_proj.module}").parameters())
    return {"device": like.device, "dtype": like.dtype}


def anchor_arguments(site: AttentionSite) -> dict[str, Any]:
    """Return the arguments of the site's anchor by name: nodes of ``site.graph`` and constants."""
    return _named(site.node(site.anchor))


def check_facts(site: AttentionSite, config: Any, expected: dict[str, Any]) -> None:
    """Compare a configuration with the facts of a site.

    Raises:
        UsageError: one differs.
    """
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise UsageError(f"{site.name}: the configuration has {name}={getattr(config, name)}, the site {value}")


def _named(anchor: fx.Node) -> dict[str, Any]:
    return {**dict(zip(_ANCHOR_ARGUMENTS, anchor.args, strict=False)), **anchor.kwargs}


def _rewrite(
    graph: fx.Graph, site: AttentionSite, name: str, arguments: Callable[[AnchorCall], tuple[Any, ...]]
) -> set[fx.Node]:
    nodes = {node.name: node for node in graph.nodes}
    anchor = nodes[site.anchor]
    cache = checked_cache(graph, site)
    with graph.inserting_before(anchor):
        call = AnchorCall(graph, nodes.__getitem__, _named(anchor), cache)
        node = graph.call_module(name, arguments(call))
    fresh = set(graph.nodes) - {*nodes.values(), node}
    provenance.replace(anchor, node, f"attnedit.{name}", fresh)
    return {*fresh, node}


def checked_cache(graph: fx.Graph, site: AttentionSite) -> fx.Node:
    """Add the node that takes the cache from the graph's arguments, and refuses what is none (`known_cache`).

    Raises:
        CaptureError: no argument is a cache.
    """
    arguments = {str(node.target): node for node in graph.nodes if node.op == "placeholder"}
    name = next((name for name in CACHE_NAMES if name in arguments), None)
    if name is None:
        raise CaptureError(
            f"{site.name}: its forward takes no cache (looked for {', '.join(CACHE_NAMES)}) that could become smaller"
        )
    others = [node for target, node in arguments.items() if target.startswith("**")]
    with graph.inserting_after(list(arguments.values())[-1]):
        return graph.call_function(known_cache, (arguments[name], *others))


def _check_same_parameters(site: AttentionSite, old: nn.Module, new: nn.Module) -> None:
    """A loader rebuilds the source's module, so what replaces it must have the same keys."""
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in (old, new)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{site.name}.{site.o_proj.module}: the replacement has parameters {shapes[1]}, the source {shapes[0]}"
        )

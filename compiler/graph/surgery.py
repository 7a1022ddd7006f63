"""Graphs cut off at a node, nodes in place of others, and other graphs over the parts of a module."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import fx

from attnedit.compiler.compatibility.torch_names import own_buffers, temporary_buffers
from attnedit.compiler.graph.dataflow import anchors
from attnedit.compiler.graph.fused import fused_attention


def prune(graph: fx.Graph) -> None:
    """Remove nodes nothing uses; every op of an exported inference graph is free of side effects."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Put a node of the same value in place of another, which goes."""
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def cut(root: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """The graph cut off at some of its nodes: forward returns their values as a tuple.

    Attention in it is computed by a fused kernel where one can, so that long windows need no logits in memory.
    """
    graph: fx.Graph = copy.deepcopy(root.graph)
    nodes = {node.name: node for node in graph.nodes}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(nodes[name] for name in names),)
    prune(graph)
    for anchor in anchors(graph):
        anchor.target = fused_attention
    return with_graph(root, graph)


def with_graph(root: fx.GraphModule, graph: fx.Graph, class_name: str | None = None) -> fx.GraphModule:
    """A module that runs another graph on the parts of `root`; it takes along only those that the graph uses."""
    result = fx.GraphModule(root, graph, class_name=class_name or type(root).__name__)
    for path, part in result.named_modules():
        known = temporary_buffers(root.get_submodule(path))  # a new one saves all
        temporary_buffers(part).update(known & set(own_buffers(part)))
    return result

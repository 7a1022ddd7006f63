"""A graph as text: one node a line, then the shapes of everything it holds."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

from torch import fx

from attnedit.compiler.compatibility.torch_names import OpOverload


def as_text(module: fx.GraphModule) -> str:
    """The text of a graph; equal graphs give equal texts, whatever the tracer called their nodes."""
    names = node_names(module.graph)
    lines = [_node(node, names) for node in module.graph.nodes]
    held = [*module.named_parameters(), *module.named_buffers()]
    shapes = [f"{name} {list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for name, tensor in held]
    return "\n".join([f"signature of {type(module).__name__}", *lines, "", "tensors", *sorted(shapes), ""])


def node_names(graph: fx.Graph) -> dict[fx.Node, str]:
    """Names numbered from 0 for each stem: the tracer's numbers have gaps that say nothing."""
    seen: Counter[str] = Counter()
    names = {}
    for node in graph.nodes:
        stem = re.sub(r"(_\d+)+$", "", node.name)
        names[node] = f"%{stem}_{seen[stem]}" if seen[stem] else f"%{stem}"
        seen[stem] += 1
    return names


def target_text(target: Any) -> str:
    """What a node calls."""
    if isinstance(target, str | OpOverload):
        return str(target)
    return f"{target.__module__}.{target.__qualname__}".replace("_VariableFunctionsClass.", "")


def _node(node: fx.Node, names: dict[fx.Node, str]) -> str:
    arguments = [value_text(value, names) for value in node.args]
    if node.op == "output":
        return f"return {', '.join(arguments)}"
    arguments += [f"{key}={value_text(value, names)}" for key, value in node.kwargs.items()]
    return f"{names[node]} = {node.op} {target_text(node.target)}({', '.join(arguments)})"


def value_text(value: Any, names: dict[fx.Node, str]) -> str:
    """An argument of a node."""
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(value_text(item, names) for item in value)}]"
    text = repr(value)
    if " at 0x" in text:
        raise AssertionError(f"{text} is another one in every run")
    return text

"""Nodes in a form that does not depend on how the author or the source spelled them."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from attnedit.compiler.capture.export import PROBE_DTYPE
from attnedit.compiler.compatibility.torch_names import OpOverload, hint_of, schema_of
from attnedit.compiler.graph.dataflow import aten, is_size
from attnedit.compiler.rewriting.tracing import HINTS

_SHAPED = (aten.reshape.default, aten.view.default, aten.expand.default)


@dataclass(frozen=True)
class Weight:
    """A tensor of a child module, bound to a capture: its name relative to the attention module."""

    name: str


def target_of(node: fx.Node, root: fx.GraphModule) -> Any:
    """What a node does, in a form that does not depend on how it was written."""
    if node.target in (aten.type_as.default, aten.to.dtype) or _plain_cast(node):
        return "cast"
    if node.target in _SHAPED:
        return "expand" if node.target is aten.expand.default else "reshape"
    if node.op == "call_module":
        return aten.linear.default if type(_child(node, root)) is nn.Linear else f"module {node.target}"
    return node.target


def _plain_cast(node: fx.Node) -> bool:
    return node.target is aten._to_copy.default and not set(node.kwargs) - {"dtype", "device", "layout"}


def arguments_of(node: fx.Node, root: fx.GraphModule) -> dict[str, Any]:
    """Arguments by name, defaults too."""
    if node.target is aten.type_as.default:
        return {"self": node.args[0], "dtype": None}
    if node.target is aten.to.dtype or _plain_cast(node):
        dtype: Any = node.kwargs.get("dtype") if _plain_cast(node) else node.args[1]
        return {"self": node.args[0], "dtype": None if dtype == PROBE_DTYPE else dtype}
    if node.target in _SHAPED:
        return {"self": node.args[0], "shape": [size_of(size) for size in node.meta["val"].shape]}
    if node.op == "call_module":
        child, name = _child(node, root), str(node.target)
        bias = Weight(f"{name}.bias") if getattr(child, "bias", None) is not None else None
        return {"input": node.args[0], "weight": Weight(f"{name}.weight"), "bias": bias}
    schema = schema_of(node.target)
    if schema is None:
        return {**{str(i): value for i, value in enumerate(node.args)}, **node.kwargs}
    result: dict[str, Any] = {}
    for index, argument in enumerate(schema.arguments):
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        if argument.name.startswith("dim") and isinstance(value, int) and value < 0:
            value += _rank(node)
        result[argument.name] = value
    return result


def _child(node: fx.Node, root: fx.GraphModule) -> nn.Module | None:
    return root.get_submodule(str(node.target)) if node.op == "call_module" else None


def size_of(value: Any) -> Any:
    """A size as a letter where it changes from call to call, and any other value as it is."""
    if isinstance(value, fx.Node) and is_size(value):
        value = value.meta["val"]
    if isinstance(value, torch.SymInt):
        hint = hint_of(value)
        return HINTS.get(hint, hint)
    return value


def value_of(found: Any, root: fx.GraphModule) -> Any:
    """The example value of a node, or the tensor of a weight."""
    if isinstance(found, fx.Node):
        return found.meta.get("val")
    return operator.attrgetter(found.name)(root) if isinstance(found, Weight) else None


def called(node: fx.Node) -> str:
    """What a node is, for messages."""
    if node.op == "placeholder":
        return f"the argument {node.target}"
    if isinstance(node.target, str | OpOverload):
        return str(node.target)
    return str(getattr(node.target, "__name__", node.target))


def _rank(node: fx.Node) -> int:
    """Dims that a negative one counts back from."""
    first: Any = node.args[0][0] if isinstance(node.args[0], list | tuple) else node.args[0]
    return int(first.meta["val"].ndim) + (node.target in (aten.unsqueeze.default, aten.stack.default))

"""Clean-up of exported graphs: what says nothing to a kernel, or names the device that was traced on."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from attnedit.compiler.compatibility.torch_names import GUARDS

aten = torch.ops.aten


def simplify(module: fx.GraphModule) -> None:
    """Remove assertions, guards, idle casts and dropout from an unlifted program, in place."""
    drop_assertions(module.graph)
    for node in list(module.graph.nodes):
        if node.op == "call_module" and node.target == GUARDS:
            module.graph.erase_node(node)
        elif (source := _idle(node)) is not None:
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)
        elif node.target in (aten.type_as.default, aten.to.device) and value(node) is not None:
            _as_cast(node)
    if hasattr(module, GUARDS):
        delattr(module, GUARDS)


def drop_assertions(graph: fx.Graph) -> None:
    """Erase what a trace asserts of its own tensors: it holds, and no graph engine knows the operator."""
    for node in list(graph.nodes):
        if node.target == aten._assert_tensor_metadata.default:
            graph.erase_node(node)


def value(node: Any) -> Any:
    """The fake tensor that a node stands for; None if it is something else."""
    found = node.meta.get("val") if isinstance(node, fx.Node) else None
    return found if isinstance(found, torch.Tensor) else None


def _idle(node: fx.Node) -> fx.Node | None:
    """The argument that a node only passes on."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        return None
    if node.target == aten.dropout.default and (node.args[1] == 0.0 or node.args[2] is False):
        return source
    casts = (aten.to.dtype, aten.to.device, aten.type_as.default)
    before, after = value(source), value(node)
    if node.target in casts and before is not None and after is not None and before.dtype == after.dtype:
        return source
    return None


def _as_cast(node: fx.Node) -> None:
    """Make a cast that names a device or another tensor one that names the dtype alone."""
    source = node.args[0]
    with node.graph.inserting_before(node):
        cast = node.graph.call_function(aten.to.dtype, (source, value(node).dtype))
    cast.meta = dict(node.meta)
    node.replace_all_uses_with(cast)
    node.graph.erase_node(node)

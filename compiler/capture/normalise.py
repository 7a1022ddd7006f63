"""Brings an exported attention graph into the compiler's form: few kinds of nodes, no baked sizes or dtypes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from attnedit.compiler.compatibility.torch_names import pytree
from attnedit.compiler.graph.dataflow import anchors, is_tensor, sources, value_inputs
from attnedit.compiler.graph.surgery import prune, substitute

aten = torch.ops.aten

_NO_RESULT = (aten._assert_tensor_metadata.default, aten._assert_scalar.default, aten._assert_async.msg)
_SAME_VALUE = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_RESHAPES = (aten.view.default, aten._unsafe_view.default)
_END = 2**63 - 1


class _Tensor:
    """Stands for a tensor among the recorded arguments of a child's call."""

    def __repr__(self) -> str:
        return "<tensor>"


@dataclass(frozen=True)
class ChildCall:
    """A call of a child module during export: the `number`-th of that child, with its argument structure."""

    TENSOR: ClassVar[_Tensor] = _Tensor()
    name: str
    number: int
    leaves: list[Any]
    spec: pytree.TreeSpec


def clean(graph: fx.Graph) -> None:
    """Remove what export leaves behind; make reshapes independent of strides."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _NO_RESULT:
            graph.erase_node(node)
        elif node.target in _SAME_VALUE or _whole_slice(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif node.target in _RESHAPES:
            # Strides at run time may differ from those on meta.
            node.target = aten.reshape.default
    prune(graph)


def merge_duplicates(graph: fx.Graph) -> None:
    """Let one node stand for all that compute the same from the same."""
    known: dict[tuple[Any, str, str], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        first = known.setdefault((node.target, repr(node.args), repr(node.kwargs)), node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def _whole_slice(node: fx.Node) -> bool:
    if node.target is not aten.slice.Tensor:
        return False
    start = node.args[2] if len(node.args) > 2 else None
    end = node.args[3] if len(node.args) > 3 else _END
    step = node.args[4] if len(node.args) > 4 else 1
    return bool(start in (None, 0) and end == _END and step == 1)


def hidden_input(graph: fx.Graph) -> fx.Node | None:
    """The one tensor argument the attended values depend on; None where there is not exactly one."""
    found = anchors(graph)
    if len(found) != 1 or not isinstance(found[0].args[2], fx.Node):
        return None
    inputs = sources(found[0].args[2])
    return inputs[0] if len(inputs) == 1 else None


def retarget_sizes(graph: fx.Graph) -> None:
    """Read sizes from the hidden states, and make casts to the probe's dtype follow them.

    Export names one tensor for each symbol; it may pick cos or the mask, whose batch or length may differ at run
    time although they agreed in the probe.
    """
    hidden = hidden_input(graph)
    if hidden is None:
        return
    value = hidden.meta["val"]
    sizes: dict[int, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if isinstance(node.meta.get("val"), torch.SymInt) and node.args[0] is not hidden:
            size = node.meta.get("val")
            for dim, own in enumerate(value.shape[:2]):
                if isinstance(own, torch.SymInt) and isinstance(size, torch.SymInt) and own.node.expr == size.node.expr:
                    if dim not in sizes:
                        with graph.inserting_after(hidden):
                            sizes[dim] = graph.call_function(aten.sym_size.int, (hidden, dim))
                        sizes[dim].meta.update(node.meta)
                    node.replace_all_uses_with(sizes[dim])
                    graph.erase_node(node)
                    break
        elif node.target is aten._to_copy.default:
            follow_dtype(graph, node, hidden)


def follow_dtype(graph: fx.Graph, node: fx.Node, hidden: fx.Node) -> None:
    """`_to_copy` with only a dtype becomes `to`; a cast back to the dtype of the hidden states becomes `type_as`."""
    dtype = node.kwargs.get("dtype")
    source = node.args[0]
    if set(node.kwargs) - {"dtype", "device", "layout"} or not isinstance(dtype, torch.dtype):
        return
    with graph.inserting_before(node):
        if dtype == hidden.meta["val"].dtype:
            new = graph.call_function(aten.type_as.default, (source, hidden))
        else:
            new = graph.call_function(aten.to.dtype, (source, dtype))
    substitute(node, new)


def _children(node: fx.Node, root: str) -> list[tuple[str, int]]:
    """FQN and call number of the child modules `node` was traced in, outermost first; none for the module's own ops."""
    stack = node.meta.get("nn_module_stack") or {}
    found = []
    for path, _ in stack.values():
        if path.startswith(f"{root}."):
            name, _, number = path.removeprefix(f"{root}.").partition("@")
            found.append((name, int(number) if number.isdecimal() else 0))
    return found


def raise_children(graph: fx.Graph, calls: list[ChildCall], root: str) -> None:
    """Replace the ops of each child call by a `call_module` of that child.

    A child is raised where it took one tensor and returned one, and runs no attention; of another, its own children
    are.
    """
    known = {(call.name, call.number): call for call in calls}
    inside = {node: _children(node, root) for node in graph.nodes if node.op == "call_function"}
    inside = {n: path for n, path in inside.items() if path and not isinstance(n.meta.get("val"), torch.SymInt)}
    for depth in range(max((len(path) for path in inside.values()), default=0)):
        regions: dict[tuple[str, int], list[fx.Node]] = {}
        for node, path in inside.items():
            if depth < len(path):
                regions.setdefault(path[depth], []).append(node)
        for key, nodes in regions.items():
            call = known.get(key)
            within = {tuple(inside[node][depth + 1 : depth + 2]) for node in nodes}
            if len(within) == 1 and within != {()}:
                continue  # it only calls another, which says more: a linear module that is wrapped
            if call is not None and _raise(graph, call, nodes):
                for node in nodes:
                    del inside[node]


def _raise(graph: fx.Graph, call: ChildCall, nodes: list[fx.Node]) -> bool:
    """Replace the nodes of one child call, if that can be."""
    if sum(leaf is ChildCall.TENSOR for leaf in call.leaves) != 1 or set(anchors(graph)) & set(nodes):
        return False
    inside = set(nodes)
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    inputs = list(
        dict.fromkeys(
            i for n in nodes for i in value_inputs(n) if i not in inside and is_tensor(i) and i.op != "get_attr"
        )
    )
    if len(outputs) != 1 or not is_tensor(outputs[0]) or len(inputs) != 1:
        return False
    args, kwargs = pytree.tree_unflatten(
        [inputs[0] if leaf is ChildCall.TENSOR else leaf for leaf in call.leaves], call.spec
    )
    output = outputs[0]
    with graph.inserting_before(output):
        raised = graph.create_node("call_module", call.name, args, kwargs, name=call.name.replace(".", "_"))
    raised.meta.update(output.meta)
    output.replace_all_uses_with(raised)
    for node in reversed(nodes):
        if not node.users:
            graph.erase_node(node)
    return True

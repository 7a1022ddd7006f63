"""Questions about an fx graph that follow values, not sizes or dtypes; and running a part of it in float64."""

from __future__ import annotations

import copy
import operator
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import networkx
import torch
from torch import fx

from attnedit.compiler.errors import CaptureError

aten = torch.ops.aten

# Ops whose first tensor gives only shape, dtype or device.
_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "new_empty", "new_zeros", "new_ones", "new_full")


def is_tensor(node: fx.Node) -> bool:
    """True where the node's value is one tensor."""
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_size(node: fx.Node) -> bool:
    """True where the node's value is an integer."""
    return isinstance(node.meta.get("val"), torch.SymInt | int)


def value_inputs(node: fx.Node) -> list[fx.Node]:
    """Inputs whose values (not only shape or dtype) the node's value depends on."""
    if node.target is aten.type_as.default:
        return [n for n in (node.args[0],) if isinstance(n, fx.Node)]
    if node.op == "call_function" and getattr(node.target, "__name__", "").split(".")[0] in _LIKE:
        return []
    return [n for n in node.all_input_nodes if not is_size(n)]


def value_ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node whose value `node` depends on, itself included."""
    seen: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current not in seen:
            seen.add(current)
            waiting.extend(value_inputs(current))
    return seen


def sources(node: fx.Node) -> list[fx.Node]:
    """The tensor arguments of the graph that `node` depends on (weights are no arguments), in graph order."""
    found = value_ancestors(node)
    return [
        n
        for n in node.graph.nodes
        if n in found and n.op != "get_attr" and is_tensor(n) and all("val" not in i.meta for i in value_inputs(n))
    ]


def anchors(graph: fx.Graph) -> list[fx.Node]:
    """All attnedit::attention nodes of a graph."""
    return [n for n in graph.nodes if n.op == "call_function" and n.target is torch.ops.attnedit.attention.default]


def digraph(graph: fx.Graph) -> Any:
    """The networkx graph of value edges, weights left out."""
    result = networkx.DiGraph()
    for node in graph.nodes:
        if node.op == "get_attr" or is_size(node):
            continue
        result.add_node(node)
        for source in value_inputs(node):
            if source.op != "get_attr":
                result.add_edge(source, node)
    return result


def dominators(flow: Any, start: fx.Node, node: fx.Node) -> list[fx.Node]:
    """`node`, its immediate dominator, and so on up to `start`; empty where `start` does not reach `node`."""
    immediate = networkx.immediate_dominators(flow, start)
    if node not in immediate:
        return []
    chain = [node]
    while chain[-1] is not start:
        chain.append(immediate[chain[-1]])
    return chain


def structure_hash(graph: fx.Graph) -> str:
    """Weisfeiler-Lehman hash of the graph: ops, targets and literal arguments, not names."""
    flow = networkx.DiGraph()
    for node in graph.nodes:
        literals = [repr(a) for a in fx.node.map_arg(node.args, lambda _: "*")] if node.op == "call_function" else []
        flow.add_node(node.name, label=f"{node.op}:{node.target}:{','.join(literals)}")
        for source in node.all_input_nodes:
            flow.add_edge(source.name, node.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that releases of networkx before 3.5 hashed otherwise
        return str(networkx.weisfeiler_lehman_graph_hash(flow, node_attr="label", iterations=4))


_CALLED = ("/torch/nn/modules/", "/compiler/graph/anchor.py")


def where(node: fx.Node) -> str:
    """A node and the source line it was traced from, for messages."""
    trace = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip()]
    files = [line for line in trace if line.startswith("File")]
    if not files:
        return f"node {node.name}"
    # Who called a layer, or the anchor that stands for the attention, says more.
    files = [line for line in files if not any(name in line for name in _CALLED)] or files
    parts = files[-1].split('"')
    return f"node {node.name} ({parts[1].rsplit('/', 1)[-1]}:{parts[2].split()[2].rstrip(',')})"


class Evaluator:
    """Runs parts of a graph on CPU in float64, whatever casts the source makes.

    Child modules are copied, in float64; a meta child gets random parameters.
    """

    def __init__(self, module: torch.nn.Module, constants: Mapping[str, torch.Tensor]) -> None:
        self.module = module
        self.constants = constants
        self._children: dict[str, torch.nn.Module] = {}

    def run(self, wanted: Iterable[fx.Node], given: Mapping[fx.Node, Any]) -> list[Any]:
        """Values of `wanted`, starting from the values `given` for any nodes upstream."""
        values: dict[fx.Node, Any] = dict(given)

        def value_of(node: fx.Node) -> Any:
            stack = [node]
            while stack:
                current = stack[-1]
                if current in values:
                    stack.pop()
                    continue
                missing = [n for n in current.all_input_nodes if n not in values]
                if missing:
                    stack.extend(missing)
                    continue
                values[current] = self._execute(current, values)
                stack.pop()
            return values[node]

        with torch.no_grad():
            return [value_of(node) for node in wanted]

    def _execute(self, node: fx.Node, values: Mapping[fx.Node, Any]) -> Any:
        args: Any = fx.node.map_arg(node.args, lambda n: values[n])
        kwargs: Any = fx.node.map_arg(node.kwargs, lambda n: values[n])
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        if node.op == "call_module":
            return self._child(str(node.target))(*args, **kwargs)
        if node.op != "call_function":
            raise KeyError(f"{where(node)} has no value")
        if node.target is aten.type_as.default or (node.target is aten.to.dtype and args[1].is_floating_point):
            return args[0]
        if node.target is operator.getitem:
            return args[0][args[1]]
        target: Any = node.target
        try:
            return target(*args, **kwargs)
        except (RuntimeError, ValueError, LookupError) as error:
            raise CaptureError(f"{where(node)} works for the traced sizes only: {error}") from error

    def _attribute(self, name: str) -> Any:
        if name in self.constants:
            tensor: Any = self.constants[name]
        else:
            tensor = operator.attrgetter(name)(self.module)
        tensor = _materialise(tensor.detach())
        return tensor.double() if tensor.is_floating_point() else tensor

    def _child(self, name: str) -> torch.nn.Module:
        if name not in self._children:
            child = self.module.get_submodule(name)
            memo: dict[int, Any] = {}
            for tensor in [*child.parameters(), *child.buffers()]:
                fresh = _materialise(tensor.detach())
                fresh = fresh.double() if fresh.is_floating_point() else fresh
                if isinstance(tensor, torch.nn.Parameter):
                    fresh = torch.nn.Parameter(fresh, requires_grad=False)
                memo[id(tensor)] = fresh
            self._children[name] = copy.deepcopy(child, memo).eval()
        return self._children[name]


def _materialise(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_meta:
        return tensor.cpu()
    generator = torch.Generator().manual_seed(0)
    return torch.rand(tensor.shape, dtype=torch.float64, generator=generator, device="cpu") + 0.5

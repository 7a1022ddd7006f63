"""Makes of a traced attention module an fx graph with the anchor in it, and the module's own signature."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnedit.compiler.capture.forwards import PAST
from attnedit.compiler.capture.normalise import clean, merge_duplicates, raise_children, retarget_sizes
from attnedit.compiler.capture.probe import AttentionCall
from attnedit.compiler.capture.trace import ROOT, Structure, Trace, structure_of
from attnedit.compiler.capture.written_out import drop_past, emit_anchor
from attnedit.compiler.compatibility.torch_names import (
    FakeTensor,
    HigherOrderOperator,
    pytree,
)
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.dataflow import Evaluator, where
from attnedit.compiler.graph.spec import LENGTH, verify
from attnedit.compiler.graph.surgery import prune


@dataclass(frozen=True)
class Exported:
    """A normalised attention graph; `constants` are tensors that tracing lifted out of the source."""

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]


def bind(call: AttentionCall) -> inspect.BoundArguments:
    """The arguments of the call that is exported by parameter name, without defaults."""
    given = call if call.cached is None else call.cached
    return inspect.signature(call.module.forward).bind(*given.args, **given.kwargs)


def unlift(
    program: torch.export.ExportedProgram,
    graph: fx.Graph,
    root: str,
    argument: Callable[[fx.Node], fx.Node],
    constant: str = "_constant_",
) -> tuple[list[fx.Node], dict[str, torch.Tensor]]:
    """Copy an exported program into a graph, where get_attr takes the place of what export made arguments of.

    Args:
        program: to copy.
        graph: that gets its nodes, all but the output.
        root: what their FQNs begin with; it is left out.
        argument: adds the node for an argument that the program had before.
        constant: what the names of tensors that the code makes begin with.

    Returns:
        The nodes that are returned, and the tensors that the code makes, by get_attr target.

    Raises:
        CaptureError: there is an op that calls other graphs, or a constant whose value cannot be known.
    """
    signature = program.graph_signature
    own = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    lifted = signature.inputs_to_lifted_tensor_constants
    constants: dict[str, torch.Tensor] = {}
    values: dict[fx.Node, fx.Node] = {}
    outputs: list[fx.Node] = []
    for node in program.graph.nodes:
        if node.op == "output":
            outputs = [values[n] for n in node.args[0]]
            continue
        if node.op == "placeholder":
            if node.name in own:
                new = graph.get_attr(own[node.name].removeprefix(f"{root}."))
            elif node.name in lifted:
                name = constant + lifted[node.name].rsplit(".", 1)[-1]
                value = program.constants[lifted[node.name]]
                if not isinstance(value, torch.Tensor) or isinstance(value, FakeTensor) or value.is_meta:
                    raise CaptureError(f"the source makes a constant tensor ({name}) that has no value")
                constants[name] = value
                new = graph.get_attr(name)
            else:
                new = argument(node)
            new.meta.update(node.meta)
        elif node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            raise CaptureError(f"{where(node)} is the higher-order op {node.target}; cannot rewrite it")
        else:
            new = graph.node_copy(node, lambda n: values[n])
        values[node] = new
    return outputs, constants


def export_attention(call: AttentionCall, trace: Trace) -> Exported:
    """Unlift and normalise what was traced of one call.

    Returns:
        The graph: child modules are called, sizes are read from the hidden states, casts follow the hidden states'
        dtype, the anchor stands for the attention interface.

    Raises:
        CaptureError: the graph holds something that is no plain op.
    """
    structure = structure_of(call, "meta")
    graph = fx.Graph()
    users = _source_signature(graph, call)
    arguments: list[fx.Node] = []

    def argument(_: fx.Node) -> fx.Node:
        arguments.append(next(users))
        return arguments[-1]

    outputs, constants = unlift(trace.program, graph, ROOT, argument)
    graph.output(_output(trace.output, outputs))
    clean(graph)
    verify(graph, "clean", anchored=False, resized=False)
    if call.cached is not None:
        emit_anchor(graph, Evaluator(call.module, constants))
        verify(graph, "emit_anchor", anchored=False, resized=False)
        *arguments, keys, values_ = arguments
        drop_past(graph, [keys, values_], _attended(arguments, structure))
        verify(graph, "drop_past", resized=False)
    retarget_sizes(graph)
    verify(graph, "retarget_sizes")
    if call.cached is not None:
        merge_duplicates(graph)
        verify(graph, "merge_duplicates")
    raise_children(graph, trace.children, ROOT)
    prune(graph)
    verify(graph, "raise_children")
    return Exported(graph, constants)


def _source_signature(graph: fx.Graph, call: AttentionCall) -> Any:
    """Add placeholders with the source's signature; yield the node of each tensor the probe passed, in order."""
    bound = bind(call)
    parameters = inspect.signature(call.module.forward).parameters
    roots: dict[str, fx.Node] = {}
    defaulted = False
    for name, parameter in parameters.items():
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            roots[name] = graph.create_node("placeholder", f"*{name}", name=name)
        elif parameter.kind is inspect.Parameter.VAR_KEYWORD:
            roots[name] = graph.create_node("placeholder", f"**{name}", name=name)
        elif parameter.default is inspect.Parameter.empty and not defaulted:
            roots[name] = graph.placeholder(name)
        else:
            defaulted = True
            empty = parameter.default is inspect.Parameter.empty
            roots[name] = graph.placeholder(name, default_value=None if empty else parameter.default)
    # The leaves of args come before those of kwargs, each in order: the order the export flattened them in.
    by_identity: dict[int, list[fx.Node]] = {}
    made: dict[tuple[str, str], fx.Node] = {}
    for path, leaf in pytree.tree_flatten_with_path(dict(bound.arguments))[0]:
        if not isinstance(leaf, torch.Tensor):
            continue
        name = _step(path[0])
        node = roots[name]
        keys: list[Any] = []
        for step in path[1:]:
            keys.append(_step(step))
            at = (name, repr(keys))
            if at not in made:
                made[at] = graph.call_function(operator.getitem, (node, keys[-1]))
            node = made[at]
        by_identity.setdefault(id(leaf), []).append(node)
    given = call if call.cached is None else call.cached
    originals = pytree.tree_leaves((given.args, dict(given.kwargs)))
    nodes = [
        (by_identity[id(leaf)].pop(0) if len(by_identity[id(leaf)]) > 1 else by_identity[id(leaf)][0])
        for leaf in originals
        if isinstance(leaf, torch.Tensor)
    ]
    if call.cached is not None:
        nodes += [graph.placeholder(f"_past_{name}") for name in ("keys", "values")]
    return iter(nodes)


def _attended(arguments: list[fx.Node], structure: Structure) -> tuple[fx.Node, int] | None:
    """An argument that is as long as what is attended to, new and cached tokens, and its dim."""
    tensors = [leaf for leaf in structure.leaves if isinstance(leaf, torch.Tensor)]
    for node, tensor in zip(arguments, tensors, strict=True):
        for dim in reversed(range(tensor.dim())):
            if tensor.shape[dim] == PAST + LENGTH:
                return node, dim
    return None


def _step(entry: Any) -> Any:
    """The key or index of one step of a pytree path."""
    if isinstance(entry, pytree.MappingKey):
        return entry.key
    if isinstance(entry, pytree.SequenceKey):
        return entry.idx
    raise CaptureError(f"an argument holds a tensor inside an object that cannot be indexed ({entry})")


def _output(output: tuple[list[Any], pytree.TreeSpec], tensors: list[fx.Node]) -> Any:
    marks, spec = output
    given = iter(tensors)
    return pytree.tree_unflatten([next(given) if mark is True else mark for mark in marks], spec)

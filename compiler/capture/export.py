"""One attention module through torch.export, and as an fx graph with the anchor in it and the module's own signature.

It is traced as a bfloat16 copy on the meta device: no weight is touched, and every cast the source makes shows up in
the graph whatever the dtype of the live model is.
"""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers import Cache

from attnedit.compiler.capture.forwards import PAST
from attnedit.compiler.capture.normalise import ChildCall, clean, merge_duplicates, raise_children, retarget_sizes
from attnedit.compiler.capture.probe import AttentionCall
from attnedit.compiler.capture.written_out import Past, drop_past, emit_anchor
from attnedit.compiler.compatibility.torch_names import pytree, without_fake_cache
from attnedit.compiler.errors import CaptureError, first_line
from attnedit.compiler.graph.anchor import ANCHOR
from attnedit.compiler.graph.dataflow import Evaluator
from attnedit.compiler.graph.modules import shadow
from attnedit.compiler.graph.spec import BATCH, LENGTH, verify
from attnedit.compiler.graph.surgery import prune, unlift

PROBE_DTYPE = torch.bfloat16
ROOT = "attn"
"""Where the module stands in what is traced."""


@dataclass(frozen=True)
class Trace:
    """What torch made of one call of an attention module.

    Attributes:
        program: in functional form.
        children: calls of its child modules.
        output: values of the output, True where they are tensors, and their structure.
    """

    program: torch.export.ExportedProgram
    children: list[ChildCall]
    output: tuple[list[Any], pytree.TreeSpec]


class Structure:
    """The arguments of the probe's call and the structure of its output.

    Not attributes of the module: export restores those after tracing.
    """

    def __init__(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.leaves = leaves
        self.spec = spec
        self.output: tuple[list[Any], pytree.TreeSpec] | None = None


class _Flat(torch.nn.Module):
    """Calls the attention module with tensors put back among its other arguments; keeps its output structure."""

    def __init__(self, module: torch.nn.Module, structure: Structure) -> None:
        super().__init__()
        self.attn = module
        self.structure = structure

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.structure.leaves]
        if past := tuple(given):
            leaves = [Past(*past) if isinstance(leaf, Cache) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure.spec)
        output = self.attn(*args, **kwargs)
        values, spec = pytree.tree_flatten(output)
        self.structure.output = ([isinstance(v, torch.Tensor) or v for v in values], spec)
        return [value for value in values if isinstance(value, torch.Tensor)]


def _empty(leaf: Any, device: str) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    dtype = PROBE_DTYPE if leaf.is_floating_point() else leaf.dtype
    # Contiguous and distinct: a view of another argument would become a guard on its base.
    return torch.empty(leaf.shape, dtype=dtype, device=device)


def record_children(module: torch.nn.Module) -> tuple[list[ChildCall], list[Any]]:
    """Note every call of a child module from now on; returns the calls so far, and hooks to remove."""
    calls: list[ChildCall] = []
    counts: dict[str, int] = {}
    handles = []
    for name, child in module.named_modules():
        if not name:
            continue

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            number = counts.get(name, 0)
            counts[name] = number + 1
            leaves, spec = pytree.tree_flatten((args, kwargs))
            marked = [ChildCall.TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            calls.append(ChildCall(name, number, marked, spec))

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
    return calls, handles


def trace_attention(call: AttentionCall) -> Trace:
    """Trace the attention module of one call.

    Raises:
        CaptureError: torch.export could not.
    """
    cached = call.cached
    # Constants that a module makes on the way have values on a real device only; nothing is computed there.
    implementation, device = (ANCHOR, "meta") if cached is None else (cached.implementation, "cpu")
    copied = shadow(call.module, implementation, device, PROBE_DTYPE)
    structure = structure_of(call, device)
    flat = _Flat(copied, structure).eval()
    inputs = tuple(leaf for leaf in structure.leaves if isinstance(leaf, torch.Tensor))
    if cached is not None:
        inputs += (_empty(cached.keys, device), _empty(cached.values, device))
    children, handles = record_children(copied)
    dynamic = (tuple(_dynamic(tensor, cached is not None) for tensor in inputs),)
    try:
        program = export_program(flat, inputs, dynamic)
    finally:
        for handle in handles:
            handle.remove()
    if structure.output is None:
        raise AssertionError("the module that is exported has run")
    return Trace(program, children, structure.output)


def structure_of(call: AttentionCall, device: str) -> Structure:
    """The arguments of a call, their tensors empty ones on a device."""
    leaves, spec = pytree.tree_flatten(call.arguments)
    return Structure([_empty(leaf, device) for leaf in leaves], spec)


def export_program(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: Any
) -> torch.export.ExportedProgram:
    """Non-strict export in functional form, every composite op kept; CaptureError where torch.export fails."""
    program: torch.export.ExportedProgram
    try:
        # With gradients on, the no_grad regions of rotary embeddings would become higher-order ops.
        with torch.no_grad(), without_fake_cache(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch's own copy of it
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
            program = program.run_decompositions({})
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise CaptureError(f"torch.export failed: {first_line(error)}") from error
    return program


def _dynamic(tensor: torch.Tensor, written_out: bool) -> dict[int, Any]:
    # Batch, and whatever is as long as the sequence; feature dims stay numbers.
    lengths = {size for size in tensor.shape if size in (BATCH, LENGTH, PAST, PAST + LENGTH)}
    dims = [
        dim
        for dim, size in enumerate(tensor.shape)
        if size in lengths and dim < max(tensor.dim() - 1, 2 if tensor.dim() < 4 else 4)
    ]
    if written_out and tensor.dim() and tensor.shape[0] % BATCH == 0:
        dims.append(0)  # batch and heads in one
    if written_out and tensor.dim() and tensor.shape[-1] == PAST + LENGTH:
        dims.append(tensor.dim() - 1)
    return {dim: torch.export.Dim.AUTO for dim in dims}


@dataclass(frozen=True)
class Exported:
    """A normalised attention graph; `constants` are tensors that tracing lifted out of the source."""

    graph: fx.Graph
    constants: Mapping[str, torch.Tensor]


def bind(call: AttentionCall) -> inspect.BoundArguments:
    """The arguments of the call that is exported by parameter name, without defaults."""
    args, kwargs = call.arguments
    return inspect.signature(call.module.forward).bind(*args, **kwargs)


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
    originals = pytree.tree_leaves(call.arguments)
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

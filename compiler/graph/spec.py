"""What captured and pure graphs may hold; checked after every pass, so that the one that broke it is named.

Every tensor's noted shape and dtype is computed anew from its inputs, at a batch and a length that no probe has: sizes
and dtypes that a pass has baked in, or notes that it forgot to change, show there.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx

from attnedit.compiler.compatibility.torch_names import OpOverload, hint_of, pytree, schema_of
from attnedit.compiler.errors import AttneditError, CaptureError, first_line
from attnedit.compiler.graph.dataflow import anchors, where

BATCH, LENGTH = 2, 11
"""Of probes: two primes that no head count, group count or number of experts is likely to be at once."""
# Sizes that no probe has and no model will, so that one that is baked in shows.
_ELSEWHERE = {BATCH: 101, LENGTH: 103}
_LETTERS = {101: "B", 103: "T"}
_CACHE = "attnedit::cache"
_STAND_IN = "attnedit::cached"
_READ = ("device", "dtype")
_ARGUMENTS = (
    fx.Node,
    slice,
    bool,
    int,
    float,
    complex,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
)


def verify(
    graph: fx.Graph,
    made_by: str,
    *,
    root: torch.nn.Module | None = None,
    anchored: bool = True,
    resized: bool = True,
    loose: str | None = None,
    placed: Collection[fx.Node] = (),
    program: bool = False,
    error: type[AttneditError] = CaptureError,
) -> None:
    """Check a graph.

    Args:
        graph: of a program, or of an attention module, captured or pure (with `attnedit::cache` where rewritten).
        made_by: the pass that it comes from, for messages.
        root: holds its modules and tensors; None where they are not at hand.
        anchored: attention is one node at least; exactly one, unless a cache is called.
        resized: casts follow the hidden states already: none is to the probe's dtype or device.
        loose: name of a node that graphs traced apart take in another length, the mask; what depends on it is not
            computed anew.
        placed: nodes in place of the attention: they may call methods and functions, and what is noted of them, such as
            the shape of what a new module returns, is not computed anew but goes into what is.
        program: the graph is a runtime's: its ops may write to caches, and what is not noted is computed.
        error: raised with one line.
    """
    try:
        _check(graph, root, anchored, resized, loose, placed, program)
    except _BrokenError as broken:
        raise error(f"after {made_by}: {broken}") from None


class _BrokenError(Exception):
    """What is wrong with a graph."""


def _check(
    graph: fx.Graph,
    root: torch.nn.Module | None,
    anchored: bool,
    resized: bool,
    loose: str | None,
    placed: Collection[fx.Node],
    program: bool,
) -> None:
    try:
        graph.lint()
    except (RuntimeError, AssertionError) as error:
        raise _BrokenError(first_line(error)) from error  # the graph itself follows
    for node in graph.nodes:
        _check_call(node, root, anchored, plain=node not in placed, writes=program)
        for leaf in pytree.tree_leaves((node.args, node.kwargs)):
            if not isinstance(leaf, _ARGUMENTS):
                raise _BrokenError(
                    f"{where(node)} has a constant {type(leaf).__name__} among its arguments; make it a buffer"
                )
            if resized and (leaf == torch.device("meta") or (leaf == torch.bfloat16 and node.op == "call_function")):
                raise _BrokenError(f"{where(node)} has the probe's {leaf} baked in")
    if anchored:
        _check_anchors(graph)
    _Sizes(graph, root if program else None).check(loose, placed)


def _check_call(node: fx.Node, root: torch.nn.Module | None, anchored: bool, plain: bool, writes: bool) -> None:
    """Only plain ops, child modules and tensors that are there."""
    if plain and node.op == "call_method":
        raise _BrokenError(f"{where(node)} calls the method {node.target}; only ops and modules can be called")
    if node.op == "call_function":
        schema = schema_of(node.target)
        if isinstance(node.target, OpOverload):
            if schema.is_mutable and not writes:
                raise _BrokenError(f"{where(node)} changes its arguments ({node.target})")
            if anchored and schema.name == _STAND_IN:
                raise _BrokenError(f"{where(node)} still reads the stand-in of a cache")
        elif plain and not _on_numbers(node):
            raise _BrokenError(f"{where(node)} calls {_name(node.target)}, which is no op")
    elif root is not None and node.op in ("call_module", "get_attr"):
        try:
            operator.attrgetter(str(node.target))(root)
        except AttributeError as error:
            raise _BrokenError(f"{where(node)} takes {node.target}, which its module does not have") from error


def _on_numbers(node: fx.Node) -> bool:
    """Picks from a tuple, reads dtype or device, or computes with sizes."""
    if node.target is getattr:
        return node.args[1] in _READ
    module = getattr(node.target, "__module__", "")
    return module in ("_operator", "math") or _name(node.target).startswith("sym_")


def _name(target: Any) -> str:
    return str(getattr(target, "__name__", target))


def _check_anchors(graph: fx.Graph) -> None:
    found = anchors(graph)
    caches = [n for n in graph.nodes if n.op == "call_function" and getattr(schema_of(n.target), "name", "") == _CACHE]
    if len(found) != 1 and not caches:
        raise _BrokenError(f"there are {len(found)} of attention() and none of cache(); expected one")
    layers = {node.args[8] if len(node.args) == 9 else None for node in found}
    if found and (len(layers) != 1 or not isinstance(next(iter(layers)), int)):
        raise _BrokenError(f"{where(found[0])} names no layer, or several ({layers})")
    for node in found:
        shapes = [[*size.meta["val"].shape] if isinstance(size, fx.Node) else [] for size in node.args[:3]]
        if any(len(shape) != 4 for shape in shapes) or shapes[0][1] % shapes[1][1] or shapes[1][1] != shapes[2][1]:
            raise _BrokenError(f"{where(node)} takes {shapes}; expected [B, H, T, d], [B, G, S, d], [B, G, S, dv]")


class _Sizes:
    """Values of a graph at another batch and length, without data; with a root what is not noted is computed."""

    def __init__(self, graph: fx.Graph, root: torch.nn.Module | None = None) -> None:
        self._graph, self._root = graph, root
        self._found: dict[fx.Node, Any] = {}
        self._known: dict[tuple[int, Any], int] = {}
        for node in graph.nodes:
            for value in pytree.tree_leaves(node.meta.get("val")):
                for size in value.shape if isinstance(value, torch.Tensor) else [value]:
                    if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol:
                        hint = hint_of(size)
                        self._known[id(size.node.shape_env), size.node.expr] = _ELSEWHERE.get(hint, hint)

    def check(self, loose: str | None, placed: Collection[fx.Node] = ()) -> None:
        """Compute every op anew; what is noted of it must hold."""
        unsure: set[fx.Node] = set()
        for node in self._graph.nodes:
            if node in placed:
                continue
            if node.name == loose or any(source in unsure for source in node.all_input_nodes):
                unsure.add(node)
            elif isinstance(node.target, OpOverload) and schema_of(node.target).name != _CACHE:
                self._check_node(node)

    def _check_node(self, node: fx.Node) -> None:
        if "val" not in node.meta and self._root is None:
            raise _BrokenError(f"{where(node)}: nothing is noted of its shape")
        noted = self._value(node.meta["val"]) if "val" in node.meta else None
        inputs: Any = fx.node.map_arg((node.args, node.kwargs), self._of)
        if self._root is not None:  # a program names its device
            inputs = pytree.tree_map_only(torch.device, lambda _: torch.device("meta"), inputs)
        target: Any = node.target
        try:
            found = target(*inputs[0], **inputs[1])
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise _BrokenError(f"{where(node)} works at the probe's sizes only: {first_line(error)}") from error
        if noted is None:
            self._found[node] = found
        elif _form(found) != _form(noted):
            raise _BrokenError(f"{where(node)} gives {_text(found)}, but is noted as {_text(noted)}")

    def _of(self, node: fx.Node) -> Any:
        if "val" in node.meta:
            return self._value(node.meta["val"])
        if node in self._found:
            return self._found[node]
        if node.target in (getattr, operator.getitem) and isinstance(node.args[0], fx.Node):
            of = self._of(node.args[0])
            return getattr(of, str(node.args[1])) if node.target is getattr else of[node.args[1]]
        if node.op == "get_attr" and self._root is not None:
            return operator.attrgetter(str(node.target))(self._root).to("meta")
        raise _BrokenError(f"{where(node)}: nothing is noted of its shape")

    def _value(self, value: Any) -> Any:
        def elsewhere(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return torch.empty([self._size(size) for size in leaf.shape], dtype=leaf.dtype, device="meta")
            return self._size(leaf) if isinstance(leaf, torch.SymInt) else leaf

        return pytree.tree_map(elsewhere, value)

    def _size(self, size: int | torch.SymInt) -> int:
        if not isinstance(size, torch.SymInt):
            return size
        expression, environment = size.node.expr, id(size.node.shape_env)
        found: Mapping[Any, int | None] = {s: self._known.get((environment, s)) for s in expression.free_symbols}
        return hint_of(size) if None in found.values() else int(expression.subs(found))


def _form(value: Any) -> list[Any]:
    leaves: Iterable[Any] = pytree.tree_leaves(value)
    return [(list(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]


def _text(value: Any) -> str:
    def one(leaf: Any) -> str:
        if not isinstance(leaf, torch.Tensor):
            return str(leaf)
        sizes = ", ".join(_LETTERS.get(size, str(size)) for size in leaf.shape)
        return f"[{sizes}] of {str(leaf.dtype).removeprefix('torch.')}"

    return " and ".join(one(leaf) for leaf in pytree.tree_leaves(value))

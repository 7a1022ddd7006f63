"""Puts the replacement of a match into the graph of a site."""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.tools_common import stable_topological_sort

from attnedit.compiler.capture.export import PROBE_DTYPE
from attnedit.compiler.capture.normalise import follow_dtype
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.torch_names import hint_of
from attnedit.compiler.errors import RewriteError
from attnedit.compiler.graph import provenance
from attnedit.compiler.graph.dataflow import anchors, aten, is_size, value_ancestors, where
from attnedit.compiler.graph.spec import LENGTH
from attnedit.compiler.graph.surgery import prune, with_graph
from attnedit.compiler.rewriting.canonical import Weight, size_of
from attnedit.compiler.rewriting.language import SETTINGS
from attnedit.compiler.rewriting.pattern import ANCHOR_OP, Binding
from attnedit.compiler.rewriting.rewrite import FACTS, Match, Rewrite, with_parts
from attnedit.compiler.rewriting.tracing import PAST, Traced, as_forward, parameters_of, place_of, trace

CACHE_OP = torch.ops.attnedit.cache.default
_DROPPED = ("softcap", "sinks", "window", "mask")


@dataclass
class SiteGraph:
    """The graph of one attention site while rewrites go over it: no cache in it, attention is the anchor op.

    Attributes:
        site: the source's facts.
        module: the source's attention module.
        root: the graph and what it calls.
    """

    site: AttentionSite
    module: nn.Module
    root: fx.GraphModule

    def node(self, name: str) -> fx.Node | None:
        """The node of a name, if the graph still has it."""
        return next((node for node in self.root.graph.nodes if node.name == name), None)


Memo = dict[Any, Traced]
"""Traced replacements of one rewrite at sites of one kind, by what else they depend on."""


def graft(
    state: SiteGraph, rewrite: Rewrite, match: Match, binding: Binding, new: nn.Module, memo: Memo
) -> tuple[str, ...]:
    """Replace a match by what the rewrite's replacement computes; names of the nodes that took its outputs' place.

    Args:
        state: changed in place.
        rewrite: the rewrite.
        match: the match.
        binding: of the same match, in the graph as it is.
        new: the parts.
        memo: replacements traced before, at sites of the same kind.

    Raises:
        RewriteError: the replacement does not fit.
    """
    where_ = f"{rewrite.name}.replacement ({place_of(rewrite.replacement)})"
    _check_parameters(rewrite, binding, where_)
    sources = _inputs(state, binding)
    traced = _trace(state, rewrite, match, binding, new, sources, memo)
    _check_outputs(traced, binding, where_)
    _check_settings(traced, binding, where_)
    root = with_graph(state.root, copy.deepcopy(state.root.graph))
    # The graph is copied so that whoever holds the old root still has what was there before.
    twin = dict(zip(state.root.graph.nodes, root.graph.nodes, strict=True))
    outputs = tuple(twin[node] for node in binding.outputs)
    placed = {name: twin[value] if isinstance(value, fx.Node) else value for name, value in sources.items()}
    used = {str(n.target) for n in traced.graph.nodes if n.op == "placeholder" and n.users}
    behind = set(outputs)
    for name in used & set(placed):
        node = placed[name]
        if isinstance(node, fx.Node) and node not in behind and behind & value_ancestors(node):
            raise RewriteError(f"{where_}: {name.lstrip('_')} depends on the very value that is replaced")
    for name, part in (*new.named_children(), *new.named_parameters(recurse=False), *new.named_buffers(recurse=False)):
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            root.register_buffer(name, part)
        else:
            setattr(root, name, part)
    fresh, results = _insert(root, traced, placed, outputs, rewrite)
    layer = next((node.args[8] for node in anchors(state.root.graph)), state.site.layer_idx)
    changed = _finish(root.graph, fresh, state.site, layer)
    fresh, results = ([changed.get(node, node) for node in nodes] for nodes in (fresh, results))
    provenance.mark(fresh, outputs[0], rewrite.identity)
    made = set(fresh)
    for old, result in zip(outputs, results, strict=True):
        old.replace_all_uses_with(result, delete_user_cb=lambda user: user not in made)
    prune(root.graph)
    # Inputs of the replacement may stand later in the graph than what it replaces.
    stable_topological_sort(root)
    state.root = with_graph(root, root.graph).train(state.root.training)
    return tuple(result.name for result in results)


def _check_parameters(rewrite: Rewrite, binding: Binding, where_: str) -> None:
    given = parameters_of(rewrite.replacement)
    expected = ["match", *binding.captures]
    if given[:1] == expected[:1] and set(given[1:]) == set(expected[1:]):
        return
    raise RewriteError(
        f"{where_} takes ({', '.join(given)}); expected match, then the captures of the pattern: "
        f"({', '.join(expected)})"
    )


def _inputs(state: SiteGraph, binding: Binding) -> dict[str, fx.Node | Weight]:
    """Everything that a replacement can read: captures first, then facts, then settings of the matched attention."""
    inputs: dict[str, fx.Node | Weight] = {
        name: value for name, value in binding.captures.items() if isinstance(value, fx.Node | Weight)
    }
    site = state.site
    facts = {name: getattr(site, name) for name in FACTS}
    if site.rope is not None:
        facts |= {"cos": site.rope.cos, "sin": site.rope.sin}
    for fact, name in facts.items():
        if node := state.node(name):
            inputs[f"_{fact}"] = node
    anchor = binding.anchor or next(iter(anchors(state.root.graph)), None)
    if anchor is not None:
        for setting, value in zip(SETTINGS, anchor.args[3:8], strict=True):
            if isinstance(value, fx.Node):
                inputs[f"_{setting}"] = value
    return inputs


def _trace(
    state: SiteGraph,
    rewrite: Rewrite,
    match: Match,
    binding: Binding,
    new: nn.Module,
    sources: Mapping[str, fx.Node | Weight],
    memo: Memo,
) -> Traced:
    """The replacement as a graph over what it can read, traced at the probe's sizes, or from `memo`."""
    tensors: dict[str, Tensor] = {}
    dynamic: dict[str, dict[int, Any]] = {}
    for name, source in sources.items():
        value = state.module.get_parameter(source.name) if isinstance(source, Weight) else source.meta["val"]
        shape = [hint_of(size) for size in value.shape]
        free = {i: torch.export.Dim.AUTO for i, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}
        if source is sources.get("_mask") and shape[-1] == LENGTH:
            shape[-1] += PAST  # a mask is as long as what `cache` returns
        dtype = PROBE_DTYPE if isinstance(source, Weight) else value.dtype
        tensors[name], dynamic[name] = torch.empty(shape, dtype=dtype, device="meta"), free
    anchor = binding.anchor or next(iter(anchors(state.root.graph)), None)
    same: dict[str, Any] = {}
    if anchor is not None:
        pairs = zip(SETTINGS, anchor.args[3:8], strict=True)
        same = {name: f"_{name}" if isinstance(value, fx.Node) else value for name, value in pairs}
    code = as_forward(rewrite.replacement)
    constants = {n: v for n, v in binding.captures.items() if not isinstance(v, fx.Node | Weight)}
    seen = _Seen()

    def call(given: dict[str, Any], parts: nn.Module) -> Any:
        captures = {name: given[name] for name in binding.captures if name in given} | constants
        facts = {name[1:]: value for name, value in given.items() if name.startswith("_")}
        return code(seen.watch(with_parts(match, parts, facts)), **captures)

    shapes = [(name, tensor.shape, tensor.dtype, tuple(dynamic[name])) for name, tensor in tensors.items()]
    made: list[Any] = [(name, type(part), _settings(part)) for name, part in new.named_modules()]
    made += [(name, (tensor.shape, tensor.dtype)) for name, tensor in (*new.named_parameters(), *new.named_buffers())]
    key = (repr(shapes), repr(made), repr(same), repr(constants))
    if key not in memo:
        traced = trace(call, rewrite.replacement, tensors, dynamic, same, {}, new)
        if seen.own:  # it depends on this very site
            return traced
        memo[key] = traced
    return memo[key]


def _settings(module: nn.Module) -> dict[str, Any]:
    """Plain attributes of a module: code that calls it may have them as constants."""
    plain = (bool, int, float, str, tuple, type(None))
    return {name: value for name, value in vars(module).items() if isinstance(value, plain) and name[0] != "_"}


class _Seen:
    """Notes whether a replacement read what differs between sites of one kind."""

    def __init__(self) -> None:
        self.own = False

    def watch(self, match: Match) -> Match:
        """The same match, watched."""
        seen = self

        class Site(AttentionSite):
            def __getattribute__(self, name: str) -> Any:
                seen.own |= name in ("name", "layer_idx")
                return super().__getattribute__(name)

        class Watched(Match):
            def __getattribute__(self, name: str) -> Any:
                seen.own |= name == "module"
                return super().__getattribute__(name)

        facts = {f.name: getattr(match.site, f.name) for f in dataclasses.fields(match.site)}
        values = {f.name: getattr(match, f.name) for f in dataclasses.fields(match)}
        return Watched(**{**values, "site": Site(**facts)})


def _check_outputs(traced: Traced, binding: Binding, where_: str) -> None:
    if len(traced.outputs) != len(binding.outputs):
        raise RewriteError(f"{where_} returns {len(traced.outputs)} tensors, the pattern {len(binding.outputs)}")
    for new, old in zip(traced.outputs, binding.outputs, strict=True):
        shapes = [[size_of(size) for size in node.meta["val"].shape] for node in (new, old)]
        if shapes[0] != shapes[1]:
            found, expected = (f"[{', '.join(map(str, shape))}]" for shape in shapes)
            raise RewriteError(f"{where_} returns {found}; the value of {where(old)} that it replaces is {expected}")
        dtypes = [node.meta["val"].dtype for node in (new, old)]
        if dtypes[0] != dtypes[1]:
            raise RewriteError(
                f"{where_} returns {_dtype(dtypes[0])} where {_dtype(dtypes[1])} is expected; "
                "bring it back with .to(x.dtype) of a capture"
            )


def _dtype(dtype: torch.dtype) -> str:
    return "the model's dtype" if dtype == PROBE_DTYPE else str(dtype).removeprefix("torch.")


def _check_settings(traced: Traced, binding: Binding, where_: str) -> None:
    """Refuse to drop in silence what a pattern let through unseen: a window, say."""
    if binding.anchor is None or not binding.uses:
        return
    values = dict(zip(SETTINGS, binding.anchor.args[3:8], strict=True))
    given = set(binding.uses[0].captured)
    for name in _DROPPED:
        if name == "window" and "mask" in given:
            continue  # masks show the window
        if values[name] is not None and name in binding.uses[0].open and not traced.uses:
            raise RewriteError(
                f"{where_}: the matched attention has {name}={values[name]}, which the pattern leaves open and the "
                f"replacement, calling no attention(), drops; make {name} a capture and use it, or reject it in check()"
            )


def _insert(
    root: fx.GraphModule,
    traced: Traced,
    placed: Mapping[str, fx.Node | Weight],
    outputs: tuple[fx.Node, ...],
    rewrite: Rewrite,
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Copy the traced nodes in before the first output; returns them, and those that give the results."""
    graph = root.graph
    values: dict[fx.Node, fx.Node] = {}
    fresh: list[fx.Node] = []
    with graph.inserting_before(outputs[0]):
        for node in traced.graph.nodes:
            if node.op == "output":
                continue
            if node.op == "placeholder":
                source = placed.get(str(node.target))
                if isinstance(source, fx.Node):
                    values[node] = source
                    continue
                if source is None or not node.users:
                    continue  # the stand-in of the past
                new = graph.get_attr(source.name)
                new.meta.update(node.meta)
            elif node.op == "get_attr" and str(node.target) in traced.constants:
                name = f"{rewrite.name}_{node.target}"
                while hasattr(root, name):
                    name += "_"
                root.register_buffer(name, traced.constants[str(node.target)].to(next(root.parameters()).device))
                new = graph.get_attr(name)
                new.meta.update(node.meta)
            else:
                new = graph.node_copy(node, lambda n: values.get(n))
            new.meta.pop("nn_module_stack", None)
            values[node] = new
            fresh.append(new)
    _read_cached_sizes(graph, traced, values, fresh)
    results = [values[node] for node in traced.outputs]
    for index, result in enumerate(results):
        if result not in fresh:  # a capture as it is: a node of its own can bear the provenance
            with graph.inserting_before(outputs[0]):
                results[index] = graph.call_function(aten.alias.default, (result,))
            results[index].meta["val"] = result.meta.get("val")
            fresh.append(results[index])
    return fresh, results


def _read_cached_sizes(graph: fx.Graph, traced: Traced, values: dict[fx.Node, fx.Node], fresh: list[fx.Node]) -> None:
    """Read the number of cached tokens off what the cache returns: in the trace it was a sum of stand-ins."""
    cached = next(
        (values[n] for n in traced.graph.nodes if n.target is operator.getitem and _is_cache(n.args[0])), None
    )
    if cached is None:
        return
    sizes = [node for node in values if is_size(node) and node.op == "call_function" and size_of(node) == "S"]
    with graph.inserting_after(cached):
        read = graph.call_function(aten.sym_size.int, (cached, 2))
    for node in sizes:
        read.meta.update(values[node].meta)
        values[node].replace_all_uses_with(read)
        values[node] = read
    fresh.append(read)


def _is_cache(value: Any) -> bool:
    return isinstance(value, fx.Node) and value.target is CACHE_OP


def _finish(graph: fx.Graph, fresh: list[fx.Node], site: AttentionSite, layer: Any) -> dict[fx.Node, fx.Node]:
    """Replace what tracing fixed: the layer, the past, dtype and device; says which nodes gave way to which."""
    changed: dict[fx.Node, fx.Node] = {}
    hidden = next(node for node in graph.nodes if node.name == site.hidden)
    for node in list(fresh):
        if node.op != "call_function":
            continue
        if node.target is ANCHOR_OP:
            node.update_arg(8, layer)
        elif node.target is CACHE_OP:
            node.args = (*node.args[:2], None, layer)
        elif node.target is aten._to_copy.default:
            before = set(graph.nodes)
            follow_dtype(graph, node, hidden)
            for new in set(graph.nodes) - before:
                changed[node] = new
        elif not is_size(node):
            for name, fixed in (("device", torch.device("meta")), ("dtype", PROBE_DTYPE)):
                if node.kwargs.get(name) == fixed:
                    with graph.inserting_after(hidden):
                        read = graph.call_function(getattr, (hidden, name))
                    node.update_kwarg(name, read)
                    fresh.append(read)
    return changed

"""Ordinary attention in a graph that rewrites have edited: how it meets the model's cache and attention implementation.

While rewrites go over it a graph is pure: `attnedit::attention` and `attnedit::cache` stand in it. `lower` puts modules
in their place that use the cache and the attention implementation that the model is set to; `pure` takes them out.
"""

from __future__ import annotations

import copy
import json
import operator
from collections import OrderedDict
from typing import Any

from torch import fx, nn
from torch.fx.passes.tools_common import stable_topological_sort

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import RewriteError, UsageError
from attnedit.compiler.graph import provenance
from attnedit.compiler.graph.dataflow import anchors
from attnedit.compiler.graph.spec import verify
from attnedit.compiler.graph.surgery import prune, substitute, with_graph
from attnedit.compiler.rewriting.apply import apply
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.compiler.rewriting.graft import CACHE_OP, SiteGraph
from attnedit.compiler.rewriting.pattern import ANCHOR_OP, Pattern
from attnedit.compiler.rewriting.rewrite import Rewrite, options_of, rewrite_from
from attnedit.targets.attention.rewritten.config import RewrittenConfig
from attnedit.targets.attention.rewritten.module import Attend, DenseMask, KVCache
from attnedit.targets.attention.site_graph import checked_cache

KV_CACHE_MODULE = "kv_cache"
ATTEND_MODULE = "attend"
MASK_MODULE = "dense_mask"
LOWERING = "attnedit.lower"

# With the class, which keeps its id from being given to another.
_PATTERNS: OrderedDict[tuple[int, str, str], tuple[type[Rewrite], Pattern]] = OrderedDict()
_PATTERNS_KEPT = 32


def lower(root: fx.GraphModule, site: AttentionSite, model_config: Any, config: RewrittenConfig) -> fx.GraphModule:
    """Put modules that use the model's cache and attention implementation in place of the ops of a pure graph.

    Args:
        root: the pure graph; left as it was.
        site: its site.
        model_config: the model's configuration.
        config: what was done to the graph.

    Raises:
        RewriteError: nothing, or more than one thing, would be cached.
        CaptureError: the attention module is not given the cache.
    """
    graph: fx.Graph = copy.deepcopy(root.graph)
    result = with_graph(root, graph, f"Rewritten{type(root).__name__.removeprefix('Rewritten')}")
    attentions, caches = anchors(graph), [node for node in graph.nodes if node.target is CACHE_OP]
    names = ", ".join(entry["rewrite"].rpartition(":")[2] for entry in config.rewrites)
    if len(caches) > 1 or (not caches and len(attentions) != 1):
        found = f"{len(caches)} calls of cache()" if caches else f"{len(attentions)} of attention() and none of cache()"
        raise RewriteError(
            f"{site.name} after {names}: {found}, so it is not clear what the layer caches; call cache(key, value) "
            "once, and attend to what it returns"
        )
    past = checked_cache(graph, site)
    provenance.mark([past], (attentions or caches)[0], LOWERING)
    result.add_module(KV_CACHE_MODULE, KVCache(config, bool(caches)))
    for anchor in attentions:
        given: Any = anchor.args
        query, key, value, mask, scale, softcap, sinks, window, _ = given
        name = _free_name(result, ATTEND_MODULE)
        result.add_module(name, Attend(model_config, site.layer_idx, float(scale), softcap, window))
        fresh: list[fx.Node] = []
        with graph.inserting_before(anchor):
            if not caches:
                both = graph.call_module(KV_CACHE_MODULE, (key, value, past))
                both.meta["val"] = tuple(node.meta.get("val") for node in (key, value) if isinstance(node, fx.Node))
                keys, values = (graph.call_function(operator.getitem, (both, index)) for index in (0, 1))
                for node, source in ((keys, key), (values, value)):
                    node.meta["val"] = source.meta.get("val") if isinstance(source, fx.Node) else None
                fresh, key, value = [both, keys, values], keys, values
            node = graph.call_module(name, (query, key, value, mask, sinks))
        provenance.replace(anchor, node, LOWERING, fresh)
    for cache in caches:
        with graph.inserting_before(cache):
            node = graph.call_module(KV_CACHE_MODULE, (*cache.args[:2], past))
        provenance.replace(cache, node, LOWERING)
    _lower_mask(result, site)
    result.graph.lint()
    result.recompile()
    result.train(root.training)
    return result


def _lower_mask(root: fx.GraphModule, site: AttentionSite) -> None:
    """Give replacements that read the mask themselves one in the form that they were traced with."""
    graph = root.graph
    nodes = {node.name: node for node in graph.nodes}
    mask = nodes.get(site.mask or "")
    if mask is None:
        return
    readers = [user for user in mask.users if not _is_attend(user, root)]
    if not readers:
        return
    both = next(n for n in graph.nodes if n.op == "call_module" and n.target == KV_CACHE_MODULE)
    root.add_module(MASK_MODULE, DenseMask(site.window))
    with graph.inserting_after(both):
        keys = graph.call_function(operator.getitem, (both, 0))
    with graph.inserting_after(keys):
        dense = graph.call_module(MASK_MODULE, (mask, nodes[site.hidden], keys))
    dense.meta["val"] = mask.meta.get("val")
    provenance.mark([keys, dense], mask, LOWERING)
    for reader in readers:
        reader.replace_input_with(mask, dense)
    stable_topological_sort(root)


def _is_attend(node: fx.Node, root: fx.GraphModule) -> bool:
    return node.op == "call_module" and isinstance(root.get_submodule(str(node.target)), Attend)


def pure(module: fx.GraphModule, site: AttentionSite) -> fx.GraphModule:
    """The pure graph of a module that `lower` made, with the same parts.

    Raises:
        UsageError: its nodes say no longer what they compute, as after pickling.
    """
    graph: fx.Graph = copy.deepcopy(module.graph)
    kv_cache: Any = module.get_submodule(KV_CACHE_MODULE)
    for node in list(graph.nodes):
        target = str(node.target)
        arguments: Any = node.args
        part: Any = module.get_submodule(target) if node.op == "call_module" else None
        if isinstance(part, Attend):
            query, key, value, mask, sinks = arguments
            if not kv_cache.explicit:
                key, value = (n.args[0].args[n.args[1]] for n in (key, value))
            with graph.inserting_before(node):
                settings = (mask, part.scale, part.softcap, sinks, part.window, site.layer_idx)
                new = graph.call_function(ANCHOR_OP, (query, key, value, *settings))
        elif isinstance(part, DenseMask):
            node.replace_all_uses_with(arguments[0])
            graph.erase_node(node)
            continue
        elif isinstance(part, KVCache) and part.explicit:
            with graph.inserting_before(node):
                new = graph.call_function(CACHE_OP, (*node.args[:2], None, site.layer_idx))
        else:
            continue
        substitute(node, new)
    prune(graph)
    if any("val" not in node.meta for node in anchors(graph)):
        raise UsageError(
            f"{site.name}: its graph lost what is known of its nodes (pickle drops it); save and load instead"
        )
    verify(graph, "pure", root=module, loose=site.mask, error=UsageError)
    return with_graph(module, graph)


def rewritten_graph(model: nn.Module, site: AttentionSite, config: RewrittenConfig) -> fx.GraphModule:
    """Apply the rewrites of a saved result again; the parts get the values of `Rewrite.parts`.

    Args:
        model: the live model that ``site`` was captured from, or one of the same shape.
        site: the attention site.
        config: what was done to it.

    Raises:
        UsageError: a rewrite cannot be imported, or does something else now.
    """
    module = model.get_submodule(site.name)
    state = SiteGraph(site, module, graph_module(model, site))
    for entry in config.rewrites:
        rewrite = rewrite_from(entry["rewrite"], entry["options"])
        decisions = list(entry["decisions"])
        try:
            outcome = apply(rewrite, _pattern(rewrite, site), state, Fuel(), replay=decisions)
        except RewriteError as error:
            raise UsageError(f"{entry['rewrite']} no longer fits this model: {error}") from error
        if outcome.decisions != decisions:
            raise UsageError(
                f"{site.name}: {entry['rewrite']} matched {len(decisions)} times when this model was rewritten, "
                f"{len(outcome.decisions)} times now; install the version of it that was used"
            )
    return lower(state.root, site, config_of(model, module), config)


def config_of(model: nn.Module, module: nn.Module) -> Any:
    """The configuration that names the attention implementation of an attention module."""
    return getattr(module, "config", None) or getattr(model, "config", None)


def _pattern(rewrite: Rewrite, site: AttentionSite) -> Pattern:
    """The pattern of a rewrite, traced once for each kind of site."""
    key = (id(type(rewrite)), json.dumps(options_of(rewrite), sort_keys=True), site.kind)
    if key not in _PATTERNS:
        _PATTERNS[key] = (type(rewrite), Pattern.of(rewrite.pattern, site))
        while len(_PATTERNS) > _PATTERNS_KEPT:
            _PATTERNS.popitem(last=False)
    return _PATTERNS[key][1]


def _free_name(root: nn.Module, name: str) -> str:
    taken = (f"{name}_{number}" for number in range(1, 1000))
    return name if not hasattr(root, name) else next(other for other in taken if not hasattr(root, other))


__all__ = ["KV_CACHE_MODULE", "Attend", "KVCache", "RewrittenConfig", "config_of", "lower", "pure", "rewritten_graph"]

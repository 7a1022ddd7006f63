"""The graph of an attention module with rope and attention replaced by latent attention."""

from __future__ import annotations

import copy

import torch
from torch import fx, nn
from torch.fx.traceback import NodeSource, NodeSourceAction

from attnedit.compiler.capture import graph_module
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.sites import AttentionSite
from attnedit.targets.attention.mla import MLA, MLAConfig

PASS_NAME = "attnedit.mla"
MLA_MODULE = "mla"

_CACHE_ARGUMENTS = ("past_key_values", "past_key_value", "layer_past")
_ANCHOR_ARGUMENTS = ("q", "k", "v", "mask", "scale", "softcap", "sinks", "window", "layer")


def mla_graph(
    model: nn.Module, site: AttentionSite, config: MLAConfig, output_projection: nn.Module | None = None
) -> fx.GraphModule:
    """Build the graph of one attention module with rope and attention replaced by latent attention.

    The weights of the new module ``mla`` are random, in dtype and on the device of the output projection; all other
    modules are the source's own.

    Args:
        model: the live model that ``site`` was captured from, or one of the same shape.
        site: the attention site.
        config: shape of the latent attention; it must fit the site.
        output_projection: a module to use in place of the source's, with parameters of the same names and shapes.

    Returns:
        A GraphModule with the signature of the source's attention module. Parts that nothing uses any more are gone.

    Raises:
        UsageError: ``config`` or ``output_projection`` does not fit the site.
        CaptureError: the attention module is not given the cache, or lacks a rotary embedding that is asked for.
    """
    _check_fit(site, config)
    root = graph_module(model, site)
    projection = root.get_submodule(site.o_proj.module)
    like = next(projection.parameters())
    root.add_module(MLA_MODULE, MLA(config, device=like.device, dtype=like.dtype))
    if output_projection is not None:
        _check_same_parameters(site, projection, output_projection)
        root.set_submodule(site.o_proj.module, output_projection)
    graph = copy.deepcopy(root.graph)
    _rewrite(graph, site, config)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.lint()
    # A new GraphModule takes along only what its graph uses.
    result = fx.GraphModule(root, graph, class_name=f"MLA{type(model.get_submodule(site.name)).__name__}")
    result.train(root.training)
    return result


def _rewrite(graph: fx.Graph, site: AttentionSite, config: MLAConfig) -> None:
    """Replace everything between query, key, value and the anchor's output by one call."""
    nodes = {node.name: node for node in graph.nodes}
    anchor = nodes[site.anchor]
    arguments = {**dict(zip(_ANCHOR_ARGUMENTS, anchor.args, strict=False)), **anchor.kwargs}
    cos = sin = None
    if config.rope_columns:
        if site.rope is None:
            raise CaptureError(f"{site.name}: it has no rotary embedding, so it can have no rotary slots")
        cos, sin = nodes[site.rope.cos], nodes[site.rope.sin]
    with graph.inserting_before(anchor):
        if config.folded:
            kv_input = nodes[site.hidden]
            fresh = []
        else:
            key, value = (
                graph.call_method("flatten", (graph.call_method("transpose", (node, 1, 2)), 2))
                for node in (nodes[site.key], nodes[site.value])
            )
            kv_input = graph.call_function(torch.cat, ((key, value),), {"dim": -1})
            fresh = [*key.all_input_nodes, *value.all_input_nodes, key, value, kv_input]
        call = graph.call_module(
            MLA_MODULE,
            (nodes[site.query], kv_input, cos, sin, arguments.get("mask"), _cache_argument(graph, site)),
        )
    for node in (*fresh, call):
        node.meta["from_node"] = [NodeSource(anchor, PASS_NAME, NodeSourceAction.REPLACE)]
        if "stack_trace" in anchor.meta:
            node.meta["stack_trace"] = anchor.meta["stack_trace"]
    anchor.replace_all_uses_with(call)
    graph.erase_node(anchor)


def _cache_argument(graph: fx.Graph, site: AttentionSite) -> fx.Node:
    node: fx.Node
    for node in graph.nodes:
        if node.op == "placeholder" and node.target in _CACHE_ARGUMENTS:
            return node
    raise CaptureError(
        f"{site.name}: its forward takes no cache (looked for {', '.join(_CACHE_ARGUMENTS)}), so none can be latent"
    )


def _check_fit(site: AttentionSite, config: MLAConfig) -> None:
    expected = {
        "num_attention_heads": site.num_attention_heads,
        "head_dim": site.head_dim,
        "v_head_dim": site.v_head_dim,
        "layer_idx": site.layer_idx,
    }
    if not config.folded:
        expected["input_size"] = site.num_key_value_heads * (site.head_dim + site.v_head_dim)
    for name, value in expected.items():
        if getattr(config, name) != value:
            raise UsageError(f"{site.name}: the configuration has {name}={getattr(config, name)}, the site {value}")
    if config.folded and not site.linear_kv:
        raise UsageError(f"{site.name}: keys or values are not linear in the hidden states, so they cannot be folded")


def _check_same_parameters(site: AttentionSite, old: nn.Module, new: nn.Module) -> None:
    """A loader rebuilds the source's module, so what replaces it must have the same keys."""
    shapes = [{name: tuple(p.shape) for name, p in module.named_parameters()} for module in (old, new)]
    if shapes[0] != shapes[1]:
        raise UsageError(
            f"{site.name}.{site.o_proj.module}: the replacement has parameters {shapes[1]}, the source {shapes[0]}"
        )

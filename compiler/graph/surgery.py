"""Graphs cut off at a node, nodes in place of others, other graphs over the parts of a module, programs as graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, fx

from attnedit.compiler.compatibility.torch_names import FakeTensor, HigherOrderOperator, own_buffers, temporary_buffers
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.anchor import reference_attention
from attnedit.compiler.graph.dataflow import anchors, where


def prune(graph: fx.Graph) -> None:
    """Remove nodes nothing uses; every op of an exported inference graph is free of side effects."""
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))


def substitute(old: fx.Node, new: fx.Node) -> None:
    """Put a node of the same value in place of another, which goes."""
    new.meta.update(old.meta)
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def cut(root: fx.GraphModule, names: Iterable[str]) -> fx.GraphModule:
    """The graph cut off at some of its nodes: forward returns their values as a tuple.

    Attention in it is computed by a fused kernel where one can, so that long windows need no logits in memory.
    """
    graph: fx.Graph = copy.deepcopy(root.graph)
    nodes = {node.name: node for node in graph.nodes}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(nodes[name] for name in names),)
    prune(graph)
    for anchor in anchors(graph):
        anchor.target = _fused_attention
    return with_graph(root, graph)


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    layer: int,
) -> Tensor:
    """Attend without logits in memory where the mask says all; arguments and result as of `attnedit::attention`.

    >>> query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    >>> mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    >>> settings = (0.3, None, None, None, 0)
    >>> expected = torch.ops.attnedit.attention(query, key, key, mask, *settings)
    >>> torch.allclose(_fused_attention(query, key, key, mask, *settings), expected, atol=1e-5)
    True
    """
    if softcap is not None or sinks is not None or mask is None or mask.dim() != 4:
        return reference_attention(query, key, value, mask, scale, softcap, sinks, window)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    output = sdpa(query, key, value, attn_mask=mask[..., : key.shape[2]], scale=scale, enable_gqa=True)
    return output.transpose(1, 2)


def with_graph(root: fx.GraphModule, graph: fx.Graph, class_name: str | None = None) -> fx.GraphModule:
    """A module that runs another graph on the parts of `root`; it takes along only those that the graph uses."""
    result = fx.GraphModule(root, graph, class_name=class_name or type(root).__name__)
    for path, part in result.named_modules():
        known = temporary_buffers(root.get_submodule(path))  # a new one saves all
        temporary_buffers(part).update(known & set(own_buffers(part)))
    return result


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

"""From the calibration stream to the tensors of one site."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, fx, nn

from attnedit.compiler.capture import graph_module
from attnedit.compiler.errors import AttneditError
from attnedit.compiler.rope import rope_angles
from attnedit.compiler.sites import AttentionSite
from attnedit.compiler.stream import AttentionInputs
from attnedit.passes.sample import FIRST_POSITIONS, LayerSample, Rotation


def part_of(model: nn.Module, site: AttentionSite, names: tuple[str, ...]) -> fx.GraphModule:
    """The site's graph cut off at some of its nodes: forward returns their values as a tuple."""
    whole = graph_module(model, site)
    graph: fx.Graph = copy.deepcopy(whole.graph)
    nodes = {node.name: node for node in graph.nodes}
    output = next(node for node in graph.nodes if node.op == "output")
    output.args = (tuple(nodes[name] for name in names),)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    return fx.GraphModule(whole, graph)


def take_sample(
    model: nn.Module,
    site: AttentionSite,
    inputs: Iterator[AttentionInputs],
    queries: int,
    seed: int,
    hidden: bool = False,
) -> LayerSample:
    """Run the site's own queries, keys and values on the calibration stream.

    Args:
        model: the live source model.
        site: its attention site.
        inputs: batches of the attention module's arguments.
        queries: sampled queries per sequence, all positions where there are fewer; the same in all sequences.
        seed: of the sampled positions.
        hidden: whether to keep the hidden states.

    Raises:
        AttneditError: there are numbers among them that are not finite.
    """
    names = (site.query, site.key, site.value, site.hidden)
    rope = site.rope
    graph = part_of(model, site, names + ((rope.cos, rope.sin) if rope else ()))
    biased = part_of(model, site, (site.mask,)) if site.bias and site.mask else None
    bias: Tensor | None = None
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    states: list[Tensor] = []
    tables: tuple[Tensor, Tensor] | None = None
    positions = torch.zeros(0)
    for batch in inputs:
        query, key, value, before, *angles = graph(*batch.args, **batch.kwargs)
        if not parts:
            positions = _positions(query.shape[2], queries, seed + site.layer_idx).to(query.device)
        parts.append((query[:, :, positions].float(), key.float(), value.float()))
        states += [before.float()] if hidden else []
        if biased is not None and bias is None:
            # Windows have no padding, so that it is the same for all.
            added = biased(*batch.args, **batch.kwargs)[0]
            if added is not None:  # a mask of nothing but causality
                bias = added[0, :, positions].float()
                bias = bias - bias.amax(-1, keepdim=True)
        if angles and tables is None:
            cos, sin = (a.float().reshape(-1, *a.shape[-2:])[0] for a in angles)
            tables = cos, sin
    query, key, value = (torch.cat(column) for column in zip(*parts, strict=True))
    for what, tensor in (("queries", query), ("keys", key), ("values", value)):
        if not bool(torch.isfinite(tensor).all()):
            raise AttneditError(
                f"{site.name}: {what} are not finite on the calibration data; load the model in bfloat16 or float32"
            )
    weight, _ = output_weight(model, site)
    sinks = model.get_submodule(site.name).get_parameter(site.sinks).float() if site.sinks else None
    return LayerSample(
        query=query,
        positions=positions,
        key=key,
        value=value,
        cos=tables[0] if tables else None,
        sin=tables[1] if tables else None,
        rotation=_rotation(model, site, query.device),
        output_weight=weight,
        scale=site.scale,
        softcap=site.softcap,
        window=site.window,
        sinks=sinks,
        bias=bias,
        fixed_output=site.output_gate,
        hidden=torch.cat(states) if hidden else None,
    )


def _positions(length: int, count: int, seed: int) -> Tensor:
    """The first few positions and one random position of equal strata of the rest, ascending [count].

    Every position where there are fewer. The first tokens become attention sinks, whose states all others depend on.
    """
    if count >= length:
        return torch.arange(length)
    first = min(FIRST_POSITIONS, count)
    offset = torch.rand(count - first, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    width = (length - first) / max(count - first, 1)
    rest = first + ((torch.arange(count - first) + offset) * width).long()
    return torch.cat([torch.arange(first), rest.clamp(max=length - 1)])


def output_weight(model: nn.Module, site: AttentionSite) -> tuple[Tensor, nn.Module]:
    """o_proj's weight by head [H, D, e] in float32, and the module itself."""
    attention = model.get_submodule(site.name)
    weight = attention.get_parameter(site.o_proj.weight).detach().float()
    if site.o_proj.transposed:
        weight = weight.T
    by_head = weight.reshape(len(weight), site.num_attention_heads, site.v_head_dim).transpose(0, 1)
    return (by_head * site.o_proj.scale).contiguous(), attention.get_submodule(site.o_proj.module)


def _rotation(model: nn.Module, site: AttentionSite, device: torch.device) -> Rotation | None:
    found = rope_angles(model, site)
    if site.rope is None or found is None:
        return None
    frequency, scaling = found
    real, imaginary = zip(*site.rope.pairs, strict=True)
    return Rotation(
        real=torch.tensor(real, device=device),
        imaginary=torch.tensor(imaginary, device=device),
        columns=torch.tensor(site.rope.columns, device=device),
        frequency=frequency.to(device),
        scaling=scaling,
    )

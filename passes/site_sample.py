"""From the calibration stream to the tensors of one site.

How much is looked at depends on the device: a GPU does in a minute what takes two cores an hour.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.rope import rope_angles
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.token_windows import context_length
from attnedit.compiler.errors import AttneditError
from attnedit.compiler.execution.stream import AttentionInputs
from attnedit.compiler.graph.surgery import cut
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.passes.sample import FIRST_POSITIONS, LayerSample, Rotation

NEAR = 1024
"""Positions up to which a long sequence's queries are sampled evenly."""
SHORT_WORK, LONG_WORK = 0.5, 1.0
"""Work on windows up to `NEAR` tokens and on longer ones, where there are both; see `sampled_queries`."""


@dataclass
class _Taken:
    """What was taken of the batches of one length and one table of angles: behind images positions differ."""

    length: int
    positions: Tensor
    parts: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    hidden: list[Tensor] = field(default_factory=list)
    bias: Tensor | None = None
    tables: tuple[Tensor, ...] = ()


def take_samples(
    model: PreTrainedModel,
    site: AttentionSite,
    inputs: Iterable[AttentionInputs],
    queries: Callable[[int], int],
    seed: int,
    hidden: bool = False,
) -> list[LayerSample]:
    """Run the site's own queries, keys and values on the calibration stream.

    Args:
        model: the live source model.
        site: its attention site.
        inputs: batches of the attention module's arguments.
        queries: how many to sample of each sequence, by its length; all positions where there are fewer. They are the
            same in all sequences of one length.
        seed: of the sampled positions.
        hidden: whether to keep the hidden states.

    Returns:
        A sample for each length of sequences, and each table of rotary angles among them.

    Raises:
        AttneditError: there are numbers among them that are not finite.
    """
    names = (site.query, site.key, site.value, site.hidden)
    rope = site.rope
    graph = cut(graph_module(model, site), names + ((rope.cos, rope.sin) if rope else ()))
    biased = cut(graph_module(model, site), (site.mask,)) if site.bias and site.mask else None
    taken: list[_Taken] = []
    for batch in inputs:
        query, key, value, before, *angles = graph(*batch.args, **batch.kwargs)
        length = query.shape[2]
        tables = tuple(a.float().reshape(-1, *a.shape[-2:])[0] for a in angles)
        part = next((part for part in taken if part.length == length and _equal(part.tables, tables)), None)
        if part is None:
            positions = _positions(length, queries(length), seed + site.layer_idx).to(query.device)
            part = _Taken(length, positions, tables=tables)
            taken.append(part)
            # Windows have no padding, so that it is the same for all.
            added = None if biased is None else biased(*batch.args, **batch.kwargs)[0]
            if added is not None:  # otherwise a mask of nothing but causality
                bias = added[0, :, positions].float()
                part.bias = bias - bias.amax(-1, keepdim=True)
        part.parts.append((query[:, :, part.positions].float(), key.float(), value.float()))
        part.hidden += [before.float()] if hidden else []
    weight, _ = output_weight(model, site)
    sinks = model.get_submodule(site.name).get_parameter(site.sinks).float() if site.sinks else None
    samples = []
    for part in taken:
        query, key, value = (torch.cat(column) for column in zip(*part.parts, strict=True))
        part.parts.clear()
        for what, tensor in (("queries", query), ("keys", key), ("values", value)):
            if not bool(torch.isfinite(tensor).all()):
                raise AttneditError(
                    f"{site.name}: {what} are not finite on the calibration data; load the model in bfloat16 or float32"
                )
        samples.append(
            LayerSample(
                query=query,
                positions=part.positions,
                key=key,
                value=value,
                cos=part.tables[0] if part.tables else None,
                sin=part.tables[1] if part.tables else None,
                rotation=_rotation(model, site, query.device),
                output_weight=weight,
                scale=site.scale,
                softcap=site.softcap,
                window=site.window,
                sinks=sinks,
                bias=part.bias,
                fixed_output=site.output_gate,
                hidden=torch.cat(part.hidden) if hidden else None,
            )
        )
    return samples


def _equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def sampled_queries(windows: Sequence[Tensor], total: int) -> Callable[[int], int]:
    """How many queries to sample of each window, by its length.

    A query of a long window meets more keys, so it is more work: that of `total` queries in windows of `NEAR` tokens is
    what there is for windows of one kind, short or long; where there are both, `SHORT_WORK` and `LONG_WORK` of it.

    Args:
        windows: token ids [N, T] of each length T.
        total: queries over all windows, if none were longer than `NEAR`.
    """
    tokens = [sum(part.numel() for part in windows if (part.shape[1] > NEAR) == long) for long in (False, True)]
    work = (SHORT_WORK, LONG_WORK) if all(tokens) else (1.0, 1.0)

    def count(length: int) -> int:
        """Of each window of a length: by tokens among those of its kind."""
        long = length > NEAR
        among = tokens[long] or tokens[not long]  # there may be no other short ones than beginnings
        queries = total * work[long] * min(1.0, _mean_position(NEAR) / _mean_position(length))
        return max(1, int(queries * length / among))

    return count


@dataclass(frozen=True)
class Effort:
    """Of the closed form, on one kind of device.

    Attributes:
        queries: sampled queries, as a multiple of what the options of a fit ask for.
        measured_long: windows of each longer length that losses of layers are measured on.
    """

    queries: float
    measured_long: int


ON_CPU = Effort(queries=1.0, measured_long=1)
ON_GPU = Effort(queries=2.0, measured_long=3)
"""Both take a half and a quarter of SmolLM2's cache further (docs/notebook/2026-11-long-context.md)."""


def effort_on(model: PreTrainedModel) -> Effort:
    """What the device of the model's embeddings, where calibration runs, can do."""
    return ON_CPU if embedding_weight(model).device.type == "cpu" else ON_GPU


def queries_for(model: PreTrainedModel, windows: Sequence[Tensor], total: int) -> Callable[[int], int]:
    """`sampled_queries` of the windows, as many times `total` as the model's device can do."""
    return sampled_queries(windows, round(effort_on(model).queries * total))


def _mean_position(length: int) -> float:
    """Mean of the positions that `_positions` samples; where they are not many."""
    near = min(NEAR, length)
    return (near**2 / 2 + NEAR * (length - near)) / (near + NEAR * math.log(length / near))


def _positions(length: int, count: int, seed: int) -> Tensor:
    """The first few positions and one random position of each of `count` strata of the rest, ascending [count].

    Every position where there are fewer. The first tokens become attention sinks, whose states all others depend on.
    Strata are of one length up to `NEAR`, and grow in proportion to their position from there on: each doubling of the
    context counts alike.
    """
    if count >= length:
        return torch.arange(length)
    first = min(FIRST_POSITIONS, count)
    offset = torch.rand(count - first, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    place = (torch.arange(count - first) + offset) / max(count - first, 1)
    near = min(NEAR, length) - first
    far = NEAR * math.log(max(1.0, length / NEAR))
    along = place * (near + far)
    spread = torch.where(along < near, along, near + NEAR * ((along - near) / NEAR).clamp(min=0).expm1())
    rest = (first + spread).long().clamp(max=length - 1)
    return torch.cat([torch.arange(first), _distinct(rest, first, length)])


def _distinct(positions: Tensor, least: int, end: int) -> Tensor:
    """Ascending positions in `least` to `end` - 1, moved by as little as makes them all different."""
    steps = torch.arange(len(positions))
    up = (positions - steps).cummax(0).values + steps
    return torch.minimum(up, end - len(positions) + steps).clamp(min=least)


def output_weight(model: nn.Module, site: AttentionSite) -> tuple[Tensor, nn.Module]:
    """o_proj's weight by head [H, D, e] in float32, and the module itself."""
    attention = model.get_submodule(site.name)
    weight = attention.get_parameter(site.o_proj.weight).detach().float()
    if site.o_proj.transposed:
        weight = weight.T
    by_head = weight.reshape(len(weight), site.num_attention_heads, site.v_head_dim).transpose(0, 1)
    return (by_head * site.o_proj.scale).contiguous(), attention.get_submodule(site.o_proj.module)


def _rotation(model: PreTrainedModel, site: AttentionSite, device: torch.device) -> Rotation | None:
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
        context=context_length(model),
    )

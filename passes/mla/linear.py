"""Queries, keys and values as linear maps of the hidden states, for classes that have neither norms nor biases there.

Where the source has a norm on queries and keys, or biases, the best map is a regression on calibration tokens: first
one factor per feature on the source's own projection, then ridge regression of what is left. Where the source is
linear itself the map is its own projection, and nothing is lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnedit.compiler.capture.sites import AttentionSite, Projection
from attnedit.compiler.errors import CaptureError
from attnedit.passes.sample import LayerSample
from attnedit.passes.solve import cross_moment, ridge_regression, second_moment

RIDGE = 0.1
"""Ridge of the regression as a fraction of the mean diagonal of its Gram matrix: this times hidden sizes per token."""


@dataclass(frozen=True)
class LinearSite:
    """The maps of one site, D hidden size; float64.

    Attributes:
        query: [H d, D].
        source: keys, then values, groups flattened [G d + G e, D].
        errors: energy of the maps' errors on calibration tokens, as a fraction of that of queries, keys and values.
    """

    query: Tensor
    source: Tensor
    errors: tuple[float, float, float]


@torch.no_grad()
def linearise(
    model: nn.Module, site: AttentionSite, samples: Sequence[LayerSample]
) -> tuple[LinearSite, list[LayerSample]]:
    """Find the maps, and the samples as they are with them: the teacher of each is the sample itself.

    Args:
        model: the live source.
        site: its attention site.
        samples: of the site, with hidden states.

    Raises:
        CaptureError: no projection was found that queries, keys or values come from.
    """
    everywhere = [_hidden(sample) for sample in samples]
    seen = [hidden[:, sample.positions] for hidden, sample in zip(everywhere, samples, strict=True)]
    token = [sample.token_weight[..., None] for sample in samples]
    parts: dict[str, tuple[Projection | None, list[Tensor], list[Tensor], list[Tensor]]] = {
        "query": (site.q_proj, seen, [s.query for s in samples], [torch.ones_like(s[..., :1]) for s in seen]),
        "key": (site.k_proj, everywhere, [s.key for s in samples], token),
        "value": (site.v_proj, everywhere, [s.value for s in samples], token),
    }
    maps, errors = [], []
    states: list[dict[str, Tensor]] = [{} for _ in samples]
    for what, (projection, inputs, wanted, weights) in parts.items():
        if projection is None:
            raise CaptureError(f"{site.name}: no projection was found for its {what}, so no map can replace it")
        x, weight = (torch.cat([part.flatten(0, 1) for part in found]) for found in (inputs, weights))
        y = torch.cat([part.transpose(1, 2).flatten(2).flatten(0, 1) for part in wanted])
        linear = _regress(_weight(model, site, projection), x, y, weight)
        error = (x @ linear.float().T - y).square() * weight
        errors.append(float(error.sum() / (y.square() * weight).sum().clamp(min=1e-30)))
        maps.append(linear)
        for state, part, like in zip(states, inputs, wanted, strict=True):
            flat = part @ linear.float().T
            state[what] = flat.unflatten(2, (like.shape[1], like.shape[3])).transpose(1, 2)
    site_maps = LinearSite(maps[0], torch.cat(maps[1:]), (errors[0], errors[1], errors[2]))
    mapped = [
        dataclasses.replace(
            sample, query=state["query"], key=state["key"], value=state["value"], hidden=None, teacher=sample
        )
        for sample, state in zip(samples, states, strict=True)
    ]
    return site_maps, mapped


def _hidden(sample: LayerSample) -> Tensor:
    if sample.hidden is None:
        raise AssertionError("the sample was taken with hidden states")
    return sample.hidden


def _weight(model: nn.Module, site: AttentionSite, projection: Projection) -> Tensor:
    """Weight of a projection [features, D] in (head, dim) order, float64."""
    weight = model.get_submodule(site.name).get_parameter(projection.weight).detach().double()
    weight = (weight.T if projection.transposed else weight) * projection.scale
    return weight if projection.rows is None else weight[list(projection.rows)]


def _regress(weight: Tensor, x: Tensor, y: Tensor, token: Tensor) -> Tensor:
    """Least squares of y [M, F] on x [M, D], tokens weighted [M, 1], close to the rows of a weight.

    Returns:
        [F, D] in float64.
    """
    share = token.flatten()
    gram, cross = second_moment(x, share), cross_moment(x, y, share)
    # One factor per feature: a norm divides by what changes from token to token, and multiplies by a weight.
    energy = torch.einsum("fd,de,fe->f", weight, gram, weight).clamp(min=1e-30)
    start = weight * (torch.einsum("fd,df->f", weight, cross) / energy)[:, None]
    rest = cross - gram @ start.T
    if float(rest.abs().max()) <= 1e-4 * float(cross.abs().max()):
        return weight  # linear already; what is left is rounding
    ridge = RIDGE * x.shape[1] / len(x) * float(gram.diagonal().mean())
    return start + ridge_regression(gram, rest, torch.zeros_like(rest), ridge)[0].T

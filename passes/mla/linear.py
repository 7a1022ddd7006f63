"""Queries, keys and values as linear maps of the hidden states, for classes that have neither norms nor biases there.

Where the source has a norm on queries and keys, or biases, the best map is a regression on calibration tokens: first
one factor per feature on the source's own projection, then ridge regression of what is left. Where the source is
linear itself the map is its own projection, and nothing is lost.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnedit.compiler.errors import CaptureError
from attnedit.compiler.sites import AttentionSite, Projection
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
def linearise(model: nn.Module, site: AttentionSite, sample: LayerSample) -> tuple[LinearSite, LayerSample]:
    """Find the maps, and the sample as it is with them: its teacher is the sample itself.

    Args:
        model: the live source.
        site: its attention site.
        sample: of the site, with hidden states.

    Raises:
        CaptureError: no projection was found that queries, keys or values come from.
    """
    hidden = sample.hidden
    if hidden is None:
        raise AssertionError("the sample was taken with hidden states")
    seen = hidden[:, sample.positions]
    token = sample.token_weight[..., None]
    parts: dict[str, tuple[Projection | None, Tensor, Tensor, Tensor | None]] = {
        "queries": (site.q_proj, seen, sample.query, None),
        "keys": (site.k_proj, hidden, sample.key, token),
        "values": (site.v_proj, hidden, sample.value, token),
    }
    maps, states, errors = [], [], []
    for what, (projection, inputs, wanted, weight) in parts.items():
        if projection is None:
            raise CaptureError(f"{site.name}: no projection was found that {what} come from, so no map can replace it")
        flat = wanted.transpose(1, 2).flatten(2)
        linear = _regress(_weight(model, site, projection), inputs, flat, weight)
        found = inputs @ linear.float().T
        error = (found - flat).square() * (1.0 if weight is None else weight)
        energy = flat.square() * (1.0 if weight is None else weight)
        errors.append(float(error.sum() / energy.sum().clamp(min=1e-30)))
        maps.append(linear)
        states.append(found.unflatten(2, (wanted.shape[1], wanted.shape[3])).transpose(1, 2))
    query, key, value = states
    site_maps = LinearSite(maps[0], torch.cat(maps[1:]), (errors[0], errors[1], errors[2]))
    return site_maps, dataclasses.replace(sample, query=query, key=key, value=value, hidden=None, teacher=sample)


def _weight(model: nn.Module, site: AttentionSite, projection: Projection) -> Tensor:
    """Weight of a projection [features, D] in (head, dim) order, float64."""
    weight = model.get_submodule(site.name).get_parameter(projection.weight).detach().double()
    weight = (weight.T if projection.transposed else weight) * projection.scale
    return weight if projection.rows is None else weight[list(projection.rows)]


def _regress(weight: Tensor, inputs: Tensor, wanted: Tensor, token: Tensor | None) -> Tensor:
    """Least squares of wanted [N, T, F] on inputs [N, T, D], tokens weighted [N, T, 1], close to the rows of a weight.

    Returns:
        [F, D] in float64.
    """
    x, y = inputs.flatten(0, 1), wanted.flatten(0, 1)
    share = None if token is None else token.flatten()
    gram, cross = second_moment(x, share), cross_moment(x, y, share)
    # One factor per feature: a norm divides by what changes from token to token, and multiplies by a weight.
    energy = torch.einsum("fd,de,fe->f", weight, gram, weight).clamp(min=1e-30)
    start = weight * (torch.einsum("fd,df->f", weight, cross) / energy)[:, None]
    rest = cross - gram @ start.T
    if float(rest.abs().max()) <= 1e-4 * float(cross.abs().max()):
        return weight  # linear already; what is left is rounding
    ridge = RIDGE * x.shape[1] / len(x) * float(gram.diagonal().mean())
    return start + ridge_regression(gram, rest, torch.zeros_like(rest), ridge)[0].T

"""Analytic initialisation: mixing with its dual basis, expected rotation, two-sided token-weighted factorisation.

Source: attnedit docs/method.md; mixing generalises RoRoPE (TransMLA, arXiv 2502.07864) to complex bases with weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnedit.passes.mla.weights import Factors
from attnedit.passes.sample import LayerSample, Rotation, query_moment, token_shares, weighted_moment
from attnedit.passes.solve import ROUNDING, root_and_inverse, second_moment, spectrum

NEAREST_DISTANCE, DISTANCES = 0.1, 200
"""Distances over which the rotation of components that lose it is averaged: so many, log-spaced from the nearest to the
context that the model is served with."""
QUERY_FLOOR = 1e-3
"""Floor of the query energy of a component, relative to the largest of its fold."""
PSEUDO_INVERSE_FLOOR = 1e-10
NOISE_FLOOR = 1e-8
"""Least mean square of a latent value, of the largest: what is below is the rounding of float32, not to be blown up."""


@dataclass(frozen=True)
class Components:
    """Mixed rotary components of all folds, ordered by what rotation is worth to them, most first.

    Attributes:
        analysis: complex rows a, y = a . z over (group, frequency) [m, G, n].
        synthesis: complex columns s, z = sum_y s y [m, G, n]; with the analysis a dual pair.
        column: cos/sin column of the fold frequency [m].
    """

    analysis: Tensor
    synthesis: Tensor
    column: Tensor


def expected_rotation(rotation: Rotation) -> Tensor:
    """E[exp(i t theta)] over the distances of the context times the squared attention scaling [n], complex128."""
    far = math.log10(max(1, rotation.context))
    distance = torch.logspace(math.log10(NEAREST_DISTANCE), far, DISTANCES, dtype=torch.float64)
    phase = rotation.frequency.cpu()[:, None] * distance
    mean = torch.complex(phase.cos(), phase.sin()).mean(1)
    return mean.to(rotation.frequency.device) * rotation.scaling**2


def mix_components(samples: Sequence[LayerSample], fold: int, columns: Sequence[int] | None = None) -> Components:
    """Mix the complex keys of `fold` neighbouring frequencies and all groups (docs/method.md, step 1).

    Those of `columns`, one for each, come first.

    With S = E[z z^H], W = diag(sqrt(query energy)) and U the eigenvectors of W S W: y = U^H W z, z = W^-1 U y.
    """
    rotation = samples[0].rotation
    assert rotation is not None
    groups, planes = samples[0].groups, len(rotation.real)
    keys = torch.cat([sample.key.transpose(1, 2).flatten(0, 1) for sample in samples])
    z = torch.complex(keys[..., rotation.real], keys[..., rotation.imaginary])
    weight = torch.cat([share.flatten() for share in token_shares(samples)])
    square = query_moment(samples).diagonal(dim1=-2, dim2=-1)
    energy = square[:, rotation.real] + square[:, rotation.imaginary]
    energy = energy.view(groups, -1, planes).sum(1)
    rho = expected_rotation(rotation)
    order = rotation.frequency.argsort(descending=True)
    worth: list[Tensor] = []
    analyses: list[Tensor] = []
    syntheses: list[Tensor] = []
    leads: list[Tensor] = []
    # all folds of one size at once: the last may be smaller
    whole = planes - planes % fold
    for members in (order[:whole].view(-1, fold), order[whole:].view(1, -1)):
        count, size = len(members), groups * members.shape[1]
        if not members.numel():
            continue
        states = z[:, :, members].permute(2, 0, 1, 3).reshape(count, len(z), size)
        second = second_moment(states, weight)
        root = energy[:, members].transpose(0, 1).reshape(count, size).sqrt()
        root = root.clamp(min=root.amax(1, keepdim=True) * QUERY_FLOOR + 1e-30)
        values, vectors = spectrum(root[:, :, None] * second * root[:, None])
        lead = members[:, 0]
        loss = 1 - (rho[lead] / rotation.scaling**2).abs().square()
        worth.append((values * loss[:, None]).flatten())
        index = members[:, None, None].expand(-1, size, groups, -1)
        for found, rows in ((analyses, vectors.mH * root[:, None]), (syntheses, (vectors / root[:, :, None]).mT)):
            full = torch.zeros(count, size, groups, planes, dtype=torch.complex128, device=z.device)
            found.append(full.scatter_(3, index, rows.resolve_conj().reshape(count, size, groups, -1)).flatten(0, 1))
        leads.append(rotation.columns[lead].repeat_interleave(size))
    best = torch.cat(worth).argsort(descending=True, stable=True)
    column = torch.cat(leads)
    if columns is not None:
        ranked: list[int] = best.tolist()
        first = {int(column[index]): index for index in reversed(ranked)}
        kept = [first[wanted] for wanted in columns]
        best = torch.tensor(kept + [index for index in ranked if index not in set(kept)], device=best.device)
    return Components(torch.cat(analyses)[best], torch.cat(syntheses)[best], column[best])


def real_rows(states: Tensor, rotation: Rotation, head_dim: int) -> Tensor:
    """Real form of complex rows over planes: [..., m, n] -> [..., 2 m, d], rows [real part | imaginary part]."""
    shape = (*states.shape[:-1], head_dim)
    top = states.real.new_zeros(shape)
    bottom = top.clone()
    top[..., rotation.real], top[..., rotation.imaginary] = states.real, -states.imag
    bottom[..., rotation.real], bottom[..., rotation.imaginary] = states.imag, states.real
    return torch.cat([top, bottom], -2)


def _worth(varying: float, common: float) -> float:
    """Energy for the balance of keys and values.

    What all tokens have in common, a bias say, counts no more than what varies, unless nothing does.
    """
    return varying + min(varying, common) if varying > ROUNDING * common else common


@dataclass(frozen=True)
class Split:
    """What keeps its rotation and what goes into a latent, of K components in all; float64.

    Attributes:
        slots: rows of the slots [2 s, G d], and what queries meet them with [H, 2 s, d].
        columns: of cos and sin, of each slot [s].
        rest: rows of all other components of the keys [K - 2 s, G d]: logit += (maps q) . (rest k), under the rotation
            that is to be expected.
        maps: [H, K - 2 s, d].
    """

    slots: tuple[Tensor, Tensor]
    columns: Tensor
    rest: Tensor
    maps: Tensor

    @classmethod
    def of(cls, samples: Sequence[LayerSample], components: Components | None, slots: int) -> Split:
        """Let the first `slots` of the components keep their rotation; None of a layer without rope."""
        sample = samples[0]
        heads, groups, d = sample.heads, sample.groups, sample.key.shape[-1]
        share, device, rotation = heads // groups, sample.key.device, sample.rotation
        still = torch.ones(d, dtype=torch.bool, device=device)
        rows, maps = [], []
        slot_rows = torch.zeros(0, groups * d, dtype=torch.float64, device=device)
        slot_maps = torch.zeros(heads, 0, d, dtype=torch.float64, device=device)
        columns = torch.zeros(0, dtype=torch.int64, device=device)
        if components is not None and rotation is not None:
            still[rotation.real] = still[rotation.imaginary] = False
            analysis = real_rows(components.analysis.transpose(0, 1), rotation, d)  # [G, 2 m, d]
            dual = components.synthesis.conj()
            plain = real_rows(dual.transpose(0, 1), rotation, d).repeat_interleave(share, 0)
            expected = real_rows((dual * expected_rotation(rotation)).transpose(0, 1), rotation, d)
            expected = expected.repeat_interleave(share, 0)
            m = len(components.column)
            keep = torch.arange(2 * m, device=device) % m < slots
            slot_rows = analysis[:, keep].transpose(0, 1).flatten(1)
            slot_maps = plain[:, keep]
            columns = components.column[:slots]
            rows.append(analysis[:, ~keep].transpose(0, 1).flatten(1))
            maps.append(expected[:, ~keep])
        fixed = torch.eye(d, dtype=torch.float64, device=device)[still]
        rows.append(torch.block_diag(*[fixed] * groups) if len(fixed) else fixed.new_zeros(0, groups * d))
        own = torch.nn.functional.one_hot(torch.arange(heads, device=device) // share, groups).to(fixed.dtype)
        maps.append(torch.einsum("hg,id->hgid", own, fixed).flatten(1, 2))
        return cls((slot_rows, slot_maps), columns, torch.cat(rows), torch.cat(maps, 1))


def analytic(
    samples: Sequence[LayerSample], split: Split, rank: int, groups: slice = slice(None)
) -> tuple[Factors, float]:
    """Closed-form weights of a latent beside the rotary slots.

    Args:
        samples: calibration tensors of the site.
        split: of its keys.
        rank: latent size; at most the number of remaining key components (real) plus the values of the groups.
        groups: key-value groups whose values and query heads the latent is for; all unless told.

    Returns:
        The weights, for the groups' query heads, and the share of the weighted second moment of what is projected that
        the latent keeps.
    """
    sample = samples[0]
    total, e, share = sample.groups, sample.value.shape[-1], sample.heads // sample.groups
    first, end, _ = groups.indices(total)
    heads = slice(first * share, end * share)
    row, query_map = split.rest, split.maps[heads]

    moment = query_moment(samples)[heads]
    key_metric = torch.einsum("hki,hij,hlj->kl", query_map, moment, query_map) * sample.scale**2
    weight = sample.output_weight[heads].double()
    value_metric = (weight.mT @ weight).view(end - first, share, e, e).sum(1)
    pairs = [root_and_inverse(block, PSEUDO_INVERSE_FLOOR) for block in value_metric]
    value_root, value_inverse = (torch.block_diag(*[pair[i] for pair in pairs]) for i in (0, 1))
    key_root, key_inverse = root_and_inverse(key_metric, PSEUDO_INVERSE_FLOOR)

    token = token_shares(samples)
    second = weighted_moment([sample.source for sample in samples], token)
    value_root = torch.nn.functional.pad(value_root, (first * e, (total - end) * e))
    lift = torch.block_diag(key_root @ row, value_root)
    k = len(row)
    means = [
        each.source.flatten(0, 1).mT.double() @ weights.flatten().double()
        for each, weights in zip(samples, token, strict=True)
    ]
    common = (lift @ torch.stack(means).sum(0)).square()
    varying = ((lift @ second @ lift.mT).diagonal() - common).clamp(min=0)
    keys, values = (
        _worth(float(varying[part].sum()), float(common[part].sum())) for part in (slice(k), slice(k, None))
    )
    balance = math.sqrt(keys / max(values, 1e-300)) if k else 1.0
    lift[k:] *= balance if balance > 0 else 1.0
    energy, vectors = spectrum(lift @ second @ lift.mT)
    basis = vectors.flip(1)[:, :rank]
    kept = float(energy.flip(0)[:rank].sum() / energy.sum().clamp(min=1e-300))
    latent = basis.mT @ lift
    up_key = key_inverse @ basis[:k]
    up_value = (value_inverse @ basis[k:] / (balance if balance > 0 else 1.0)).view(end - first, e, rank)
    # unit mean square per latent value: fp16 and the least squares want comparable scales
    size = (latent @ second @ latent.mT).diagonal()
    size = size.clamp(min=float(size.max()) * NOISE_FLOOR + 1e-30).sqrt()
    slot_rows, slot_maps = split.slots
    factors = Factors(
        latent=(latent / size[:, None]).float(),
        slots=torch.cat([slot_rows, slot_rows.new_zeros(len(slot_rows), total * e)], 1).float(),
        columns=split.columns,
        query_latent=(torch.einsum("hki,kr->hir", query_map, up_key) * size).float(),
        query_slots=slot_maps[heads].float(),
        output=(torch.einsum("hDe,her->hDr", weight, up_value.repeat_interleave(share, 0)) * size).float(),
    )
    return factors, kept

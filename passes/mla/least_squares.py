"""Closed-form refits of an MLA layer on calibration samples: output side, query side, latent side.

All three are linear least squares given the others, so they alternate (docs/method.md, steps 4 and 5).
The logits' error is weighted as it reaches the output: pair (m, n) of head h counts p_mn, times the spread
sum_n p_mn |W_O,h (v_n - o_m)|^2 of what query m could read; an error common to all keys of a query is free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnedit.passes.mla.sample import LayerSample
from attnedit.passes.mla.solve import Blocks, conjugate_gradients, inverse_root
from attnedit.passes.mla.weights import (
    Factors,
    key_features,
    mix,
    query_features,
    rotate,
    score,
    slot_tables,
)

OUTPUT_RIDGE = 1e-3
"""Ridge of the output regression, of the mean diagonal of its Gram matrix, towards the weights it starts from."""
OUTPUT_SHARE = 10.0
"""Weight of the output's error against the logits' in the latent-side problem."""
WHITENING_RIDGE = 1e-4


@dataclass(frozen=True)
class LogitTarget:
    """Teacher logits and the weight of each, per chunk of sequences: pairs ([N', H, Q, T], [N', H, Q, T])."""

    chunks: list[tuple[slice, Tensor, Tensor]]
    total: float


def logit_target(sample: LayerSample) -> LogitTarget:
    """Weights p x spread of every sampled query and key; masked pairs weigh nothing."""
    metric = sample.output_weight.mT @ sample.output_weight  # [H, e, e]
    share = sample.heads // sample.groups
    chunks, total = [], 0.0
    for part in sample.chunks():
        logits = sample.teacher_logits(part)
        p = sample.probabilities(logits, part)
        value = sample.value[part].repeat_interleave(share, 1)
        seen = sample.mix_values(p, part)
        size = ((value @ metric) * value).sum(-1)[:, :, None, :]
        # sum_n p |W(v - o)|^2 = sum_n p |W v|^2 - (2 - sum_n p) |W o|^2; with sinks p sums to less than one
        mass = p.sum(-1, keepdim=True)
        mean = ((seen @ metric) * seen).sum(-1, keepdim=True)
        spread = ((p * size).sum(-1, keepdim=True) - (2 - mass) * mean).clamp(min=0)
        weight = p * spread
        total += float(weight.sum())
        chunks.append((part, logits, weight))
    return LogitTarget(chunks, max(total, 1e-30))


def _centred(error: Tensor, weight: Tensor) -> Tensor:
    """Weight x (error - its weighted mean over keys): the gradient of the weighted variance, in place."""
    mean = (weight * error).sum(-1, keepdim=True) / weight.sum(-1, keepdim=True).clamp(min=1e-30)
    return error.sub_(mean).mul_(weight)


def refit_output(sample: LayerSample, factors: Factors) -> Factors:
    """Ridge regression of the teacher's output on the features z_h = p_h c, then a rank-`e` split per head.

    The split is an SVD weighted with the features' covariance: exact while r <= v_head_dim.
    """
    h, r, e = sample.heads, factors.rank, sample.value.shape[-1]
    source, device = sample.source, sample.key.device
    if sample.fixed_output:
        return _refit_values(sample, factors)
    gram = torch.zeros(h * r, h * r, device=device)
    cross = torch.zeros(h * r, factors.output.shape[1], device=device)
    for part in sample.chunks():
        keys = key_features(sample, source[part], factors.latent, factors.slots, factors.columns)
        queries = query_features(sample, part, factors.query_latent, factors.query_slots, factors.columns)
        weights = sample.probabilities(score(queries, keys), part)
        z = mix(weights, keys[..., :r]).transpose(1, 2).reshape(-1, h * r)
        gram.addmm_(z.mT, z)
        cross.addmm_(z.mT, sample.target[part].flatten(0, 1))
    start = factors.output.permute(0, 2, 1).reshape(h * r, -1)
    ridge = OUTPUT_RIDGE * float(gram.diagonal().mean())
    system = gram.double()
    system.diagonal().add_(ridge)
    fitted = torch.cholesky_solve((cross + ridge * start).double(), torch.linalg.cholesky(system))
    output = fitted.view(h, r, -1).transpose(1, 2)
    if r > e:
        blocks = system.view(h, r, h, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        output = _truncate(output, blocks, e)
    return replace(factors, output=output.float())


def _refit_values(sample: LayerSample, factors: Factors) -> Factors:
    """Per head, regress the source's head output on its own features: W_UV changes, W_O cannot."""
    source, r = sample.source, factors.rank
    gram = torch.zeros(sample.heads, r, r, device=source.device)
    cross = torch.zeros(sample.heads, r, sample.value.shape[-1], device=source.device)
    for part in sample.chunks():
        keys = key_features(sample, source[part], factors.latent, factors.slots, factors.columns)
        queries = query_features(sample, part, factors.query_latent, factors.query_slots, factors.columns)
        z = mix(sample.probabilities(score(queries, keys), part), keys[..., :r])
        own = sample.mix_values(sample.probabilities(sample.teacher_logits(part), part), part)
        gram += torch.einsum("nhqr,nhqs->hrs", z, z)
        cross += torch.einsum("nhqr,nhqe->hre", z, own)
    start = torch.linalg.lstsq(sample.output_weight, factors.output).solution.mT  # [H, r, e]
    system = gram.double()
    ridge = OUTPUT_RIDGE * system.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None]
    system.diagonal(dim1=-2, dim2=-1).add_(ridge)
    values = torch.linalg.solve(system, cross + ridge[..., None] * start)
    return replace(factors, output=sample.output_weight @ values.mT.float())


def _truncate(output: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Best rank-`rank` approximation of F_h [H, D, r] in the metric of its ridged input covariance [H, r, r]."""
    root = torch.linalg.cholesky(covariance)
    scaled = output @ root
    top = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors[..., -rank:]
    projected = (scaled @ top) @ top.mT
    result: Tensor = torch.linalg.solve_triangular(root.mT, projected.mT, upper=True).mT
    return result


def refit_query(sample: LayerSample, factors: Factors, target: LogitTarget, iterations: int) -> Factors:
    """Weighted least squares of the logits in the query maps B and R, given what is cached."""
    r = factors.rank
    source = sample.source
    keys = key_features(sample, source, factors.latent, factors.slots, factors.columns)
    weight = _key_weight(sample, target)
    left = inverse_root(_moment(sample.query.transpose(0, 1).flatten(1, 2)), WHITENING_RIDGE)  # [H, d, d]
    flat = keys.flatten(0, 1)
    moment = (flat * weight.flatten()[:, None]).mT @ flat
    right_latent = inverse_root(moment[:r, :r], WHITENING_RIDGE)
    right_slots = inverse_root(moment[r:, r:], WHITENING_RIDGE)

    def to_maps(x: Blocks) -> tuple[Tensor, Tensor]:
        return left.mT @ x[0] @ right_latent, right_slots.mT @ x[1] @ left

    def gradient(maps: tuple[Tensor, Tensor], with_target: bool) -> Blocks:
        latent = torch.zeros_like(factors.query_latent)
        slots = torch.zeros_like(factors.query_slots)
        for part, logits, pair in target.chunks:
            error = score(query_features(sample, part, *maps, factors.columns), keys[part])
            if with_target:
                error -= logits
            back = mix(_centred(error, pair), keys[part])
            query = sample.query[part]
            latent += torch.einsum("nhqd,nhqr->hdr", query, back[..., :r])
            cos, sin = slot_tables(sample, factors.columns)
            positions = sample.positions[part]
            turned = rotate(back[..., r:], cos[positions][:, None], -sin[positions][:, None])
            slots += torch.einsum("nhqs,nhqd->hsd", turned, query)
        scale = sample.scale / target.total
        return [left @ latent @ right_latent.mT * scale, right_slots @ slots @ left.mT * scale]

    residual = [-g for g in gradient((factors.query_latent, factors.query_slots), with_target=True)]
    step = conjugate_gradients(lambda x: gradient(to_maps(x), with_target=False), residual, iterations)
    latent, slots = to_maps(step)
    return replace(factors, query_latent=factors.query_latent + latent, query_slots=factors.query_slots + slots)


def refit_latent(sample: LayerSample, factors: Factors, target: LogitTarget, iterations: int) -> Factors:
    """Least squares in what is cached, P and S: the logits' error plus the output's at fixed attention weights."""
    r, source = factors.rank, sample.source
    weight = _key_weight(sample, target)
    flat = source.flatten(0, 1)
    right = inverse_root((flat * weight.flatten()[:, None]).mT @ flat, WHITENING_RIDGE)  # [E, E]
    queries: list[Tensor] = []
    seen: list[Tensor] = []
    curvature = torch.zeros(r, r, device=flat.device)
    curvature_slots = torch.zeros(len(factors.slots), len(factors.slots), device=flat.device)
    for part, _, pair in target.chunks:
        q = query_features(sample, part, factors.query_latent, factors.query_slots, factors.columns)
        keys = key_features(sample, source[part], factors.latent, factors.slots, factors.columns)
        seen.append(mix(sample.probabilities(score(q, keys), part), source[part]))
        strength = pair.sum(-1, keepdim=True)
        w = (q * strength).flatten(0, 2).mT @ q.flatten(0, 2)
        curvature += w[:r, :r]
        curvature_slots += w[r:, r:]
        queries.append(q)
    metric = torch.einsum("hDr,hDs->rs", factors.output, factors.output)
    read = sum(float(s.shape[0] * s.shape[2]) for s in seen) / sample.heads
    left = inverse_root(curvature + OUTPUT_SHARE * read * metric, 1e-3)
    left_slots = inverse_root(curvature_slots, 1e-3)

    def to_maps(x: Blocks) -> tuple[Tensor, Tensor]:
        return left.mT @ x[0] @ right, left_slots.mT @ x[1] @ right

    def gradient(maps: tuple[Tensor, Tensor], with_target: bool) -> Blocks:
        latent, slots = torch.zeros_like(factors.latent), torch.zeros_like(factors.slots)
        cos, sin = slot_tables(sample, factors.columns)
        for (part, logits, pair), q, y in zip(target.chunks, queries, seen, strict=True):
            error = score(q, key_features(sample, source[part], *maps, factors.columns))
            if with_target:
                error -= logits
            n, h, length, t = error.shape
            back = _centred(error, pair).reshape(n, h * length, t).mT @ q.reshape(n, h * length, -1)
            latent += back[..., :r].flatten(0, 1).mT @ source[part].flatten(0, 1)
            slots += rotate(back[..., r:], cos, -sin).flatten(0, 1).mT @ source[part].flatten(0, 1)
            cached = y @ maps[0].mT
            missing = torch.einsum("nhqr,hDr->nqD", cached, factors.output)
            if with_target:
                missing -= sample.target[part]
            pulled = torch.einsum("nqD,hDr->nhqr", missing, factors.output)
            latent += OUTPUT_SHARE * (pulled.flatten(0, 2).mT @ y.flatten(0, 2))
        return [left @ latent @ right.mT / target.total, left_slots @ slots @ right.mT / target.total]

    residual = [-g for g in gradient((factors.latent, factors.slots), with_target=True)]
    step = conjugate_gradients(lambda x: gradient(to_maps(x), with_target=False), residual, iterations)
    latent, slots = to_maps(step)
    return replace(factors, latent=factors.latent + latent, slots=factors.slots + slots)


def _key_weight(sample: LayerSample, target: LogitTarget) -> Tensor:
    """Share of the logit weight that falls on each token [N, T], summing to 1."""
    return torch.cat([pair.sum((1, 2)) for _, _, pair in target.chunks]) / target.total


def _moment(rows: Tensor) -> Tensor:
    """Second moment of rows [..., M, k] -> [..., k, k]."""
    return rows.mT @ rows / rows.shape[-2]

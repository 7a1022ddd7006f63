"""Closed-form refits of an MLA layer on calibration samples: output side, query side, latent side.

All three are linear least squares given the others, so they alternate (docs/method.md, steps 4 and 5).
The logits' error is weighted as it reaches the output: pair (m, n) of head h counts p_mn, times the spread
sum_n p_mn |W_O,h (v_n - o_m)|^2 of what query m could read; an error common to all keys of a query is free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from attnedit.passes.mla.weights import (
    Factors,
    key_features,
    latent_reads,
    mix,
    output_error,
    query_features,
    rotate,
    score,
    slot_tables,
)
from attnedit.passes.sample import CHUNK_ELEMENTS, Chunk, LayerSample
from attnedit.passes.solve import (
    LEAST_RIDGE,
    Blocks,
    cholesky,
    conjugate_gradients,
    inverse_root,
    ridge_regression,
    second_moment,
    spectrum,
    thin,
)

OUTPUT_RIDGE = 0.5
"""Ridge of the output regression towards the weights it starts from, as a fraction of the mean diagonal of its Gram
matrix: this times features per sampled query, so that few queries are trusted less."""
OUTPUT_SHARE = 10.0
"""Weight of the output's error against the logits' in the latent-side problem."""
WHITENING_RIDGE = 1e-4
PRODUCT_ROWS = 512
"""Rows at once of a symmetric product: small ones save close to half of it, large ones keep matrix products fast."""


@dataclass(frozen=True)
class Weighted:
    """One chunk of the logits' problem.

    Attributes:
        chunk: which queries and keys.
        logits: the teacher's [N', H, Q', T'].
        weight: what an error of each counts [N', H, Q', T'].
    """

    chunk: Chunk
    logits: Tensor
    weight: Tensor

    def pull(self, error: Tensor) -> Tensor:
        """Gradient of the weighted variance over keys, weight x (error - its weighted mean); overwrites `error`."""
        mean = torch.linalg.vecdot(self.weight, error)[..., None] / self.strength
        return error.sub_(mean).mul_(self.weight)

    @cached_property
    def strength(self) -> Tensor:
        """Weight of each query, summed over keys [N', H, Q', 1]."""
        return self.weight.sum(-1, keepdim=True).clamp(min=1e-30)


@dataclass(frozen=True)
class LogitTarget:
    """Teacher logits of all sampled queries with their weights, and the sum of all weights."""

    chunks: list[Weighted]
    total: float


def logit_target(sample: LayerSample) -> LogitTarget:
    """Weights p x spread of every sampled query and key; masked pairs weigh nothing."""
    sample = sample.teacher or sample
    metric = sample.output_weight.mT @ sample.output_weight  # [H, e, e]
    share = sample.heads // sample.groups
    centred = sample
    if sample.sinks is None:
        # Attention weights sum to one, so that what all values have in common takes no part in their spread.
        centred = replace(sample, value=sample.value - _common(sample))
    value = centred.value.repeat_interleave(share, 1)
    size = ((value @ metric) * value).sum(-1)[:, :, None, :]
    chunks, total = [], 0.0
    for chunk in sample.chunks():
        logits = sample.teacher_logits(chunk)
        p = sample.probabilities(logits, chunk)
        seen = centred.mix_values(p, chunk)
        # sum_n p |W(v - o)|^2 = sum_n p |W v|^2 - (2 - sum_n p) |W o|^2; with sinks p sums to less than one
        mass = p.sum(-1, keepdim=True)
        mean = ((seen @ metric) * seen).sum(-1, keepdim=True)
        spread = ((p * size[chunk.sequences, :, :, chunk.keys]).sum(-1, keepdim=True) - (2 - mass) * mean).clamp(min=0)
        weight = p.mul_(spread)
        total += float(weight.sum())
        chunks.append(Weighted(chunk, logits, weight))
    return LogitTarget(chunks, max(total, 1e-30))


def _common(sample: LayerSample) -> Tensor:
    """Mean of the values, tokens weighted by the attention that they receive [G, 1, e]."""
    weight = (sample.token_weight / sample.token_weight.sum())[:, None, :, None]
    return (sample.value * weight).sum((0, 2))[:, None]


def refit_output(sample: LayerSample, factors: Factors) -> tuple[Factors, float]:
    """Ridge regression of the teacher's output on the features z_h = p_h c, then a rank-`e` split per head.

    The split is an SVD weighted with the features' covariance: exact while r <= v_head_dim.

    Returns:
        The factors, and the energy of the output's error as a fraction of the output's.
    """
    if sample.fixed_output:
        factors = _refit_values(sample, factors)
        return factors, output_error(sample, factors)
    rows = sample.query.shape[0] * sample.query.shape[2]
    by_rows = rows < sample.heads * factors.rank
    output, error = (_regress_by_rows if by_rows else _regress_by_features)(sample, factors)
    energy = float(sample.target.double().square().sum())
    return replace(factors, output=output), max(error, 0.0) / max(energy, 1e-30)


def _regress_by_features(sample: LayerSample, factors: Factors) -> tuple[Tensor, float]:
    """The regression through the Gram matrix of the features [H r, H r]: output [H, D, r], energy of its error."""
    h, r, e = sample.heads, factors.rank, sample.value.shape[-1]
    gram = torch.zeros(h * r, h * r, device=sample.key.device)
    cross = torch.zeros(h * r, factors.output.shape[1], device=sample.key.device)
    for chunk, reads in latent_reads(sample, factors):
        z = reads.transpose(1, 2).reshape(-1, h * r)
        gram.addmm_(z.mT, z)
        cross.addmm_(z.mT, sample.target[chunk.sequences, chunk.queries].flatten(0, 1))
    start = factors.output.permute(0, 2, 1).reshape(h * r, -1)
    rows = sample.query.shape[0] * sample.query.shape[2]
    fitted, system = ridge_regression(gram, cross, start, OUTPUT_RIDGE * h * r / rows * float(gram.diagonal().mean()))
    output = fitted.view(h, r, -1).transpose(1, 2)
    if r > e:
        blocks = system.view(h, r, h, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        output = _truncate(output, blocks, e)
    output = output.float()
    # |y - F z|^2 from the moments that are there anyway
    flat = output.transpose(1, 2).reshape(h * r, -1)
    energy = float(sample.target.double().square().sum())
    return output, energy + float(((gram @ flat).double() * flat).sum()) - 2 * float((cross.double() * flat).sum())


def _regress_by_rows(sample: LayerSample, factors: Factors) -> tuple[Tensor, float]:
    """The same regression through the products of sampled queries [M, M], for fewer queries than features.

    F = F_0 + (Y - F_0 Z)(Z^T Z + ridge)^-1 Z^T with a column of Z per query: equal, by the identity of Woodbury. Heads
    are taken one by one where r is large, since all their weights in float64 are as large as a decoder layer.
    """
    r, e = factors.rank, sample.value.shape[-1]
    n, h, q = sample.query.shape[:3]
    z = sample.key.new_empty(h, n, q, r)
    for chunk, reads in latent_reads(sample, factors):
        z[:, chunk.sequences, chunk.queries] = reads.transpose(0, 1)
    z = z.flatten(1, 2)
    target = sample.target.flatten(0, 1)
    products, missing = z.new_zeros(n * q, n * q), target.clone()
    for features, start in zip(z, factors.output, strict=True):
        _add_products(products, features)
        _subtract_outputs(missing, features, *thin(start, e))
    ridge = max(OUTPUT_RIDGE * float(products.diagonal().mean()), LEAST_RIDGE)
    system = products.double()
    system.diagonal().add_(ridge)
    dual = torch.cholesky_solve(missing.double(), cholesky(system)).float()
    output = torch.empty_like(factors.output)
    error = target.clone()
    for heads in torch.arange(h).split(max(1, CHUNK_ELEMENTS // (r * output.shape[1]))):
        part = slice(int(heads[0]), int(heads[-1]) + 1)
        output[part] = factors.output[part] + dual.mT @ z[part]
        if r > e:
            blocks = (z[part].mT @ z[part]).double()
            blocks.diagonal(dim1=-2, dim2=-1).add_(ridge)
            output[part] = _truncate(output[part], blocks, e)
        for features, weight in zip(z[part], output[part], strict=True):
            _subtract_outputs(error, features, *thin(weight, e))
    return output, float(error.double().square().sum())


def _add_products(products: Tensor, features: Tensor) -> None:
    """Add the products of all rows of [M, r], computing each pair once, in blocks."""
    for rows in torch.arange(len(features)).split(PRODUCT_ROWS):
        first, end = int(rows[0]), int(rows[-1]) + 1
        block = features[first:end] @ features[:end].mT
        products[first:end, :end] += block
        products[:first, first:end] += block[:, :first].mT


def _subtract_outputs(outputs: Tensor, features: Tensor, left: Tensor, right: Tensor) -> None:
    """Subtract from outputs [M, D] what features [M, r] give through the weight left . right."""
    outputs.addmm_(features @ right.mT, left.mT, alpha=-1)


def _refit_values(sample: LayerSample, factors: Factors) -> Factors:
    """Per head, regress the source's head output on its own features: W_UV changes, W_O cannot."""
    device, r = sample.key.device, factors.rank
    gram = torch.zeros(sample.heads, r, r, device=device)
    cross = torch.zeros(sample.heads, r, sample.value.shape[-1], device=device)
    for chunk, reads in latent_reads(sample, factors):
        own = sample.mix_values(sample.probabilities(sample.teacher_logits(chunk), chunk), chunk)
        gram += torch.einsum("nhqr,nhqs->hrs", reads, reads)
        cross += torch.einsum("nhqr,nhqe->hre", reads, own)
    start = (torch.linalg.pinv(sample.output_weight.double()) @ factors.output.double()).mT  # [H, r, e]
    rows = sample.query.shape[0] * sample.query.shape[2]
    ridge = OUTPUT_RIDGE * r / rows * gram.diagonal(dim1=-2, dim2=-1).mean(-1).double()
    values, _ = ridge_regression(gram, cross, start, ridge)
    return replace(factors, output=sample.output_weight @ values.mT.float())


def _truncate(output: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Best rank-`rank` approximation of F_h [H, D, r] in the metric of its ridged input covariance [H, r, r]."""
    root = cholesky(covariance)
    scaled = (output @ root.to(output.dtype)).double()
    top = spectrum(scaled.mT @ scaled)[1][..., -rank:]
    back = torch.linalg.solve_triangular(root.mT, top, upper=True).mT
    result: Tensor = (scaled @ top).to(output.dtype) @ back.to(output.dtype)
    return result


def refit_query(sample: LayerSample, factors: Factors, target: LogitTarget, iterations: int) -> Factors:
    """Weighted least squares of the logits in the query maps B and R, given what is cached."""
    r = factors.rank
    keys = key_features(sample, factors.latent, factors.slots, factors.columns)
    query = sample.query.transpose(0, 1).flatten(1, 2)
    left = inverse_root(second_moment(query) / query.shape[1], WHITENING_RIDGE)  # [H, d, d]
    moment = second_moment(keys.flatten(0, 1), _key_weight(sample, target).flatten())
    right_latent = inverse_root(moment[:r, :r], WHITENING_RIDGE, alike=True)
    right_slots = inverse_root(moment[r:, r:], WHITENING_RIDGE)
    cos, sin = slot_tables(sample, factors.columns)

    def to_maps(x: Blocks) -> tuple[Tensor, Tensor]:
        return left.mT @ x[0] @ right_latent, right_slots.mT @ x[1] @ left

    def gradient(maps: tuple[Tensor, Tensor], with_target: bool) -> Blocks:
        latent = torch.zeros_like(factors.query_latent)
        slots = torch.zeros_like(factors.query_slots)
        for part in target.chunks:
            chunk = part.chunk
            cached = keys[chunk.sequences, chunk.keys]
            error = score(query_features(sample, chunk, *maps, factors.columns), cached)
            if with_target:
                error -= part.logits
            back = mix(part.pull(error), cached)
            query = sample.query[chunk.sequences, :, chunk.queries]
            latent += torch.einsum("nhqd,nhqr->hdr", query, back[..., :r])
            positions = sample.positions[chunk.queries]
            turned = rotate(back[..., r:], cos[positions], -sin[positions])
            slots += torch.einsum("nhqs,nhqd->hsd", turned, query)
        scale = sample.scale / target.total
        return [left @ latent @ right_latent.mT * scale, right_slots @ slots @ left.mT * scale]

    residual = [-g for g in gradient((factors.query_latent, factors.query_slots), with_target=True)]
    step = conjugate_gradients(lambda x: gradient(to_maps(x), with_target=False), residual, iterations)
    latent, slots = to_maps(step)
    return replace(factors, query_latent=factors.query_latent + latent, query_slots=factors.query_slots + slots)


def refit_latent(sample: LayerSample, factors: Factors, target: LogitTarget, iterations: int) -> Factors:
    """Least squares in what is cached, P and S: the logits' error plus the output's at fixed attention weights."""
    r = factors.rank
    flat = sample.source.flatten(0, 1)
    right = inverse_root(second_moment(flat, _key_weight(sample, target).flatten()), WHITENING_RIDGE)  # [E, E]
    keys = key_features(sample, factors.latent, factors.slots, factors.columns)
    queries: list[Tensor] = []
    seen: list[Tensor] = []
    curvature = flat.new_zeros(keys.shape[-1], keys.shape[-1])
    for part in target.chunks:
        chunk = part.chunk
        q = query_features(sample, chunk, factors.query_latent, factors.query_slots, factors.columns)
        p = sample.probabilities(score(q, keys[chunk.sequences, chunk.keys]), chunk)
        seen.append(mix(p, sample.source[chunk.sequences, chunk.keys]))
        curvature += (q * part.strength).flatten(0, 2).mT @ q.flatten(0, 2)
        queries.append(q)
    metric = torch.einsum("hDr,hDs->rs", factors.output, factors.output)
    read = sum(float(s.shape[0] * s.shape[2]) for s in seen) / sample.heads
    left = inverse_root(curvature[:r, :r] + OUTPUT_SHARE * read * metric, 1e-3, alike=True)
    left_slots = inverse_root(curvature[r:, r:], 1e-3)
    cos, sin = slot_tables(sample, factors.columns)

    def to_maps(x: Blocks) -> tuple[Tensor, Tensor]:
        return left.mT @ x[0] @ right, left_slots.mT @ x[1] @ right

    def gradient(maps: tuple[Tensor, Tensor], with_target: bool) -> Blocks:
        latent = torch.zeros_like(factors.latent)
        cached = key_features(sample, *maps, factors.columns)
        pulled = torch.zeros_like(cached)
        for part, q, y in zip(target.chunks, queries, seen, strict=True):
            chunk = part.chunk
            error = score(q, cached[chunk.sequences, chunk.keys])
            if with_target:
                error -= part.logits
            n, h, length, t = error.shape
            back = part.pull(error).view(n, h * length, t).mT @ q.reshape(n, h * length, -1)
            pulled[chunk.sequences, chunk.keys] += back
            missing = torch.einsum("nhqr,hDr->nqD", y @ maps[0].mT, factors.output)
            if with_target:
                missing -= sample.target[chunk.sequences, chunk.queries]
            output = torch.einsum("nqD,hDr->nhqr", missing, factors.output)
            latent += OUTPUT_SHARE * (output.flatten(0, 2).mT @ y.flatten(0, 2))
        latent += pulled[..., :r].flatten(0, 1).mT @ flat
        slots = rotate(pulled[..., r:], cos, -sin).flatten(0, 1).mT @ flat
        return [left @ latent @ right.mT / target.total, left_slots @ slots @ right.mT / target.total]

    residual = [-g for g in gradient((factors.latent, factors.slots), with_target=True)]
    step = conjugate_gradients(lambda x: gradient(to_maps(x), with_target=False), residual, iterations)
    latent, slots = to_maps(step)
    return replace(factors, latent=factors.latent + latent, slots=factors.slots + slots)


def _key_weight(sample: LayerSample, target: LogitTarget) -> Tensor:
    """Share of the logit weight that falls on each token [N, T], summing to 1."""
    weight = sample.key.new_zeros(sample.key.shape[0], sample.key.shape[2])
    for part in target.chunks:
        weight[part.chunk.sequences, part.chunk.keys] += part.weight.sum((1, 2))
    return weight / target.total

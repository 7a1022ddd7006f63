"""Closed-form refits of an MLA layer on calibration samples: output side, query side, latent side.

All three are linear least squares given the others, so they alternate (docs/method.md, steps 4 and 5).
The logits' error is weighted as it reaches the output: pair (m, n) of head h counts p_mn, times the spread
sum_n p_mn |W_O,h (v_n - o_m)|^2 of what query m could read; an error common to all keys of a query is free.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    query_tables,
    score,
    slot_tables,
)
from attnedit.passes.sample import CHUNK_ELEMENTS, Chunk, LayerSample, query_moment, token_shares, weighted_moment
from attnedit.passes.solve import (
    LEAST_RIDGE,
    Blocks,
    cholesky,
    conjugate_gradients,
    inverse_root,
    ridge_regression,
    spectrum,
    thin,
)
from attnedit.targets.attention.mla.rotary import rotate
from attnedit.targets.attention.triton_support import runs_on

OUTPUT_RIDGE = 0.5
"""Ridge of the output regression towards the weights it starts from, as a fraction of the mean diagonal of its Gram
matrix: this times features per sampled query, so that few queries are trusted less."""
OUTPUT_SHARE = 10.0
"""Weight of the output's error against the logits' in the latent-side problem."""
STUDENT_SHARE = 0.5
"""Of the attention that weighs the logits, the new layer's own. Logits of keys that the source hardly attends to would
be free otherwise, and among thousands of far keys some would be attended to by mistake."""
WHITENING_RIDGE = 1e-4
PRODUCT_ROWS = 512
"""Rows at once of a symmetric product: small ones save close to half of it, large ones keep matrix products fast."""


@dataclass(frozen=True)
class Weighted:
    """One chunk of the logits' problem.

    Attributes:
        part: index of its sample.
        chunk: which queries and keys.
        logits: the teacher's [N', H, Q', T'].
        weight: what an error of each counts [N', H, Q', T'].
    """

    part: int
    chunk: Chunk
    logits: Tensor
    weight: Tensor

    def pull(self, error: Tensor) -> Tensor:
        """Gradient of the weighted variance over keys, weight x (error - its weighted mean); overwrites `error`."""
        if runs_on(error.device) and error.is_contiguous() and self.weight.is_contiguous():
            from attnedit.passes.mla.pull_kernel import pull_rows

            with torch.cuda.device_of(error):  # triton launches on the current device
                pull_rows[(self.strength.numel(),)](error, self.weight, self.strength, error.shape[-1], BLOCK=2048)
            return error
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


def logit_target(samples: Sequence[LayerSample], factors: Factors | None = None) -> LogitTarget:
    """Weights p x spread of every sampled query and key; masked pairs weigh nothing.

    Args:
        samples: of the site.
        factors: the new layer so far, if there is one: `STUDENT_SHARE` of p is then its own attention, so that what it
            attends to and the source does not counts too.
    """
    chunks, total = [], 0.0
    common = _common([sample.teacher or sample for sample in samples])
    for part, own in enumerate(samples):
        sample = own.teacher or own
        if factors is not None:
            keys = key_features(own, factors.latent, factors.slots, factors.columns)
            queries = query_features(own, factors.query_latent, factors.query_slots, factors.columns)
        metric = sample.output_weight.mT @ sample.output_weight  # [H, e, e]
        share = sample.heads // sample.groups
        centred = sample
        if sample.sinks is None:
            # Attention weights sum to one, so that what all values have in common takes no part in their spread.
            centred = replace(sample, value=sample.value - common)
        value = centred.value.repeat_interleave(share, 1)
        size = ((value @ metric) * value).sum(-1)[:, :, None, :]
        for chunk in sample.chunks():
            logits = sample.teacher_logits(chunk)
            p = sample.probabilities(logits, chunk)
            seen = centred.mix_values(p, chunk)
            # sum_n p |W(v - o)|^2 = sum_n p |W v|^2 - (2 - sum_n p) |W o|^2; with sinks p sums to less than one
            mass = p.sum(-1, keepdim=True)
            mean = ((seen @ metric) * seen).sum(-1, keepdim=True)
            read = (p * size[chunk.sequences, :, :, chunk.keys]).sum(-1, keepdim=True)
            if factors is not None:
                asked, cached = queries[chunk.sequences, :, chunk.queries], keys[chunk.sequences, chunk.keys]
                student = own.probabilities(score(asked, cached), chunk)
                p = p.lerp(student, STUDENT_SHARE)
            weight = p.mul_((read - (2 - mass) * mean).clamp(min=0))
            total += float(weight.sum())
            chunks.append(Weighted(part, chunk, logits, weight))
    return LogitTarget(chunks, max(total, 1e-30))


def _common(samples: Sequence[LayerSample]) -> Tensor:
    """Mean of the values, tokens weighted by the attention that they receive [G, 1, e]."""
    parts = (
        (sample.value * share[:, None, :, None]).sum((0, 2))
        for sample, share in zip(samples, token_shares(samples), strict=True)
    )
    return sum(parts, samples[0].value.new_zeros(samples[0].groups, samples[0].value.shape[-1]))[:, None]


def refit_output(samples: Sequence[LayerSample], factors: Factors) -> tuple[Factors, float]:
    """Ridge regression of the teacher's output on the features z_h = p_h c, then a rank-`e` split per head.

    The split is an SVD weighted with the features' covariance: exact while r <= v_head_dim.

    Returns:
        The factors, and the energy of the output's error as a fraction of the output's.
    """
    if samples[0].fixed_output:
        factors = _refit_values(samples, factors)
        return factors, output_error(samples, factors)
    by_rows = _rows(samples) < samples[0].heads * factors.rank
    output, error = (_regress_by_rows if by_rows else _regress_by_features)(samples, factors)
    energy = _target_energy(samples)
    return replace(factors, output=output), max(error, 0.0) / max(energy, 1e-30)


def _rows(samples: Sequence[LayerSample]) -> int:
    """Sampled queries of all sequences."""
    return sum(sample.query.shape[0] * sample.query.shape[2] for sample in samples)


def _target_energy(samples: Sequence[LayerSample]) -> float:
    return sum(float(sample.target.double().square().sum()) for sample in samples)


def _regress_by_features(samples: Sequence[LayerSample], factors: Factors) -> tuple[Tensor, float]:
    """The regression through the Gram matrix of the features [H r, H r]: output [H, D, r], energy of its error."""
    h, r, e = samples[0].heads, factors.rank, samples[0].value.shape[-1]
    gram = torch.zeros(h * r, h * r, device=factors.output.device)
    cross = torch.zeros(h * r, factors.output.shape[1], device=factors.output.device)
    for sample, chunk, reads in latent_reads(samples, factors):
        z = reads.transpose(1, 2).reshape(-1, h * r)
        gram.addmm_(z.mT, z)
        cross.addmm_(z.mT, sample.target[chunk.sequences, chunk.queries].flatten(0, 1))
    start = factors.output.permute(0, 2, 1).reshape(h * r, -1)
    ridge = OUTPUT_RIDGE * h * r / _rows(samples) * float(gram.diagonal().mean())
    fitted, system = ridge_regression(gram, cross, start, ridge)
    output = fitted.view(h, r, -1).transpose(1, 2)
    if r > e:
        blocks = system.view(h, r, h, r).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        output = _truncate(output, blocks, e)
    output = output.float()
    # |y - F z|^2 from the moments that are there anyway
    flat = output.transpose(1, 2).reshape(h * r, -1)
    energy = _target_energy(samples)
    return output, energy + float(((gram @ flat).double() * flat).sum()) - 2 * float((cross.double() * flat).sum())


def _regress_by_rows(samples: Sequence[LayerSample], factors: Factors) -> tuple[Tensor, float]:
    """The same regression through the products of sampled queries [M, M], for fewer queries than features.

    F = F_0 + (Y - F_0 Z)(Z^T Z + ridge)^-1 Z^T with a column of Z per query: equal, by the identity of Woodbury. Heads
    are taken one by one where r is large, since all their weights in float64 are as large as a decoder layer.
    """
    r, e, h, rows = factors.rank, samples[0].value.shape[-1], samples[0].heads, _rows(samples)
    z = factors.output.new_empty(h, rows, r)
    places: dict[int, Tensor] = {}
    start_row = 0
    for sample in samples:
        n, q = sample.query.shape[0], sample.query.shape[2]
        places[id(sample)] = z[:, start_row : start_row + n * q].view(h, n, q, r)
        start_row += n * q
    for sample, chunk, reads in latent_reads(samples, factors):
        places[id(sample)][:, chunk.sequences, chunk.queries] = reads.transpose(0, 1)
    target = torch.cat([sample.target.flatten(0, 1) for sample in samples])
    products, missing = z.new_zeros(rows, rows), target.clone()
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


def _refit_values(samples: Sequence[LayerSample], factors: Factors) -> Factors:
    """Per head, regress the source's head output on its own features: W_UV changes, W_O cannot."""
    first, device, r = samples[0], factors.output.device, factors.rank
    gram = torch.zeros(first.heads, r, r, device=device)
    cross = torch.zeros(first.heads, r, first.value.shape[-1], device=device)
    for sample, chunk, reads in latent_reads(samples, factors):
        source = sample.teacher or sample
        own = source.mix_values(source.probabilities(source.teacher_logits(chunk), chunk), chunk)
        gram += torch.einsum("nhqr,nhqs->hrs", reads, reads)
        cross += torch.einsum("nhqr,nhqe->hre", reads, own)
    start = (torch.linalg.pinv(first.output_weight.double()) @ factors.output.double()).mT  # [H, r, e]
    ridge = OUTPUT_RIDGE * r / _rows(samples) * gram.diagonal(dim1=-2, dim2=-1).mean(-1).double()
    values, _ = ridge_regression(gram, cross, start, ridge)
    return replace(factors, output=first.output_weight @ values.mT.float())


def _truncate(output: Tensor, covariance: Tensor, rank: int) -> Tensor:
    """Best rank-`rank` approximation of F_h [H, D, r] in the metric of its ridged input covariance [H, r, r]."""
    root = cholesky(covariance)
    scaled = (output @ root.to(output.dtype)).double()
    top = spectrum(scaled.mT @ scaled)[1][..., -rank:]
    back = torch.linalg.solve_triangular(root.mT, top, upper=True).mT
    result: Tensor = (scaled @ top).to(output.dtype) @ back.to(output.dtype)
    return result


def refit_query(samples: Sequence[LayerSample], factors: Factors, target: LogitTarget, iterations: int) -> Factors:
    """Weighted least squares of the logits in the query maps B and R, given what is cached."""
    r = factors.rank
    keys = [key_features(sample, factors.latent, factors.slots, factors.columns) for sample in samples]
    left = inverse_root(query_moment(samples), WHITENING_RIDGE)  # [H, d, d]
    moment = weighted_moment(keys, _key_weights(samples, target))
    right_latent = inverse_root(moment[:r, :r], WHITENING_RIDGE, alike=True)
    right_slots = inverse_root(moment[r:, r:], WHITENING_RIDGE)
    tables = [query_tables(sample, factors.columns) for sample in samples]

    def to_maps(x: Blocks) -> tuple[Tensor, Tensor]:
        return left.mT @ x[0] @ right_latent, right_slots.mT @ x[1] @ left

    def gradient(maps: tuple[Tensor, Tensor], with_target: bool) -> Blocks:
        latent = torch.zeros_like(factors.query_latent)
        slots = torch.zeros_like(factors.query_slots)
        features = [query_features(sample, *maps, factors.columns) for sample in samples]
        for part in target.chunks:
            chunk = part.chunk
            cached = keys[part.part][chunk.sequences, chunk.keys]
            asked = features[part.part][chunk.sequences, :, chunk.queries]
            error = score(asked, cached)
            if with_target:
                error -= part.logits
            asked.copy_(mix(part.pull(error), cached))  # no other chunk has these queries
        for sample, back, (cos, sin) in zip(samples, features, tables, strict=True):
            latent += torch.einsum("nhqd,nhqr->hdr", sample.query, back[..., :r])
            slots += torch.einsum("nhqs,nhqd->hsd", rotate(back[..., r:], cos, -sin), sample.query)
        scale = samples[0].scale / target.total
        return [left @ latent @ right_latent.mT * scale, right_slots @ slots @ left.mT * scale]

    latent, slots = _improved((factors.query_latent, factors.query_slots), gradient, to_maps, iterations)
    return replace(factors, query_latent=latent, query_slots=slots)


def refit_latent(samples: Sequence[LayerSample], factors: Factors, target: LogitTarget, iterations: int) -> Factors:
    """Least squares in what is cached, P and S: the logits' error plus the output's at fixed attention weights."""
    r = factors.rank
    sources = [sample.source for sample in samples]
    right = inverse_root(weighted_moment(sources, _key_weights(samples, target)), WHITENING_RIDGE)  # [E, E]
    keys = [key_features(sample, factors.latent, factors.slots, factors.columns) for sample in samples]
    queries = [query_features(sample, factors.query_latent, factors.query_slots, factors.columns) for sample in samples]
    seen = [q.new_empty(*q.shape[:3], source.shape[-1]) for q, source in zip(queries, sources, strict=True)]
    curvature = keys[0].new_zeros(keys[0].shape[-1], keys[0].shape[-1])
    for part in target.chunks:
        chunk, sample = part.chunk, samples[part.part]
        q = queries[part.part][chunk.sequences, :, chunk.queries]
        p = sample.probabilities(score(q, keys[part.part][chunk.sequences, chunk.keys]), chunk)
        seen[part.part][chunk.sequences, :, chunk.queries] = mix(p, sample.source[chunk.sequences, chunk.keys])
        curvature += (q * part.strength).flatten(0, 2).mT @ q.flatten(0, 2)
    metric = torch.einsum("hDr,hDs->rs", factors.output, factors.output)
    read = _rows(samples) / samples[0].heads
    left = inverse_root(curvature[:r, :r] + OUTPUT_SHARE * read * metric, 1e-3, alike=True)
    left_slots = inverse_root(curvature[r:, r:], 1e-3)
    tables = [slot_tables(sample, factors.columns) for sample in samples]

    def to_maps(x: Blocks) -> tuple[Tensor, Tensor]:
        return left.mT @ x[0] @ right, left_slots.mT @ x[1] @ right

    def gradient(maps: tuple[Tensor, Tensor], with_target: bool) -> Blocks:
        latent = torch.zeros_like(factors.latent)
        cached = [key_features(sample, *maps, factors.columns) for sample in samples]
        pulled = [torch.zeros_like(states) for states in cached]
        for part in target.chunks:
            chunk = part.chunk
            q = queries[part.part][chunk.sequences, :, chunk.queries]
            error = score(q, cached[part.part][chunk.sequences, chunk.keys])
            if with_target:
                error -= part.logits
            n, h, length, t = error.shape
            back = part.pull(error).view(n, h * length, t).mT @ q.reshape(n, h * length, -1)
            pulled[part.part][chunk.sequences, chunk.keys] += back
        for sample, y in zip(samples, seen, strict=True):
            missing = torch.einsum("nhqr,hDr->nqD", y @ maps[0].mT, factors.output)
            if with_target:
                missing -= sample.target
            output = torch.einsum("nqD,hDr->nhqr", missing, factors.output)
            latent += OUTPUT_SHARE * (output.flatten(0, 2).mT @ y.flatten(0, 2))
        slots = torch.zeros_like(factors.slots)
        for source, pull, (cos, sin) in zip(sources, pulled, tables, strict=True):
            flat = source.flatten(0, 1)
            latent += pull[..., :r].flatten(0, 1).mT @ flat
            slots += rotate(pull[..., r:], cos, -sin).flatten(0, 1).mT @ flat
        return [left @ latent @ right.mT / target.total, left_slots @ slots @ right.mT / target.total]

    latent, slots = _improved((factors.latent, factors.slots), gradient, to_maps, iterations)
    return replace(factors, latent=latent, slots=slots)


def _improved(
    maps: tuple[Tensor, Tensor],
    gradient: Callable[[tuple[Tensor, Tensor], bool], Blocks],
    to_maps: Callable[[Blocks], tuple[Tensor, Tensor]],
    iterations: int,
) -> tuple[Tensor, Tensor]:
    """Maps of the latent and of the slots after so many iterations of conjugate gradients.

    Args:
        maps: to begin with.
        gradient: of half the squared error at some maps, in preconditioned coordinates; linear without the target.
        to_maps: from preconditioned coordinates.
        iterations: how many.
    """
    residual = [-part for part in gradient(maps, True)]
    step = conjugate_gradients(lambda x: gradient(to_maps(x), False), residual, iterations)
    latent, slots = to_maps(step)
    return maps[0] + latent, maps[1] + slots


def _key_weights(samples: Sequence[LayerSample], target: LogitTarget) -> list[Tensor]:
    """Share of the logit weight that falls on each token, [N, T] for each sample, summing to 1 over all."""
    weights = [sample.key.new_zeros(sample.key.shape[0], sample.key.shape[2]) for sample in samples]
    for part in target.chunks:
        weights[part.part][part.chunk.sequences, part.chunk.keys] += part.weight.sum((1, 2))
    return [weight / target.total for weight in weights]

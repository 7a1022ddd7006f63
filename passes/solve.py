"""Second moments, their factors, and linear least squares on them, for moments of any condition.

Outlier channels, biases far above what varies, dead heads and repeated tokens make moments whose eigenvalues differ by
more than float32 can tell apart. Moments are summed, and factorised, in float64; a factor exists for every one of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Blocks = list[Tensor]

ROWS = 4096
"""Rows that are held in float64 at once."""
ROUNDING = 1e-13
"""Eigenvalues below this part of the largest are the rounding of float64."""
CHANNEL_FLOOR = 1e-12
"""Energy of a channel, of the largest, below which it is the rounding of float32 and not scaled up."""
LEAST_RIDGE = 1e-30
"""Of a regression on features that are all 0: it then stays where it started."""


def second_moment(rows: Tensor, weight: Tensor | None = None) -> Tensor:
    """`cross_moment` of rows with themselves, Hermitian to the last bit [..., k, k]."""
    total = cross_moment(rows, rows, weight)
    return (total + total.mH) / 2


def cross_moment(rows: Tensor, others: Tensor, weight: Tensor | None = None) -> Tensor:
    """Sum over rows x [..., M, k] and y [..., M, m] of x y^H, weighted [M] or not: [..., k, m].

    Summed in float64 (complex128).
    """
    wide = torch.promote_types(rows.dtype, torch.float64)
    total = torch.zeros(*rows.shape[:-2], rows.shape[-1], others.shape[-1], dtype=wide, device=rows.device)
    for start in range(0, rows.shape[-2], ROWS):
        left, right = (states[..., start : start + ROWS, :].to(wide) for states in (rows, others))
        if weight is not None:
            left = left * weight[start : start + ROWS, None]
        total += left.mT @ right.conj()
    return total


def spectrum(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending and not negative [..., k], and eigenvectors of second moments [..., k, k]."""
    try:
        values, vectors = torch.linalg.eigh(matrix)
    except RuntimeError:
        # Solvers differ in what they converge on; singular vectors of a second moment are its eigenvectors.
        left, singular, _ = torch.linalg.svd(matrix.cpu())
        values, vectors = singular.flip(-1).to(matrix.device), left.flip(-1).to(matrix.device)
    return values.clamp(min=0), vectors


def cholesky(moment: Tensor) -> Tensor:
    """Lower factor L of second moments [..., k, k] in float64, L L^T = M.

    Where M is singular, or rounding made it indefinite, L is that of the same M with its eigenvalues raised to the
    rounding of the largest.
    """
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moment)
    if not bool(failed.any()):
        return factor
    values, vectors = spectrum(moment)
    floor = values[..., -1:] * ROUNDING + torch.finfo(values.dtype).tiny
    upper: Tensor = torch.linalg.qr(values.clamp(min=floor).sqrt()[..., None] * vectors.mT).R
    return (upper * upper.diagonal(dim1=-2, dim2=-1).sgn()[..., None]).mT


def root_and_inverse(moment: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Symmetric square root of a second moment [k, k] and its inverse; 0, and not inverted, where all of it is 0.

    Args:
        moment: in float64.
        floor: eigenvalues below this part of the largest are raised to it.
    """
    values, vectors = spectrum(moment)
    if not values.numel() or float(values[-1]) == 0.0:
        return torch.zeros_like(moment), torch.zeros_like(moment)
    root = values.clamp(min=float(values[-1]) * floor).sqrt()
    return vectors @ (root[:, None] * vectors.mT), vectors @ (vectors.mT / root[:, None])


def inverse_root(moment: Tensor, ridge: float, *, alike: bool = False) -> Tensor:
    """Inverse Cholesky factor L^-1 of (a batch of) second moments [..., k, k], each channel ridged by its own energy.

    L^-1 M L^-T is then close to the identity, however different the channels' scales are.

    Args:
        moment: better in float64, in which all of this is done.
        ridge: part of a channel's energy that is added to it.
        alike: whether channels are of one scale, so that those of little energy are rounding: all are ridged by the
            mean energy, and none is scaled up.

    Returns:
        float32.
    """
    m = moment.double()
    if not m.shape[-1]:
        return m.float()
    energy = m.diagonal(dim1=-2, dim2=-1)
    if alike:
        energy = energy.mean(-1, keepdim=True).expand_as(energy)
    energy = energy.clamp(min=energy.amax(-1, keepdim=True) * CHANNEL_FLOOR + LEAST_RIDGE)
    size = energy.sqrt()
    scaled = m / (size[..., :, None] * size[..., None, :])
    scaled.diagonal(dim1=-2, dim2=-1).add_(ridge)
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    inverse: Tensor = torch.linalg.solve_triangular(cholesky(scaled), eye.expand_as(scaled), upper=False)
    return (inverse / size[..., None, :]).float()


def ridge_regression(gram: Tensor, cross: Tensor, start: Tensor, ridge: Tensor | float) -> tuple[Tensor, Tensor]:
    """Solve (G + ridge) F = C + ridge F_0 in float64.

    Args:
        gram: second moments of the features, G [..., k, k].
        cross: of features and what is to be met, C [..., k, m].
        start: F_0 [..., k, m], from which `ridge` keeps F from going far.
        ridge: one for each matrix [...], or for all.

    Returns:
        F, and the ridged G.
    """
    system = gram.to(torch.float64, copy=True)
    level = torch.as_tensor(ridge, dtype=system.dtype, device=system.device).clamp(min=LEAST_RIDGE)[..., None]
    system.diagonal(dim1=-2, dim2=-1).add_(level)
    right = cross.double() + level[..., None] * start.double()
    return torch.cholesky_solve(right, cholesky(system)), system


def conjugate_gradients(
    operator: Callable[[Blocks], Blocks], residual: Blocks, iterations: int, tolerance: float = 1e-10
) -> Blocks:
    """Solve A x = residual for a symmetric positive semi-definite A, starting at 0.

    What is solved for stands in `residual`, to full precision; A's products may round to the 10 bits of TF32, which
    GPUs multiply several times as fast: that turns the directions by a thousandth, of which there are few.

    Args:
        operator: applies A to blocks of the shapes of `residual`.
        residual: right-hand side; not changed.
        iterations: at most this many applications of A. Stopping early regularises towards 0.
        tolerance: stop when the squared residual has fallen by this factor.
    """
    x = [torch.zeros_like(b) for b in residual]
    r = [b.clone() for b in residual]
    p = [b.clone() for b in residual]
    first = energy = _dot(r, r)
    for _ in range(iterations):
        if not energy > tolerance * first:
            break
        with rounded_products():
            image = operator(p)
        curvature = _dot(p, image)
        step = energy / curvature if curvature > 0 else math.inf
        if not math.isfinite(step):  # rounding is all that is left
            break
        for xb, pb in zip(x, p, strict=True):
            xb.add_(pb, alpha=step)
        for rb, ib in zip(r, image, strict=True):
            rb.sub_(ib, alpha=step)
        previous, energy = energy, _dot(r, r)
        p = [rb + (energy / previous) * pb for rb, pb in zip(r, p, strict=True)]
    return x


@contextmanager
def rounded_products() -> Iterator[None]:
    """Products of float32 matrices in TF32 on CUDA GPUs; elsewhere as always."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float(torch.dot(x.flatten(), y.flatten())) for x, y in zip(a, b, strict=True))


def thin(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a matrix [D, r] whose rank is known to be at most `rank`: [D, k] orthonormal and [k, r], k <= rank."""
    # As many random combinations of its columns span the same space.
    mixing = torch.randn(weight.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(weight)
    basis = torch.linalg.qr(weight @ mixing).Q
    return basis, basis.mT @ weight

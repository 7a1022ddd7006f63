"""Linear least squares by preconditioned conjugate gradients on the normal equations, and what prepares them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Blocks = list[Tensor]


def inverse_root(moment: Tensor, ridge: float) -> Tensor:
    """Inverse Cholesky factor L^-1 of a (batch of) second moment(s) [..., k, k], ridged by `ridge` x mean diagonal.

    float64 inside, float32 out. L^-1 M L^-T is then close to the identity.
    """
    m = moment.double()
    eye = torch.eye(m.shape[-1], dtype=m.dtype, device=m.device)
    level = m.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30) if m.shape[-1] else m.new_ones(m.shape[:-2])
    factor = torch.linalg.cholesky(m + ridge * level[..., None, None] * eye)
    result: Tensor = torch.linalg.solve_triangular(factor, eye.expand_as(factor), upper=False).float()
    return result


def conjugate_gradients(
    operator: Callable[[Blocks], Blocks], residual: Blocks, iterations: int, tolerance: float = 1e-10
) -> Blocks:
    """Solve A x = residual for a symmetric positive semi-definite A, starting at 0.

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
        if energy <= tolerance * first:
            break
        image = operator(p)
        curvature = _dot(p, image)
        if curvature <= 0:
            break
        step = energy / curvature
        for xb, pb in zip(x, p, strict=True):
            xb.add_(pb, alpha=step)
        for rb, ib in zip(r, image, strict=True):
            rb.sub_(ib, alpha=step)
        previous, energy = energy, _dot(r, r)
        p = [rb + (energy / previous) * pb for rb, pb in zip(r, p, strict=True)]
    return x


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float(torch.dot(x.flatten(), y.flatten())) for x, y in zip(a, b, strict=True))


def thin(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Split a matrix [D, r] whose rank is known to be at most `rank`: [D, k] orthonormal and [k, r], k <= rank."""
    # As many random combinations of its columns span the same space.
    mixing = torch.randn(weight.shape[1], rank, generator=torch.Generator().manual_seed(0)).to(weight)
    basis = torch.linalg.qr(weight @ mixing).Q
    return basis, basis.mT @ weight

"""`Weighted.pull` by its kernel against float64, as JSON: relative errors by shape, and whether the kernel ran."""

import json

import torch

from attnedit.passes.mla.least_squares import Weighted
from attnedit.passes.sample import Chunk
from attnedit.targets.attention.triton_support import runs_on

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def error_of(shape: tuple[int, int, int, int], generator: torch.Generator) -> float:
    """Of one shape [N, H, Q, T], with weights over many orders of magnitude and a query that counts nothing."""
    error = torch.randn(shape, generator=generator).to(DEVICE)
    weight = (torch.rand(shape, generator=generator) ** 20).to(DEVICE)
    weight[0, 0, 0] = 0
    wide, weights = error.double(), weight.double()
    mean = (weights * wide).sum(-1, keepdim=True) / weights.sum(-1, keepdim=True).clamp(min=1e-30)
    expected = weights * (wide - mean)
    chunk = Chunk(slice(0, shape[0]), slice(0, shape[2]), slice(0, shape[3]))
    found = Weighted(0, chunk, error.clone(), weight).pull(error)
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-30))


def main() -> None:
    """Print the errors of rows shorter than a block, of one block, one more, and several."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 3, 7), (2, 1, 2, 2048), (1, 3, 1, 2049), (1, 1, 2, 5000)]
    errors = {str(shape): error_of(shape, generator) for shape in shapes}
    print(json.dumps({"kernel": runs_on(DEVICE), "errors": errors}))


if __name__ == "__main__":
    main()

"""Text that repeats itself, to measure and to train copying on."""

from __future__ import annotations

import torch
from torch import Tensor

MOST_REPEATS = 3
"""Passages of a window that come again."""


def with_repeats(windows: Tensor, generator: torch.Generator) -> Tensor:
    """Windows in which one to `MOST_REPEATS` passages are written once more further on, over what was there.

    In-context copying (induction heads, arXiv 2209.11895) needs exact keys over long distances, which a small cache
    loses first. Where text has few such repeats, these have more.

    Args:
        windows: token ids [N, L]; not changed.
        generator: of the number of passages, their lengths (L / 64 to L / 6) and their places.
    """
    length = windows.shape[1]
    shortest, longest = max(1, length // 64), max(1, length // 6)
    if length < 2 * longest:
        return windows.clone()

    def draw(least: int, most: int) -> int:
        return int(torch.randint(least, most + 1, (), generator=generator))

    repeated = windows.clone()
    for row in repeated:
        for _ in range(draw(1, MOST_REPEATS)):
            size = draw(shortest, longest)
            first = draw(0, length - 2 * size)
            again = draw(first + size, length - size)
            row[again : again + size] = row[first : first + size].clone()
    return repeated

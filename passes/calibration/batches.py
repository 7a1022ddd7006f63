"""Which windows each training step sees: a function of seed and step alone, so that a run can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

HELD_OUT_SHARE = 32
"""One window of so many is held out."""
HELD_OUT_MOST = 32
MOST_REPEATS = 3
"""Passages of a window that come again."""


@dataclass(frozen=True)
class Batches:
    """Training windows of several sources, mixed, and windows that training never sees.

    Attributes:
        windows: token ids [N, L], int64, all sources one after the other; then, where passages are to be repeated, the
            same windows with repeats.
        order: rows of `windows` by step [steps, B].
        held_out: token ids [M, L] that no step sees; the training windows themselves where there is only one.
    """

    windows: Tensor
    order: Tensor
    held_out: Tensor

    def __getitem__(self, step: int) -> Tensor:
        """Rows of a step, [B, L]."""
        return self.windows[self.order[step]]


def mix(
    sources: Sequence[Tensor],
    weights: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    repeats: float = 0.0,
    seed: int,
) -> Batches:
    """Hold some windows out and mix the rest.

    Every source is gone through in a new random order each time round; which source a place in a batch goes to is
    random by weight. Windows are held out evenly spread over each source.

    Args:
        sources: token ids [N_i, L], int64, of equal L.
        weights: share of the training windows from each source, not negative, any sum above 0.
        steps: how many.
        batch_size: B.
        repeats: fraction of the places in batches whose window goes through `with_repeats`.
        seed: same seed, same batches.
    """
    generator = torch.Generator().manual_seed(seed)
    held, kept = zip(*(hold_out(source) for source in sources), strict=True)
    shares = torch.tensor(weights, dtype=torch.float64)
    places = torch.multinomial(shares, steps * batch_size, replacement=True, generator=generator) if steps else None
    order = torch.zeros(steps * batch_size, dtype=torch.int64)
    first = 0
    for index, rows in enumerate(kept):
        if places is not None:
            mine = places == index
            count = int(mine.sum())
            rounds = [torch.randperm(len(rows), generator=generator) for _ in range(-(-count // len(rows)))]
            if rounds:
                order[mine] = first + torch.cat(rounds)[:count]
        first += len(rows)
    windows = torch.cat(kept)
    if repeats and steps:
        again = torch.rand(len(order), generator=generator) < repeats
        order[again] += len(windows)
        windows = torch.cat([windows, with_repeats(windows, generator)])
    return Batches(windows, order.view(steps, batch_size), torch.cat(held))


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


def hold_out(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [N, L] that training never sees, evenly spread, and the others; a single one is both."""
    count = min(HELD_OUT_MOST, max(1, len(windows) // HELD_OUT_SHARE))
    if len(windows) <= 1:
        return windows, windows
    chosen = torch.zeros(len(windows), dtype=torch.bool)
    chosen[(torch.arange(count) * len(windows)) // count] = True
    return windows[chosen], windows[~chosen]

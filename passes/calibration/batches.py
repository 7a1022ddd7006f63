"""Which windows each training step sees: a function of seed and step alone, so that a run can be taken up anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnedit.passes.repeats import with_repeats

HELD_OUT_SHARE = 32
"""One window of so many is held out."""
HELD_OUT_MOST = 32
HELD_OUT_FEW = 8
"""So many are held out of `HELD_OUT_FEW_OF` or more: long windows are few, and one alone may decide what is best."""
HELD_OUT_FEW_OF = 64


@dataclass(frozen=True)
class Batches:
    """Training windows of several sources, mixed, and windows that training never sees.

    Attributes:
        windows: token ids [N, L], int64, all sources one after the other; then, where passages are to be repeated, the
            same windows with repeats, once for each number of tokens that steps see, which the repeats are within.
        order: rows of `windows` by step [steps, B].
        held_out: token ids [M, L] that no step sees; the training windows themselves where there is only one.
        lengths: tokens of a window that each step sees [steps], at most L.
        starts: where in its window each place of a batch starts [steps, B].
        seed: of the noise.
    """

    windows: Tensor
    order: Tensor
    held_out: Tensor
    lengths: Tensor
    starts: Tensor
    seed: int = 0

    def __getitem__(self, step: int) -> Tensor:
        """What a step sees, token ids [B, its length]."""
        columns = self.starts[step][:, None] + torch.arange(int(self.lengths[step]))
        return self.windows[self.order[step]].gather(1, columns)

    def noisy(self, step: int, fraction: float) -> Tensor:
        """The same with a fraction of the tokens replaced by random ones of all windows; the first token stays.

        As in SwitchOut (arXiv 1808.07512), but drawn from the text, not from the vocabulary, and with the source's
        distributions for what is replaced, as for all: distillation needs no label that would then be wrong.
        """
        ids = self[step]
        if not fraction:
            return ids
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        chosen = torch.rand(ids.shape, generator=generator) < fraction
        chosen[:, 0] = False
        others = torch.randint(self.windows.numel(), ids.shape, generator=generator)
        return torch.where(chosen, self.windows.flatten()[others], ids)

    def tokens(self, step: int) -> int:
        """That a step sees."""
        return self.order.shape[1] * int(self.lengths[step])


def mix(
    sources: Sequence[Tensor],
    weights: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    repeats: float = 0.0,
    lengths: Sequence[int] | None = None,
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
        repeats: fraction of the places in the first batches whose window goes through `with_repeats`; falls linearly to
            none in the last, anew for each row of steps that see as many tokens.
        lengths: tokens of a window that each step sees, at most L, from a random place on; None for all.
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
    seen = torch.tensor([windows.shape[1]] * steps if lengths is None else lengths, dtype=torch.int64)
    order = order.view(steps, batch_size)
    room = (windows.shape[1] - seen + 1)[:, None]
    starts = (torch.rand(order.shape, generator=generator, dtype=torch.float64) * room).long()
    if repeats and steps:
        again = torch.rand(order.shape, generator=generator) < repeats * _falling(seen)[:, None]
        pool = [windows]
        for length in seen.unique().tolist():
            chosen = again & (seen == length)[:, None]
            order[chosen] += len(windows) * len(pool)
            starts[chosen] -= starts[chosen] % length
            pool.append(_with_repeats(windows, length, generator))
        windows = torch.cat(pool)
    return Batches(windows, order, torch.cat(held), seen, starts, seed)


def _falling(lengths: Tensor) -> Tensor:
    """From 1 to nothing over every row of steps with one length [steps].

    What copying over a distance takes is learned early; how often it pays is left to windows as they are.
    """
    _, runs = lengths.unique_consecutive(return_counts=True)
    return torch.cat([1 - torch.arange(run) / run for run in runs.tolist()])


def _with_repeats(windows: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Windows [N, L] with repeats inside each piece of `length` tokens; what is left over stays."""
    whole = windows.shape[1] // length * length
    pieces = with_repeats(windows[:, :whole].reshape(-1, length), generator).view(len(windows), whole)
    return torch.cat([pieces, windows[:, whole:]], dim=1)


def hold_out(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Windows [N, L] that training never sees, evenly spread, and the others; a single one is both."""
    few = HELD_OUT_FEW if len(windows) >= HELD_OUT_FEW_OF else 1
    count = min(HELD_OUT_MOST, max(few, len(windows) // HELD_OUT_SHARE))
    if len(windows) <= 1:
        return windows, windows
    chosen = torch.zeros(len(windows), dtype=torch.bool)
    chosen[(torch.arange(count) * len(windows)) // count] = True
    return windows[chosen], windows[~chosen]

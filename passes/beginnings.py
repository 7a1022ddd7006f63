"""Beginnings of windows, for what has to be right from the first token on.

Nothing is cut from the first token of a window, so that a sink can only do it harm, and many models make it the token
that all others attend to (arXiv 2309.17453). Calibration windows are few, and so are their first tokens: a token that
begins none of them may be lost, and the whole text after it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LENGTH = 4
"""Tokens of a beginning."""
MOST = 512
SHARE = 8
"""Beginnings are at most one of so many tokens."""


def beginnings(windows: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Short windows from random places of calibration windows; none where all begin with the same token anyway.

    Args:
        windows: token ids [N, T] of each length T, int64, no padding.
        seed: of the places.

    Returns:
        Nothing, or one tensor of token ids [M, `LENGTH`].
    """
    first = torch.cat([part[:, 0] for part in windows])
    count = min(MOST, sum(part.numel() for part in windows) // (SHARE * LENGTH))
    fit = [part for part in windows if part.shape[1] >= LENGTH]
    if not fit or not count or (len(first) > 1 and bool((first == first[0]).all())):
        return []
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        part = fit[int(torch.randint(len(fit), (), generator=generator))]
        row = int(torch.randint(len(part), (), generator=generator))
        start = int(torch.randint(part.shape[1] - LENGTH + 1, (), generator=generator))
        rows.append(part[row, start : start + LENGTH])
    return [torch.stack(rows)]


def begins(length: int, longest: int) -> bool:
    """Whether windows of a length are beginnings, beside others of up to `longest` tokens."""
    return length <= LENGTH and length < longest


def without_beginnings(windows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Split what fits are made on into windows and beginnings."""
    longest = max((part.shape[1] for part in windows), default=0)
    begun = [part for part in windows if begins(part.shape[1], longest)]
    return [part for part in windows if not begins(part.shape[1], longest)], begun

"""How far a mean over a few windows or prompts can be trusted: bootstrap over them, Wilson's formula for shares."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

RESAMPLES = 10_000
CONFIDENCE = 0.95
_DRAWS = 2**22  # items drawn at once, of all resamples

Interval: TypeAlias = tuple[float, float] | None
"""Lower and upper end; None where there is only one item."""


def interval_of_mean(values: Tensor) -> Interval:
    """95 % percentile bootstrap interval of the mean of independent items [N], N windows or prompts.

    For a paired comparison give the differences. Where all items are equal the interval has no width: N of them
    alike say only that at most about 3 / N of all differ.

    >>> interval_of_mean(torch.tensor([0.0, 1.0] * 50))
    (0.4, 0.6)
    >>> interval_of_mean(torch.tensor([2.0]))
    """
    return None if len(values) < 2 else percentiles(resampled_means(values))


def resampled_means(values: Tensor, seed: int = 0) -> Tensor:
    """Means [`RESAMPLES`] of items [N] drawn with replacement, float64; a seed always draws the same of N."""
    count = len(values)
    values = values.detach().to("cpu", torch.float64)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(1, _DRAWS // count)
    sizes = [min(at_once, RESAMPLES - done) for done in range(0, RESAMPLES, at_once)]
    drawn = (torch.randint(count, (size, count), generator=generator) for size in sizes)
    return torch.cat([values[places].mean(1) for places in drawn])


def percentiles(resampled: Tensor) -> tuple[float, float]:
    """What 95 % of resampled figures [R] lie between."""
    ordered, tail = resampled.sort().values, (1 - CONFIDENCE) / 2
    low, high = ordered[[math.floor(tail * len(ordered)), math.ceil((1 - tail) * len(ordered)) - 1]].tolist()
    return low, high


def interval_of_share(share: float, count: int) -> tuple[float, float]:
    """95 % interval of the share of ``count`` independent trials that succeeded (Wilson 1927).

    Of use near 0 and 1, too, where all trials ended alike and a bootstrap would see no doubt.

    >>> interval_of_share(1.0, 20)
    (0.8388..., 1.0)
    """
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def interval_of_exponential(values: Tensor) -> Interval:
    """The same for exp of the mean: a perplexity of losses [N], or a ratio of two of their paired differences."""
    found = interval_of_mean(values)
    return found and (exponential(found[0]), exponential(found[1]))


def exponential(value: float) -> float:
    """Exp of a loss, without overflow: a broken model's loss may be anything."""
    return math.exp(min(value, 700.0))

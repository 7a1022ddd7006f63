"""Perplexity by position inside long windows: whether a model still reads what lies far back.

Letters in shapes: N windows, T tokens per window.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.evaluation.evaluate import text_windows, window_losses
from attnedit.compiler.evaluation.intervals import Interval, exponential, interval_of_exponential
from attnedit.compiler.progress import Progress
from attnedit.compiler.reporting.records import LossCurve

FIRST_RANGE = 1024
"""Tokens in the first range; every further one ends at twice the position."""
WINDOWS = 12
FIRST_END = 64
"""Of the ranges of a curve."""


@dataclass(frozen=True)
class RangePerplexity:
    """Result for the tokens of one range of positions in a window.

    Attributes:
        start: position of the first token, from 0.
        end: position after the last. The first token of a window is never predicted.
        perplexity: exp of the mean negative log-likelihood of these tokens.
        interval: its 95 % bootstrap interval over windows; None for one window.
        tokens: how many were predicted.
        ratio: perplexity over that of the model compared with, on the same windows; None without one.
        ratio_interval: 95 % bootstrap interval of the ratio over windows, paired; None without one, or for one window.
    """

    start: int
    end: int
    perplexity: float
    interval: Interval
    tokens: int
    ratio: float | None = None
    ratio_interval: Interval = None


def perplexity_by_position(
    model: PreTrainedModel,
    tokens: Tensor,
    *,
    against: PreTrainedModel | None = None,
    seq_len: int,
    windows: int = WINDOWS,
    batch: int = 1,
    progress: Progress | None = None,
) -> list[RangePerplexity]:
    """Perplexity of the first 1,024 tokens of long windows, the next 1,024, the next 2,048, and so on, doubling.

    Args:
        model: causal language model.
        tokens: int64 [number of tokens], the whole text in order, cut as by
            `attnedit.compiler.evaluation.evaluate.perplexity`.
        against: another model on the same windows; the result has the ratios to it.
        seq_len: window length, at most the model's context.
        windows: how many.
        batch: windows per forward pass.
        progress: told after every forward pass.

    Returns:
        One entry per range, in the order of the positions.

    Raises:
        UsageError: as `attnedit.compiler.evaluation.evaluate.perplexity`.
        AttneditError: the loss of one of the models is not finite.
    """
    rows = text_windows(model, tokens, seq_len=seq_len, windows=windows)
    other = None
    if against is not None:
        other = window_losses(
            against, text_windows(against, tokens, seq_len=seq_len, windows=windows), batch=batch, progress=progress
        )
    return losses_by_position(window_losses(model, rows, batch=batch, progress=progress), other)


def loss_curve(
    source: PreTrainedModel, result: PreTrainedModel, rows: Tensor, data: str, progress: Progress | None = None
) -> LossCurve:
    """Loss of source and result over the positions of the same windows [N, T], in ranges whose ends double.

    Raises:
        AttneditError: the loss of one of the models is not finite.
    """
    ends = [min(FIRST_END, rows.shape[1])]
    while ends[-1] < rows.shape[1]:
        ends.append(min(2 * ends[-1], rows.shape[1]))

    def means(model: PreTrainedModel) -> list[float]:
        losses = window_losses(model, rows, progress=progress)
        return [float(_window_means(losses, start, end).mean()) for start, end in itertools.pairwise([0, *ends])]

    return LossCurve(data=data, windows=len(rows), ends=ends, source=means(source), result=means(result))


def losses_by_position(losses: Tensor, against: Tensor | None = None) -> list[RangePerplexity]:
    """Sum up by position what `window_losses` returned [N, T - 1], beside another model's if there are any."""
    length = losses.shape[1] + 1
    ends = [0, FIRST_RANGE]
    while ends[-1] < length:
        ends.append(2 * ends[-1])
    ends[-1] = length
    found = []
    for start, end in itertools.pairwise(ends):
        mine = _window_means(losses, start, end)
        perplexity = exponential(float(mine.mean()))
        row = RangePerplexity(start, end, perplexity, interval_of_exponential(mine), len(mine) * (end - max(1, start)))
        if against is not None:
            rise = mine - _window_means(against, start, end)
            ratio = exponential(float(rise.mean()))
            row = replace(row, ratio=ratio, ratio_interval=interval_of_exponential(rise))
        found.append(row)
    return found


def _window_means(losses: Tensor, start: int, end: int) -> Tensor:
    """Mean loss [N] of the tokens at positions start to end of each window; losses begin at position 1."""
    return losses[:, max(0, start - 1) : end - 1].to(torch.float64).mean(1)

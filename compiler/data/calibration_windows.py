"""Calibration windows of the closed form: of the length that is to be served, with shorter ones beside them.

A cache is made smaller for long contexts, and what lies far back is only seen in long windows. Short ones keep the near
range accurate: many more documents and beginnings fit into as many tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.data.image_samples import image_samples
from attnedit.compiler.data.token_windows import (
    DEFAULT_SAMPLED_TOKENS,
    DEFAULT_TOKENS,
    check_tokens_asked,
    context_length,
    ready_windows,
    served_length,
    shares_of,
)
from attnedit.compiler.data.window_sources import DEFAULT_WINDOW, TextSource, WindowSource, open_source
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.model_inputs import ModelInputs
from attnedit.compiler.model_io.processors import Processor
from attnedit.compiler.progress import Progress

LONG_WINDOWS, SHORT_WINDOWS = 16, 32
"""How many of each length unless a number of tokens is given."""
LONG_SHARE = 0.8
"""Of a given number of tokens, what goes into long windows."""


@dataclass(frozen=True)
class CalibrationWindows:
    """Token ids that a closed form is fitted on.

    Attributes:
        parts: windows of each length, int64 [N, L] on the CPU, longest first.
        notes: what the user should know of their length.
        inputs: what the model takes with some of them: images.
    """

    parts: list[Tensor]
    notes: list[str] = field(default_factory=list)
    inputs: ModelInputs = field(default_factory=ModelInputs)

    @property
    def length(self) -> int:
        """Of the longest."""
        return self.parts[0].shape[1]

    @property
    def tokens(self) -> int:
        """Of all."""
        return sum(part.numel() for part in self.parts)

    def __str__(self) -> str:
        return ", ".join(f"{len(part)} x {part.shape[1]:,}" for part in self.parts)


def calibration_windows(
    source: TextSource | Iterable[Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    tokens: int | None = None,
    length: int | None = None,
    least: int = DEFAULT_WINDOW,
    seed: int = 0,
    progress: Progress | None = None,
    processor: Processor | None = None,
) -> CalibrationWindows:
    """Cut calibration data into long and short windows; samples with images are windows of whatever length they have.

    Args:
        source: see `attnedit.compiler.data.token_windows.token_windows`; ready windows of token ids, one tensor [N, L]
            or several, are taken as they are.
        tokenizer: may be None where no text has to be tokenised.
        model: for its context, its vocabulary, its samples and its device.
        tokens: how many at most; `LONG_WINDOWS` and `SHORT_WINDOWS` unless given.
        length: of the longest windows; `served_length` unless given.
        least: length of the short ones.
        seed: of samples and of the places in a long text.
        progress: see `attnedit.compiler.progress`.
        processor: of a vision-language model, for chats with images.

    Raises:
        UsageError: the length is beyond the context, the tokens asked for or the data; ready windows have another; or
            what `token_windows` refuses.
    """
    context = context_length(model)
    if length is not None and not 2 <= length <= context:
        raise UsageError(
            f"calibration_length {length} is not between 2 and the model's context of {context}; give one that is"
        )
    if (ready := _ready(source, model)) is not None:
        return _as_they_are(ready, tokens, length)
    if source is None and tokens is None:
        tokens = DEFAULT_SAMPLED_TOKENS
    if tokens is not None:
        check_tokens_asked(tokens)
    if tokens is not None and length is not None and tokens < length:
        raise UsageError(f"calibration_length {length} is beyond the {tokens} calibration tokens; give more of these")
    longest, notes = length or served_length(model), []
    long_share = 1.0 if source is None else LONG_SHARE  # samples are seen twice
    if tokens is not None and length is None and longest > (room := max(least, int(long_share * tokens))):
        notes.append(_shortened(longest, room, f"{tokens:,} calibration tokens leave room for no longer ones"))
        longest = room
    parts = list(shares_of(source).items()) if isinstance(source, Mapping) else [(source, 1.0)]
    found: dict[int, list[Tensor]] = {}
    inputs = ModelInputs()
    for part, share in parts:
        own = None if tokens is None else max(2, round(tokens * share))
        samples = image_samples(part, processor, model, own or round(DEFAULT_TOKENS * share), inputs)
        if samples is not None:
            if length is not None and length != max(sample.shape[1] for sample in samples):
                raise UsageError(
                    "calibration_length is for text, and samples with images are taken whole; leave it out"
                )
            for sample in samples:
                found.setdefault(sample.shape[1], []).append(sample)
            continue
        plan = _counts(own, longest, least, share)
        read = sum(each * count for each, count in plan)
        if part is None and own is not None:
            plan, read = _joined_counts(own, longest, least), own
        opened = open_source(part, tokenizer, model, read, seed, progress)
        for windows in _cut(opened, plan, least, notes if len(parts) == 1 else None):
            found.setdefault(windows.shape[1], []).append(windows)
    if length is not None and (got := max(found)) < length:
        raise UsageError(f"calibration_length {length} is beyond the data, whose longest window has {got} tokens")
    return CalibrationWindows([torch.cat(found[each]) for each in sorted(found, reverse=True)], notes, inputs)


def _cut(source: WindowSource, plan: list[tuple[int, int]], least: int, notes: list[str] | None) -> Iterator[Tensor]:
    """Windows of a source by length, shorter ones where it has no more tokens.

    Args:
        source: where from.
        plan: length and number of windows, long ones first.
        least: where the source is all there is, windows get no shorter than this, or than the last in the plan.
        notes: gets a line for windows that are shorter; None for a part of a mixture, which gives what it has.

    Raises:
        UsageError: the source is all there is, and has no window of the least length.
    """
    floor = min(least, plan[-1][0])
    for length, count in plan:
        last = (length, count) == plan[-1]
        there = min(length, source.available(length))
        if notes is None:
            wanted = last or there == length
        else:
            there = max(there, floor)
            wanted = last or there > floor
            if there < length:
                notes.append(_shortened(length, there, f"the data has {source.available(length):,}"))
        if wanted:
            yield source.windows(max(2, there), count)


def _joined_counts(tokens: int, long: int, short: int) -> list[tuple[int, int]]:
    """Length and number of windows of own samples, which are seen twice: joined into long windows, and as they are."""
    short = min(short, long, tokens)
    joined = [(long, tokens // long)] if short < long <= tokens else []
    return [*joined, (short, tokens // short)]


def _counts(tokens: int | None, long: int, short: int, share: float) -> list[tuple[int, int]]:
    """Length and number of windows of data, long ones first."""
    short = min(short, long, tokens or short)
    if long < 2 * short:
        length = min(long, tokens or long)
        return [(length, max(1, (tokens or round(DEFAULT_TOKENS * share)) // length))]
    if tokens is None:
        return [(long, max(1, round(LONG_WINDOWS * share))), (short, max(1, round(SHORT_WINDOWS * share)))]
    count = max(1, int(LONG_SHARE * tokens) // long) if tokens >= long else 0
    found = [(long, count), (short, (tokens - count * long) // short)]
    return [(length, number) for length, number in found if number]


def _ready(source: object, model: PreTrainedModel) -> list[Tensor] | None:
    """Windows of token ids that were given as tensors [N, L]; None where the source is something else."""
    tensors = [source] if isinstance(source, Tensor) else source
    if not isinstance(tensors, Sequence) or isinstance(tensors, str) or not tensors:
        return None
    if not all(isinstance(part, Tensor) and part.ndim == 2 and part.shape[1] >= 2 for part in tensors):
        return None
    return sorted((ready_windows(part, model) for part in tensors), key=lambda part: -part.shape[1])


def _as_they_are(ready: list[Tensor], tokens: int | None, length: int | None) -> CalibrationWindows:
    if length is not None and ready[0].shape[1] != length:
        raise UsageError(
            f"calibration_length is {length}, and the windows given have {ready[0].shape[1]} tokens; leave it out"
        )
    if tokens is not None:
        total = sum(part.numel() for part in ready)
        kept = min(1.0, tokens / total)
        ready = [part[: max(1, int(len(part) * kept + 1e-9))] for part in ready]
    return CalibrationWindows(ready)


def _shortened(wanted: int, got: int, why: str) -> str:
    return f"calibration windows are shortened from {wanted:,} to {got:,} tokens: {why}"

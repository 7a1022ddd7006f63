"""Where calibration windows are cut from: text, sequences of token ids, and the model's own samples."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import Any, Protocol, TypeAlias, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.data.documents import read_documents, source_path
from attnedit.compiler.data.sampling import sample_windows
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.compiler.progress import Progress, silent, stage

TextSource: TypeAlias = str | PathLike[str] | Mapping[str, float] | Iterable[str] | Iterable[torch.Tensor] | None

DEFAULT_WINDOW = 1024
#: Characters per token that plain text hardly exceeds; only bounds how much is read before counting.
_CHARACTERS_PER_TOKEN = 8
#: Times as many characters as a number of tokens takes on average surely hold so many.
_SURELY = 1.5


class WindowSource(Protocol):
    """Data that calibration windows are cut from, of any lengths."""

    def windows(self, length: int, count: int) -> torch.Tensor:
        """Up to `count` windows, int64 [N, length] on the CPU, N >= 1.

        Raises:
            UsageError: not even one is there, or ids are outside the vocabulary.
        """

    def available(self, length: int) -> int:
        """Tokens that are there for windows of a length: all, or at least `length`."""


def open_source(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    tokens: int,
    seed: int,
    progress: Progress | None,
) -> WindowSource:
    """Read data that windows can be cut from; for the arguments see `token_windows`. A mixture is several such.

    Raises:
        UsageError: missing file or dataset, unreadable or empty.
    """
    if isinstance(tokenizer, str):
        raise UsageError(f"tokenizer is only a name, {tokenizer!r}; load it with AutoTokenizer first")
    if source is None:
        return SamplesWindows(model, tokenizer, tokens, seed, progress)
    if not isinstance(source, str | PathLike):
        first, source = _peek(source)
        if isinstance(first, torch.Tensor):
            return IdsWindows(_joined(cast(Iterable[torch.Tensor], source), tokens), model)
    if tokenizer is None:
        raise UsageError("calibration text needs a tokenizer; pass tokenizer=..., or token tensors instead of text")
    text = cast("str | PathLike[str] | Iterable[str]", source)
    return Text.gather(text, tokenizer, tokens, model, seed, progress or silent)


@dataclass(frozen=True)
class SamplesWindows:
    """The model's own; windows longer than a sample are several of them, one after the other."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    tokens: int
    seed: int
    progress: Progress | None

    @cached_property
    def _drawn(self) -> dict[int, torch.Tensor]:
        """What was sampled, by the length asked for."""
        return {}

    def windows(self, length: int, count: int) -> torch.Tensor:
        """See `WindowSource`."""
        if length > DEFAULT_WINDOW:
            return _cut(self.windows(DEFAULT_WINDOW, self.tokens // DEFAULT_WINDOW).flatten(), length, count)
        if length not in self._drawn:
            self._drawn[length] = sample_windows(
                self.model, self.tokenizer, count=count, length=length, seed=self.seed, progress=self.progress
            )
        return self._drawn[length]

    def available(self, length: int) -> int:
        """See `WindowSource`."""
        return self.tokens


@dataclass(frozen=True)
class IdsWindows:
    """Sequences of token ids, joined in order [M]."""

    ids: torch.Tensor
    model: PreTrainedModel

    def windows(self, length: int, count: int) -> torch.Tensor:
        """See `WindowSource`."""
        if len(self.ids) < length:
            raise UsageError(
                f"the calibration data is too short: {len(self.ids)} tokens, and one window needs {length}"
            )
        return check_vocabulary(_cut(self.ids, length, count), self.model)

    def available(self, length: int) -> int:
        """See `WindowSource`."""
        return len(self.ids)


@dataclass(frozen=True)
class Text:
    """Text that was read: its documents, how they are joined, and the name to use for it in messages."""

    documents: list[str]
    separator: str
    name: str
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel | None
    seed: int
    progress: Progress

    @classmethod
    def gather(
        cls,
        source: str | PathLike[str] | Iterable[str],
        tokenizer: PreTrainedTokenizerBase,
        tokens: int | None,
        model: PreTrainedModel | None = None,
        seed: int = 0,
        progress: Progress = silent,
    ) -> Text:
        """Read a source: a file or a list whole, a stream as far as so many tokens can need."""
        separator = cast("str | None", tokenizer.eos_token) or "\n\n"
        if isinstance(source, str | PathLike):
            documents, name = read_documents(source, tokenizer), str(source)
            whole = source_path(source).exists()
        else:
            documents, name = iter(source), "the calibration text"
            whole = isinstance(source, Sequence)
        # A stream may have no end: read what the tokens asked for can need. A file or a list is read whole, since
        # windows are spread over all of it.
        limit = None if whole or tokens is None else tokens * _CHARACTERS_PER_TOKEN
        parts, size = [], 0
        for document in documents:
            if not isinstance(document, str):
                raise UsageError(f"{name} holds {type(document).__name__}; give strings, or only tensors of token ids")
            if document.strip():
                parts.append(document)
                size += len(document)
            if limit is not None and size >= limit:
                break
        if not parts:
            raise UsageError(f"{name} holds no text (0 tokens)")
        return cls(parts, separator, name, tokenizer, model, seed, progress)

    @cached_property
    def text(self) -> str:
        """All documents, joined."""
        return self.separator.join(self.documents)

    @cached_property
    def ids(self) -> list[int]:
        """Of the whole text."""
        with stage("tokenise", self.progress):
            return _encode(self.tokenizer, self.text)

    @cached_property
    def _characters_per_token(self) -> float:
        sample = self.text[:20_000]
        return len(sample) / max(1, len(_encode(self.tokenizer, sample)))

    def _characters(self, tokens: float) -> float:
        """Characters that surely hold so many tokens."""
        return _SURELY * tokens * self._characters_per_token

    def _is_longer(self, text: str, tokens: float) -> bool:
        """Whether a text surely has so many tokens."""
        return len(text) > self._characters(tokens)

    def available(self, length: int) -> int:
        """See `WindowSource`."""
        body = length - len(_prefix(self.tokenizer))
        return length if self._is_longer(self.text, body) else len(self.ids) + length - body

    def windows(self, length: int, count: int) -> torch.Tensor:
        """See `WindowSource`."""
        prefix = _prefix(self.tokenizer)
        body = length - len(prefix)
        rows = self._of_long_documents(body, count) if length > DEFAULT_WINDOW else []
        if len(rows) < count:
            rows += self._of_joined(body, count - len(rows))
        windows = torch.tensor([prefix + row for row in rows], dtype=torch.int64)
        return windows if self.model is None else check_vocabulary(windows, self.model)

    def _of_long_documents(self, body: int, count: int) -> list[list[int]]:
        """Rows that lie in one document each: what a long context is for; none where the text is one document."""
        fitting = [document for document in self.documents if self._is_longer(document, body)]
        if len(self.documents) == 1 or not fitting:
            return []
        generator = random.Random(self.seed)
        pieces = [(document, int(len(document) / self._characters(body))) for document in fitting]
        places = [(document, len(document) // many, place) for document, many in pieces for place in range(many)]
        rows = []
        for document, share, place in generator.sample(places, min(count, len(places))):
            row = self._row(document, place * share, (place + 1) * share, body)
            rows += [row] if len(row) == body else []
        return rows

    def _of_joined(self, body: int, count: int) -> list[list[int]]:
        share = len(self.text) // count
        rows: list[list[int]] = []
        if self._is_longer(self.text, body * count):  # far more than asked for: tokenise only around each window
            generator = random.Random(self.seed)
            for index in range(count):
                self.progress("tokenise", index, count)
                slack = max(0, share - int(1.25 * body * self._characters_per_token))
                start = index * share + generator.randint(0, slack)
                row = self._row(self.text, start, (index + 1) * share, body)
                rows += [row] if len(row) == body else []
            self.progress("tokenise", count, count)
        if len(rows) == count:
            return rows
        ids = self.ids
        available = len(ids) // body
        if not available:
            raise UsageError(
                f"{self.name} is too short: {len(ids)} tokens, and one window needs {body}; give more text, or ask "
                f"for fewer calibration tokens"
            )
        taken = min(count, available)
        spread = [index * (len(ids) - body) // max(1, taken - 1) for index in range(taken)]
        return [ids[start : start + body] for start in spread]

    def _row(self, text: str, start: int, end: int, tokens: int) -> list[int]:
        return _encode_at_least(self.tokenizer, text, start, end, tokens, self._characters_per_token)


def _encode_at_least(
    tokenizer: PreTrainedTokenizerBase, text: str, start: int, end: int, tokens: int, characters_per_token: float
) -> list[int]:
    """The first ``tokens`` ids from a word boundary after ``start``; fewer if ``end`` comes before."""
    space = text.find(" ", start, end)
    start = space if space >= 0 else start
    size = int(1.2 * tokens * characters_per_token)
    while True:
        ids = _encode(tokenizer, text[start : min(end, start + size)])
        # The last token may be a word cut short, so one more than needed must be there.
        if len(ids) > tokens or start + size >= end:
            return ids[:tokens]
        size *= 2


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return cast("list[int]", tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token if the tokenizer puts it before every text, else nothing."""
    ids = cast("list[int]", tokenizer("a")["input_ids"])
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def _peek(source: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """The first element, and the source again, whole; a sequence stays the sequence it is."""
    if isinstance(source, torch.Tensor):
        return source, [source]
    try:
        iterator: Iterator[Any] = iter(source)
    except TypeError as error:
        raise UsageError(
            f"calibration cannot be a {type(source).__name__}; give a path, a dataset's name, strings or token tensors"
        ) from error
    try:
        first = next(iterator)
    except StopIteration:
        raise UsageError("the calibration data is empty (0 tokens)") from None
    return first, source if isinstance(source, Sequence) else itertools.chain([first], iterator)


def token_ids(tensor: object) -> torch.Tensor:
    """A tensor of token ids as int64 on the CPU; refused where it holds anything else."""
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
        kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise UsageError(f"the calibration data holds {kind} where token ids (int64 tensors) are expected")
    return tensor.detach().to("cpu", torch.int64)


def _joined(source: Iterable[torch.Tensor], tokens: int) -> torch.Tensor:
    """Rows or sequences of ids, one after the other, at least `tokens` of them if there are so many [M]."""
    parts, size = [], 0
    for tensor in source:
        parts.append(token_ids(tensor).flatten())
        size += parts[-1].numel()
        if size >= tokens:
            break
    return torch.cat(parts)


def _cut(ids: torch.Tensor, length: int, count: int) -> torch.Tensor:
    """The first windows [N, length] of ids [M], at most `count`."""
    taken = max(1, min(count, len(ids) // length))
    return ids[: taken * length].view(taken, -1)


def check_vocabulary(windows: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """The windows; refused where they hold ids that the model has no embedding for."""
    rows = embedding_weight(model).shape[0]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= rows:
        raise UsageError(
            f"the calibration data holds token id {high if high >= rows else low}, and the model has embeddings for "
            f"0 to {rows - 1}; give the tokenizer the model was trained with"
        )
    return windows

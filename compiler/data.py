"""Text for calibration and evaluation, from wherever the user has it, as windows of token ids.

Letters in shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import itertools
import pydoc_data.topics
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.documents import read_documents
from attnedit.compiler.errors import UsageError
from attnedit.compiler.progress import Progress, silent, stage
from attnedit.compiler.sampling import sample_windows
from attnedit.compiler.source_checks import embedding_weight

TextSource: TypeAlias = str | PathLike[str] | Mapping[str, float] | Iterable[str] | Iterable[torch.Tensor] | None

DEFAULT_WINDOW = 1024
DEFAULT_CONTEXT = 8192  # where a configuration names none
DEFAULT_TOKENS = 65_536  # with data given
DEFAULT_SAMPLED_TOKENS = 8_192  # of the model's own samples, which cost time to make
#: Characters per token that plain text hardly exceeds; only bounds how much is read before counting.
_CHARACTERS_PER_TOKEN = 8


_LIMITS = (
    *("max_position_embeddings", "max_target_positions", "max_seq_len", "max_sequence_length", "n_positions"),
    "seq_length",
)


def position_limit(model: PreTrainedModel) -> int | None:
    """Positions that the model's configuration names, if it names any."""
    config = model.config.get_text_config(decoder=True)
    named = (getattr(config, name, None) for name in _LIMITS)
    limit = next((int(value) for value in named if isinstance(value, int) and value > 0), None)
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    # A table with a row for padding starts to count after it (RoBERTa).
    padded = [table.padding_idx for table in tables if table.num_embeddings == limit and table.padding_idx is not None]
    words = embedding_weight(model).shape[0]
    return limit if limit is None or limit == words or not padded else limit - padded[0] - 1


def context_length(model: PreTrainedModel) -> int:
    """Positions the model was made for, 8,192 where its configuration names none."""
    return position_limit(model) or DEFAULT_CONTEXT


def token_windows(
    source: TextSource,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    *,
    tokens: int | None = None,
    window: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Pack calibration data into windows of equal length.

    Of a text longer than asked for, windows are taken evenly spread over the whole of it; ``seed`` moves each
    within its share. Of a shorter one, all is used. Documents are joined by the end-of-sequence token, and no
    window gets a beginning-of-sequence token unless the tokenizer puts one before every text.

    Args:
        source: path (txt, jsonl of texts or chats, parquet), name of a dataset, a mixture (a mapping from such to
            weights), strings, tensors of token ids, or None for the model's own samples.
        tokenizer: may be None where no text has to be tokenised.
        model: for its context length, its vocabulary, and its samples.
        tokens: how many at most; the default is 65,536, or 8,192 for samples.
        window: L; the default is 1,024 or the context length, whichever is smaller.
        seed: of the samples and of the places in a long text.
        progress: see `attnedit.compiler.progress`.

    Returns:
        int64 [N, L] on the CPU, N >= 1.

    Raises:
        UsageError: missing file or dataset, unreadable, empty, too short, or ids outside the vocabulary.
    """
    budget = tokens if tokens is not None else DEFAULT_SAMPLED_TOKENS if source is None else DEFAULT_TOKENS
    if budget < 2:
        raise UsageError(f"{budget} calibration tokens are too few; ask for at least 2")
    if isinstance(tokenizer, str):
        raise UsageError(f"tokenizer is only a name, {tokenizer!r}; load it with AutoTokenizer first")
    if isinstance(source, Mapping):
        parts = []
        for part, share in shares_of(source).items():
            wanted: dict[str, Any] = {"tokens": max(2, round(budget * share)), "seed": seed, "progress": progress}
            parts.append(token_windows(part, tokenizer, model, window=window, **wanted))
        shortest = min(windows.shape[1] for windows in parts)
        return torch.cat([windows[:, :shortest] for windows in parts])
    length = min(window or DEFAULT_WINDOW, context_length(model), budget)
    count = budget // length
    if source is None:
        return sample_windows(model, tokenizer, count=count, length=length, seed=seed, progress=progress)
    if isinstance(source, torch.Tensor) and source.ndim == 2 and window is None:
        length = min(length, source.shape[1]) if source.shape[1] >= 2 else length
        count = budget // length
    if not isinstance(source, str | PathLike):
        first, source = _peek(source)
        if isinstance(first, torch.Tensor):
            windows = _pack_tensors(cast(Iterable[torch.Tensor], source), length, count)
            return _check_vocabulary(windows, model)
    if tokenizer is None:
        raise UsageError("calibration text needs a tokenizer; pass tokenizer=..., or token tensors instead of text")
    text = _Text.gather(cast("str | PathLike[str] | Iterable[str]", source), tokenizer, count * length)
    return _check_vocabulary(_windows_of(text, tokenizer, length, count, seed, progress or silent), model)


def shares_of(mixture: Mapping[str, float]) -> dict[str, float]:
    """Weights of a mixture as fractions of 1.

    Raises:
        UsageError: there is no positive weight, or one is negative or no number.

    >>> shares_of({"a.txt": 3, "b.txt": 1})
    {'a.txt': 0.75, 'b.txt': 0.25}
    """
    for name, weight in mixture.items():
        if not isinstance(weight, int | float) or not 0 <= weight < float("inf"):
            raise UsageError(f"the weight of {name} is {weight!r}; give a number that is not negative")
    total = sum(mixture.values())
    if not total:
        raise UsageError("the calibration mixture has no source with a weight above 0")
    return {name: weight / total for name, weight in mixture.items() if weight}


def text_tokens(path: str | PathLike[str], tokenizer: PreTrainedTokenizerBase | None) -> torch.Tensor:
    """Tokenise a whole text in order, without special tokens, for evaluation.

    Args:
        path: a path or a dataset, as in `token_windows`.
        tokenizer: None is refused with a message.

    Returns:
        int64 [number of tokens].

    Raises:
        UsageError: missing, unreadable or empty text, or no tokenizer.
    """
    if tokenizer is None:
        raise UsageError(f"evaluating on {path} needs a tokenizer, and the model's directory holds none")
    text = _Text.gather(path, tokenizer, None)
    return torch.tensor(_encode(tokenizer, text.text), dtype=torch.int64)


def demo_text() -> tuple[str, str]:
    """English prose that is on every machine, the language reference inside Python: (calibration, evaluation).

    Paragraphs that several topics repeat are kept once, so that the two parts share none.
    """
    seen: set[str] = set()
    paragraphs: list[str] = []
    for name in sorted(pydoc_data.topics.topics):
        for block in pydoc_data.topics.topics[name].split("\n\n"):
            paragraph = " ".join(block.split())
            if len(paragraph) >= 120 and paragraph not in seen:
                seen.add(paragraph)
                paragraphs.append(paragraph)
    cut = len(paragraphs) * 3 // 4
    return "\n\n".join(paragraphs[:cut]), "\n\n".join(paragraphs[cut:])


@dataclass(frozen=True)
class _Text:
    """All the text at hand, with the name to use for it in messages."""

    text: str
    name: str

    @classmethod
    def gather(
        cls, source: str | PathLike[str] | Iterable[str], tokenizer: PreTrainedTokenizerBase, tokens: int | None
    ) -> _Text:
        separator = cast("str | None", tokenizer.eos_token) or "\n\n"
        if isinstance(source, str | PathLike):
            documents, name = read_documents(source, tokenizer), str(source)
            whole = Path(source).exists()
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
        return cls(separator.join(parts), name)


def _windows_of(
    text: _Text, tokenizer: PreTrainedTokenizerBase, length: int, count: int, seed: int, progress: Progress
) -> torch.Tensor:
    prefix = _prefix(tokenizer)
    body = length - len(prefix)
    sample = text.text[:20_000]
    characters_per_token = len(sample) / max(1, len(_encode(tokenizer, sample)))
    share = len(text.text) // count
    rows: list[list[int]] = []
    if share > 1.5 * body * characters_per_token:  # far more text than asked for: tokenise only around each window
        generator = random.Random(seed)
        for index in range(count):
            progress("tokenise", index, count)
            slack = max(0, share - int(1.25 * body * characters_per_token))
            start = index * share + generator.randint(0, slack)
            row = _encode_at_least(tokenizer, text.text, start, (index + 1) * share, body, characters_per_token)
            if len(row) == body:
                rows.append(prefix + row)
        progress("tokenise", count, count)
    if len(rows) < count:
        with stage("tokenise", progress):
            ids = _encode(tokenizer, text.text)
        available = len(ids) // body
        if not available:
            raise UsageError(
                f"{text.name} is too short: {len(ids)} tokens, and one window needs {body}; give more text, or ask "
                f"for fewer calibration tokens"
            )
        taken = min(count, available)
        spread = [index * (len(ids) - body) // max(1, taken - 1) for index in range(taken)]
        rows = [prefix + ids[start : start + body] for start in spread]
    return torch.tensor(rows, dtype=torch.int64)


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


def _pack_tensors(source: Iterable[torch.Tensor], length: int, count: int) -> torch.Tensor:
    """Rows or sequences of ids, in order, up to ``count`` windows of ``length``."""
    parts, size = [], 0
    for tensor in source:
        if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point() or tensor.dtype == torch.bool:
            kind = str(tensor.dtype) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UsageError(f"the calibration data holds {kind} where token ids (int64 tensors) are expected")
        parts.append(tensor.detach().to("cpu", torch.int64).flatten())
        size += parts[-1].numel()
        if size >= length * count:
            break
    if size < length:
        raise UsageError(f"the calibration data is too short: {size} tokens, and one window needs {length}")
    taken = min(count, size // length)
    return torch.cat(parts)[: taken * length].view(taken, length)


def _check_vocabulary(windows: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    rows = embedding_weight(model).shape[0]
    low, high = int(windows.min()), int(windows.max())
    if low < 0 or high >= rows:
        raise UsageError(
            f"the calibration data holds token id {high if high >= rows else low}, and the model has embeddings for "
            f"0 to {rows - 1}; give the tokenizer the model was trained with"
        )
    return windows

"""Text for calibration and evaluation, from wherever the user has it, as windows of token ids.

Letters in shapes: N windows, L tokens per window.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.data.window_sources import (
    DEFAULT_WINDOW,
    Text,
    TextSource,
    check_vocabulary,
    open_source,
    token_ids,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.compiler.progress import Progress

DEFAULT_CONTEXT = 8192  # where a configuration names none
DEFAULT_TOKENS = 65_536  # with data given
DEFAULT_SAMPLED_TOKENS = 8_192  # of the model's own samples, which cost time to make

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


def served_length(model: PreTrainedModel) -> int:
    """How far a model is calibrated and evaluated where nothing else is said: its context, up to what is done soon.

    That is 32,768 tokens on an accelerator and 8,192 on a CPU.
    """
    return min(context_length(model), 8192 if embedding_weight(model).device.type == "cpu" else 32_768)


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
        window: L; the default is 1,024 or the context length, whichever is smaller, and for tensors [N, L] their own.
        seed: of the samples and of the places in a long text.
        progress: see `attnedit.compiler.progress`.

    Returns:
        int64 [N, L] on the CPU, N >= 1.

    Raises:
        UsageError: missing file or dataset, unreadable, empty, too short, or ids outside the vocabulary.
    """
    budget = tokens if tokens is not None else DEFAULT_SAMPLED_TOKENS if source is None else DEFAULT_TOKENS
    check_tokens_asked(budget)
    if isinstance(source, Mapping):
        parts = []
        for part, share in shares_of(source).items():
            wanted: dict[str, Any] = {"tokens": max(2, round(budget * share)), "seed": seed, "progress": progress}
            parts.append(token_windows(part, tokenizer, model, window=window, **wanted))
        shortest = min(windows.shape[1] for windows in parts)
        return torch.cat([windows[:, :shortest] for windows in parts])
    if window is None and isinstance(source, torch.Tensor) and source.ndim == 2 and source.shape[1] >= 2:
        rows = len(source) if tokens is None else max(1, budget // source.shape[1])
        return ready_windows(source, model)[:rows]
    length = min(window or DEFAULT_WINDOW, context_length(model), budget)
    return open_source(source, tokenizer, model, budget, seed, progress).windows(length, budget // length)


def check_tokens_asked(tokens: int) -> None:
    """Refuse a number of calibration tokens that makes no window.

    Raises:
        UsageError: it is below 2.
    """
    if tokens < 2:
        raise UsageError(f"{tokens} calibration tokens are too few; ask for at least 2")


def ready_windows(windows: torch.Tensor, model: PreTrainedModel) -> torch.Tensor:
    """Windows of token ids [N, L] as they are, int64 on the CPU.

    Raises:
        UsageError: longer than the model's context, no token ids, or outside its vocabulary.
    """
    if windows.shape[1] > (context := context_length(model)):
        raise UsageError(f"calibration windows have {windows.shape[1]} tokens, and the model's context is {context}")
    if not len(windows):
        raise UsageError("the calibration data is empty (0 tokens)")
    return check_vocabulary(token_ids(windows), model)


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
    """Tokenise a whole text, of a path or a dataset, in order without special tokens: int64 [tokens].

    Raises:
        UsageError: missing, unreadable or empty text, or no tokenizer.
    """
    if tokenizer is None:
        raise UsageError(f"evaluating on {path} needs a tokenizer, and the model's directory holds none")
    return torch.tensor(Text.gather(path, tokenizer, None).ids, dtype=torch.int64)


def demo_text() -> tuple[str, str]:
    """English prose that is on every machine: the language reference inside Python, for demos and tests.

    Returns:
        Text to calibrate on, three quarters of it, and text to evaluate on. Paragraphs that several topics repeat are
        kept once, so that the two parts share none.

    >>> calibration, evaluation = demo_text()
    >>> 2 < len(calibration) / len(evaluation) < 4
    True
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

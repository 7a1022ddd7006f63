"""Does a model find one fact in a long text? A fact is planted at some depth, and asked for at the end.

Scored by which of eight words the model thinks likeliest next, so that a small base model can do it: chance is 1/8.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.data.token_windows import position_limit, served_length
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.intervals import Interval, interval_of_mean, interval_of_share
from attnedit.compiler.model_io.heads import need_language_head
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.compiler.progress import Progress, track

LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
TRIALS = 4
OPTIONS = 8
"""Words to choose from, the right one among them."""

_FACT = "\n\nRemember this: the magic word of {place} is {word}.\n\n"
_QUESTION = "\n\nAs was said above, the magic word of {place} is"
_PLACES = ("Lisbon", "Cairo", "Oslo", "Lima", "Athens", "Dublin", "Vienna", "Tokyo", "Havana", "Prague")
# fmt: off
_WORDS = (
    "apple", "river", "stone", "candle", "garden", "silver", "window", "forest", "bridge",
    "yellow", "summer", "pencil", "castle", "orange", "desert", "mirror", "coffee", "winter",
    "market", "doctor", "guitar", "planet", "rabbit", "temple", "violin", "hammer", "island",
    "jacket", "kitchen", "lemon", "monkey", "needle", "ocean", "paper", "queen", "rocket",
    "shadow", "table", "umbrella", "valley", "water", "zebra", "bottle", "circle", "dragon",
    "eagle",
)
# fmt: on


@dataclass(frozen=True)
class RetrievalScore:
    """Result at one length and depth.

    Attributes:
        length: tokens of the whole prompt.
        depth: where the fact stands, as a fraction of the text before the question.
        accuracy: share of trials in which the right word was the likeliest of `OPTIONS`.
        probability: mean probability of the right word among them.
        trials: how many.
    """

    length: int
    depth: float
    accuracy: float
    probability: float
    trials: int


@dataclass(frozen=True)
class LengthScore:
    """Result at one length over all depths.

    Attributes:
        length: tokens of the whole prompt.
        accuracy: share of prompts in which the right word was the likeliest of `OPTIONS`.
        interval: its 95 % interval (Wilson's).
        prompts: how many.
        difference: accuracy less that of the model compared with, on the same prompts; None without one.
        difference_interval: 95 % bootstrap interval of the difference over prompts, paired.
    """

    length: int
    accuracy: float
    interval: Interval
    prompts: int
    difference: float | None = None
    difference_interval: Interval = None


@dataclass(frozen=True)
class Prompt:
    """One question about one text.

    Attributes:
        length: tokens of the whole prompt.
        depth: where the fact stands, as a fraction of the text before the question.
        ids: token ids [length].
        options: first tokens of the words to choose from [OPTIONS], the right one first.
    """

    length: int
    depth: float
    ids: Tensor
    options: Tensor


@dataclass(frozen=True)
class Answer:
    """What a model made of a prompt.

    Attributes:
        length: tokens of the prompt.
        depth: where the fact stands, as a fraction of the text before the question.
        found: whether the right word was the likeliest of `OPTIONS`.
        probability: of the right word among them.
    """

    length: int
    depth: float
    found: bool
    probability: float


def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    *,
    lengths: Iterable[int] | None = None,
    depths: Iterable[float] = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
    batch: int = 1,
    progress: Progress | None = None,
) -> list[RetrievalScore]:
    """Plant a fact in long texts, ask for it at their end, and score a model at every length and depth.

    Args:
        model: causal language model.
        tokenizer: the model's.
        filler: token ids [M] of any text, repeated if it is short.
        lengths: tokens per prompt; of `LENGTHS` those that the model serves unless told.
        depths: places of the fact, 0 (start) to 1 (right before the question).
        trials: prompts per length and depth, each with its own fact, words and piece of the filler.
        seed: same seed, same prompts.
        batch: prompts of one length per forward pass.
        progress: told after every forward pass.

    Returns:
        One score per length and depth.

    Raises:
        UsageError: a length is beyond the model or too short for fact and question, or the tokenizer splits words so
            that they start alike.

    Example:
        >>> text = tokenizer("The library closes at six. " * 400, return_tensors="pt").input_ids[0]  # doctest: +SKIP
        >>> for score in retrieval(result.model, tokenizer, text, lengths=[1024, 4096]):  # doctest: +SKIP
        ...     print(score.length, score.depth, score.accuracy)
    """
    lengths = default_lengths(model) if lengths is None else list(lengths)
    check_lengths(model, lengths)
    prompts = retrieval_prompts(tokenizer, filler, lengths=lengths, depths=depths, trials=trials, seed=seed)
    return scores(answers(model, prompts, batch=batch, progress=progress))


def retrieval_prompts(
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    *,
    lengths: Iterable[int],
    depths: Iterable[float] = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
) -> list[Prompt]:
    """The prompts of `retrieval`, for more than one model to answer.

    Args:
        tokenizer: of the models.
        filler: token ids [M] of any text, repeated if it is short.
        lengths: tokens per prompt.
        depths: places of the fact, 0 (start) to 1 (right before the question).
        trials: prompts per length and depth.
        seed: same seed, same prompts.

    Returns:
        Prompts by length, depth and trial.

    Raises:
        UsageError: a length is too short for fact and question, or the tokenizer splits words so that they start alike.

    Example:
        >>> prompts = retrieval_prompts(tokenizer, text, lengths=[4096])  # doctest: +SKIP
        >>> compared = scores_by_length(answers(result.model, prompts), answers(model, prompts))  # doctest: +SKIP
    """
    lengths, depths = list(lengths), list(depths)
    if trials < 1 or not lengths or not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise UsageError("retrieval needs at least one length, one depth between 0 and 1, and one trial")
    if len(set(lengths)) < len(lengths) or len(set(depths)) < len(depths):
        raise UsageError(f"retrieval at lengths {lengths} and depths {depths}: give each once")
    words = _distinct_words(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    cases = [(length, depth) for length in lengths for depth in depths for _ in range(trials)]
    return [
        Prompt(length, depth, *_prompt(tokenizer, filler, words, length, depth, generator)) for length, depth in cases
    ]


def check_lengths(model: PreTrainedModel, lengths: Iterable[int]) -> None:
    """Refuse lengths beyond a model, before prompts are made.

    Raises:
        UsageError: one has more tokens than the model has positions, or the model has no language-model head.
    """
    need_language_head(model, "retrieval", "give a causal language model")
    limit, longest = position_limit(model), max(lengths, default=0)
    if limit is not None and longest > limit:
        raise UsageError(f"retrieval at {longest} tokens: the model has {limit} positions; ask for at most that")


def check_prompts(model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
    """Refuse prompts that a model cannot answer.

    Raises:
        UsageError: a prompt is longer than the model's positions, or has tokens that it lacks.
    """
    check_lengths(model, (prompt.length for prompt in prompts))
    count = len(embedding_weight(model))
    if max(int(prompt.ids.max()) for prompt in prompts) >= count:
        raise UsageError(
            f"the retrieval prompts hold tokens that the model lacks: it has {count} embeddings; "
            f"give the tokenizer the model was trained with"
        )


@torch.inference_mode()
def answers(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, batch: int = 1, progress: Progress | None = None
) -> list[Answer]:
    """Let a model answer prompts.

    Args:
        model: causal language model.
        prompts: of `retrieval_prompts`.
        batch: prompts of one length per forward pass.
        progress: told after every forward pass.

    Returns:
        Answers in the order of the prompts.

    Raises:
        UsageError: a prompt is longer than the model's positions, or has tokens that it lacks; batch is less than 1.

    Example:
        >>> sum(answer.found for answer in answers(model, prompts)) / len(prompts)  # doctest: +SKIP
    """
    if batch < 1:
        raise UsageError(f"batch {batch}: at least 1 prompt goes through the model at once")
    check_prompts(model, prompts)
    device = embedding_weight(model).device
    alike = [list(group) for _, group in itertools.groupby(prompts, key=lambda prompt: prompt.length)]
    batches = [part[start : start + batch] for part in alike for start in range(0, len(part), batch)]
    found = []
    for part in track(batches, "retrieve", progress):
        ids = torch.stack([prompt.ids for prompt in part]).to(device)
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        options = torch.stack([prompt.options for prompt in part]).to(device)
        for prompt, share in zip(part, logits.gather(1, options).double().softmax(1).cpu(), strict=True):
            found.append(Answer(prompt.length, prompt.depth, int(share.argmax()) == 0, float(share[0])))
    return found


def scores(found: Sequence[Answer]) -> list[RetrievalScore]:
    """Sum up answers by length and depth."""
    cases: dict[tuple[int, float], list[Answer]] = {}
    for answer in found:
        cases.setdefault((answer.length, answer.depth), []).append(answer)
    return [
        RetrievalScore(
            *case, sum(a.found for a in part) / len(part), sum(a.probability for a in part) / len(part), len(part)
        )
        for case, part in cases.items()
    ]


def scores_by_length(found: Sequence[Answer], against: Sequence[Answer] | None = None) -> list[LengthScore]:
    """Sum up answers by length, beside those of another model on the same prompts if there are any.

    Args:
        found: of `answers`.
        against: of another model to the same prompts, in the same order.

    Returns:
        One score per length, ascending.

    Example:
        >>> scores_by_length(answers(result.model, prompts), answers(model, prompts))[0].difference  # doctest: +SKIP
    """
    rows = []
    for length in dict.fromkeys(answer.length for answer in found):
        hits = _hits(found, length)
        share = float(hits.mean())
        row = LengthScore(length, share, interval_of_share(share, len(hits)), len(hits))
        if against is not None:
            gain = hits - _hits(against, length)
            row = replace(row, difference=float(gain.mean()), difference_interval=interval_of_mean(gain))
        rows.append(row)
    return rows


def _hits(found: Sequence[Answer], length: int) -> Tensor:
    return torch.tensor([float(answer.found) for answer in found if answer.length == length], dtype=torch.float64)


def default_lengths(model: PreTrainedModel) -> list[int]:
    """Those of `LENGTHS` that a model serves where nothing else is said (`served_length`); at least one."""
    served = served_length(model)
    return [length for length in LENGTHS if length <= served] or [served]


def _distinct_words(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, int]]:
    """Words whose first tokens differ, with that token."""
    found: dict[int, str] = {}
    for word in _WORDS:
        found.setdefault(_encode(tokenizer, f" {word}")[0], word)
    if len(found) < OPTIONS:
        raise UsageError(f"retrieval needs {OPTIONS} words whose first tokens differ; this tokenizer has {len(found)}")
    return [(word, token) for token, word in found.items()]


def _prompt(
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    words: list[tuple[str, int]],
    length: int,
    depth: float,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Token ids [length] and the first tokens of the words to choose from [OPTIONS], the right one first."""
    chosen = [words[int(i)] for i in torch.randperm(len(words), generator=generator)[:OPTIONS]]
    place = _PLACES[int(torch.randint(len(_PLACES), (1,), generator=generator))]
    fact = torch.tensor(_encode(tokenizer, _FACT.format(place=place, word=chosen[0][0])))
    question = torch.tensor(_encode(tokenizer, _QUESTION.format(place=place)))
    room = length - len(fact) - len(question)
    if room < 1:
        raise UsageError(f"retrieval at {length} tokens: fact and question alone need {length - room + 1}")
    start = int(torch.randint(len(filler), (1,), generator=generator))
    text = filler[(start + torch.arange(room)) % len(filler)]
    cut = round(depth * room)
    return torch.cat([text[:cut], fact, text[cut:], question]), torch.tensor([token for _, token in chosen])


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids

"""Does a model find one fact in a long text? A fact is planted at some depth, and asked for at the end.

Scored by which of eight words the model thinks likeliest next, so that a small base model can do it: chance is 1/8.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.data import position_limit
from attnedit.compiler.errors import UsageError
from attnedit.compiler.progress import Progress, track
from attnedit.compiler.source_checks import embedding_weight

LENGTHS = (1024, 2048, 4096, 8192)
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


@torch.inference_mode()
def retrieval(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    filler: Tensor,
    *,
    lengths: Iterable[int] = LENGTHS,
    depths: Iterable[float] = DEPTHS,
    trials: int = TRIALS,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[RetrievalScore]:
    """Score a model at every length and depth.

    Args:
        model: causal language model.
        tokenizer: the model's.
        filler: token ids [M] of any text, repeated if it is short.
        lengths: tokens per prompt.
        depths: places of the fact, 0 (start) to 1 (right before the question).
        trials: prompts per length and depth, each with its own fact, words and piece of the filler.
        seed: same seed, same prompts.
        progress: told after every prompt.

    Raises:
        UsageError: a length is beyond the model or too short for fact and question, or the tokenizer splits words so
            that they start alike.
    """
    lengths, depths = list(lengths), list(depths)
    if trials < 1 or not lengths or not depths or any(not 0 <= depth <= 1 for depth in depths):
        raise UsageError("retrieval needs at least one length, one depth between 0 and 1, and one trial")
    limit = position_limit(model)
    if limit is not None and max(lengths) > limit:
        raise UsageError(f"retrieval at {max(lengths)} tokens: the model has {limit} positions; ask for at most that")
    words = _distinct_words(tokenizer)
    generator = torch.Generator().manual_seed(seed)
    cases = [(length, depth) for length in lengths for depth in depths for _ in range(trials)]
    hits: dict[tuple[int, float], list[tuple[bool, float]]] = {}
    device = embedding_weight(model).device
    for length, depth in track(cases, "retrieve", progress):
        ids, options = _prompt(tokenizer, filler, words, length, depth, generator)
        logits = model(ids[None].to(device), use_cache=False, logits_to_keep=1).logits[0, -1]
        share = logits[options.to(device)].double().softmax(0)  # the right word stands first
        hits.setdefault((length, depth), []).append((int(share.argmax()) == 0, float(share[0])))
    return [
        RetrievalScore(
            length, depth, sum(hit for hit, _ in found) / trials, sum(share for _, share in found) / trials, trials
        )
        for (length, depth), found in hits.items()
    ]


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

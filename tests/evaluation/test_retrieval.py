"""Retrieval: the prompts, and models whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_llama import make_tokenizer
from torch import Tensor, nn

from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation import retrieval as module
from attnedit.compiler.evaluation.retrieval import OPTIONS, default_lengths, retrieval

SIZE = 4096


class Copier(nn.Module):
    """Predicts what followed the last place in its window where the same two tokens stood; else nothing."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window
        self.embedding = nn.Embedding(SIZE, 1)
        self.config = SimpleNamespace(max_position_embeddings=600)
        self.config.get_text_config = lambda decoder=True: self.config

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
        assert (use_cache, logits_to_keep) == (False, 1)
        logits = torch.zeros(len(ids), 1, SIZE)
        for row, seen in zip(logits[:, 0], ids[:, -(self.window or ids.shape[1]) :].tolist(), strict=True):
            pairs = [i for i in range(len(seen) - 2) if seen[i : i + 2] == seen[-2:]]
            if pairs:
                row[seen[pairs[-1] + 2]] = 5.0
        return SimpleNamespace(logits=logits)


class Words:
    """One token per word."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [self.known.setdefault(word.strip(".:"), len(self.known) + 1) for word in text.split()]}


def run(model: Any, **options: Any) -> list[module.RetrievalScore]:
    filler = torch.arange(3000, 3700)
    settings: dict[str, Any] = {"lengths": [60, 300], "depths": [0.0, 0.5, 1.0], "trials": 8, **options}
    return retrieval(model, Words(), filler, **settings)  # type: ignore[arg-type]


def test_a_model_that_copies_finds_every_fact() -> None:
    for score in run(Copier(None)):
        assert score.accuracy == 1
        assert score.probability == pytest.approx(torch.e**5 / (torch.e**5 + OPTIONS - 1))
        assert score.trials == 8


def test_a_window_finds_what_is_in_it() -> None:
    scores = {(score.length, score.depth): score for score in run(Copier(50))}
    assert scores[60, 1.0].accuracy == scores[300, 1.0].accuracy == 1
    for depth in (0.0, 0.5):
        assert scores[300, depth].probability == pytest.approx(1 / OPTIONS)


def test_prompts_in_batches_of_one_length() -> None:
    shapes: list[tuple[int, ...]] = []

    class Spy(Copier):
        def forward(self, ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            shapes.append(tuple(ids.shape))
            return super().forward(ids, use_cache, logits_to_keep)

    assert run(Spy(50), batch=16) == run(Copier(50))
    assert shapes == [(16, 60), (8, 60), (16, 300), (8, 300)]


def test_lengths_go_to_the_context_unless_told() -> None:
    model: Any = Copier(None)
    assert default_lengths(model) == [600]
    model.config.max_position_embeddings = 5000
    assert default_lengths(model) == [1024, 2048, 4096]
    model.config.max_position_embeddings = 131_072
    assert default_lengths(model)[-1] == 8192


def test_prompts_have_the_length_and_the_fact_at_its_depth() -> None:
    seen: list[Tensor] = []

    class Spy(Copier):
        def forward(self, ids: Tensor, use_cache: bool, logits_to_keep: int) -> Any:
            seen.append(ids)
            return super().forward(ids, use_cache, logits_to_keep)

    run(Spy(None), lengths=[200], depths=[0.25], trials=3)
    assert [tuple(ids.shape) for ids in seen] == [(1, 200)] * 3
    for ids in seen:
        planted = (ids[0] < 3000).nonzero().flatten()
        room = int((ids[0] >= 3000).sum())
        assert int(planted[0]) == round(0.25 * room)
    assert not torch.equal(seen[0], seen[1])
    first = list(seen)
    seen.clear()
    run(Spy(None), lengths=[200], depths=[0.25], trials=3)
    assert all(torch.equal(one, other) for one, other in zip(first, seen, strict=True))


def test_refusals() -> None:
    for options, words in [
        ({"lengths": [601]}, "600 positions"),
        ({"lengths": [10]}, "need"),
        ({"depths": [1.5]}, "between 0 and 1"),
        ({"trials": 0}, "one trial"),
        ({"lengths": [60, 60]}, "give each once"),
        ({"batch": 0}, "at least 1"),
    ]:
        with pytest.raises(UsageError, match=words):
            run(Copier(None), **options)
    with pytest.raises(UsageError, match="words whose first tokens differ"):
        retrieval(Copier(None), make_tokenizer(), torch.arange(9), lengths=[60])  # type: ignore[arg-type]

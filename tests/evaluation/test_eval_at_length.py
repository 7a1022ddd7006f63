"""Evaluation at length: losses without all logits, perplexity by position, intervals, a result beside its source."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Captured, answer, refusal, save
from families import FAMILIES, shared
from tiny_llama import make_llama, make_tokenizer
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

import attnedit
from attnedit.cli import main
from attnedit.compiler.data.token_windows import text_tokens
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation import logits as logits_module
from attnedit.compiler.evaluation.evaluate import text_windows, window_losses
from attnedit.compiler.evaluation.intervals import interval_of_mean, interval_of_share
from attnedit.compiler.evaluation.logits import token_losses
from attnedit.compiler.evaluation.positions import losses_by_position, perplexity_by_position
from attnedit.compiler.evaluation.retrieval import Answer, scores_by_length


def plain_losses(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, :-1].float()
    return functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_in_parts_are_those_of_all_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared(family)
    size = model.get_input_embeddings().weight.shape[0]
    monkeypatch.setattr(logits_module, "VALUES", 7 * size)
    ids = torch.randint(3, size, (2, 24), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(token_losses(model, ids), plain_losses(model, ids), atol=2e-4, rtol=2e-4)


def test_few_logits_are_held_at_once(llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits_module, "VALUES", 40 * 260)
    sizes: list[int] = []
    llama.lm_head.register_forward_hook(lambda _, __, output: sizes.append(output[..., 0].numel()))
    token_losses(llama, torch.zeros(2, 101, dtype=torch.int64))
    assert (max(sizes), sum(size for size in sizes if size > 1)) == (40, 200)


@pytest.mark.parametrize("named", ["itself", "another"])
def test_a_model_whose_body_cannot_be_told(
    named: str, llama: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = llama if named == "itself" else make_llama().model
    monkeypatch.setattr(llama, "get_decoder", lambda: found)
    monkeypatch.setattr(logits_module, "VALUES", 10 * 260)
    ids = torch.randint(3, 260, (2, 24))
    torch.testing.assert_close(token_losses(llama, ids), plain_losses(llama, ids))


def test_ranges_double_to_the_end_of_the_window() -> None:
    losses = torch.randn(6, 2999, generator=torch.Generator().manual_seed(0)).abs()
    rows = losses_by_position(losses)
    assert [(row.start, row.end, row.tokens) for row in rows] == [
        (0, 1024, 6 * 1023),
        (1024, 2048, 6 * 1024),
        (2048, 3000, 6 * 952),
    ]
    assert rows[0].perplexity == pytest.approx(float(losses[:, :1023].mean().exp()), rel=1e-6)
    assert rows[2].perplexity == pytest.approx(float(losses[:, 2047:].mean().exp()), rel=1e-6)
    assert all(row.interval is not None and row.interval[0] < row.perplexity < row.interval[1] for row in rows)
    assert [row.end for row in losses_by_position(losses[:, :1023])] == [1024]
    assert losses_by_position(losses[:1])[0].interval is None


def test_ratios_are_paired() -> None:
    """Windows differ far more than the two models do on any of them."""
    source = torch.linspace(1, 5, 12)[:, None].expand(12, 2047)
    (near, far) = losses_by_position(source + torch.arange(2047).ge(1023) * 0.1, source)
    assert (near.ratio, near.ratio_interval) == (1, (1, 1))
    assert far.ratio == pytest.approx(1.10517, rel=1e-5)
    assert far.ratio_interval == pytest.approx((1.10517, 1.10517), rel=1e-5)
    assert far.interval is not None
    assert far.interval[1] / far.interval[0] > 3


def test_by_position_of_two_models(llama: LlamaForCausalLM, text_file: Path) -> None:
    tokens = text_tokens(text_file, make_tokenizer())
    other = make_llama(num_hidden_layers=1)
    (row,) = perplexity_by_position(llama, tokens, against=other, seq_len=200, windows=3, batch=2)
    rows = text_windows(llama, tokens, seq_len=200, windows=3)
    rise = window_losses(llama, rows).mean() - window_losses(other, rows).mean()
    assert row.ratio == pytest.approx(float(rise.exp()), rel=1e-5)
    assert (row.end, row.tokens) == (200, 3 * 199)


def test_intervals_of_shares_know_doubt_where_all_trials_end_alike() -> None:
    low, high = interval_of_share(0.5, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)  # as in any table of the score interval
    assert interval_of_share(1.0, 20) == pytest.approx((0.8389, 1), abs=1e-4)
    assert interval_of_share(0.0, 20) == pytest.approx((0, 0.1611), abs=1e-4)


def test_an_interval_holds_the_mean_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(200):
        interval = interval_of_mean(torch.randn(40, generator=generator) + 3)
        assert interval is not None
        held += interval[0] < 3 < interval[1]
    assert 180 <= held <= 197
    assert interval_of_mean(torch.tensor([1.0])) is None
    assert interval_of_mean(torch.ones(50_000)) == (1, 1)


def test_differences_are_of_the_same_prompts() -> None:
    found = [Answer(1024, 0.1, i % 2 == 0, 0.5) for i in range(60)] + [Answer(2048, 0.1, False, 0.1)] * 30
    source = [Answer(1024, 0.1, i % 2 == 0, 0.5) for i in range(60)] + [Answer(2048, 0.1, True, 0.9)] * 30
    near, far = scores_by_length(found, source)
    assert (near.accuracy, near.difference, near.difference_interval) == (0.5, 0, (0, 0))
    assert near.interval is not None
    assert near.interval[0] < 0.45 < 0.55 < near.interval[1]
    assert (far.accuracy, far.difference, far.prompts) == (0, -1, 30)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> tuple[Path, Path]:
    """A source of 2,100 positions and a result of it."""
    directory = tmp_path_factory.mktemp("pair")
    model = make_llama(max_position_embeddings=2100)
    save(model, directory / "source")
    data = {"calibration": str(text_file), "calibration_tokens": 4096, "calibration_length": 2100}
    options: dict[str, Any] = {**data, "alternations": 0}
    attnedit.compile(model, kv_budget=0.25, tokenizer=make_tokenizer(), **options).save(directory / "result")
    return directory / "source", directory / "result"


def test_eval_by_position(pair: tuple[Path, Path], text_file: Path, capsys: Captured) -> None:
    source, result = pair
    command = ["eval", result, "--text", text_file, "--by-position", "--windows", 3, "--against", source]
    figures = answer(capsys, *command)
    assert (figures["seq_len"], figures["windows"], figures["against"]) == (2100, 3, str(source))
    assert [row["end"] for row in figures["by_position"]] == [1024, 2048, 2100]
    for mine, other in zip(figures["by_position"], figures["against_by_position"], strict=True):
        assert mine["ratio"] == pytest.approx(mine["perplexity"] / other["perplexity"])
        assert mine["ratio_interval"][0] <= mine["ratio"] <= mine["ratio_interval"][1]
        assert other["ratio"] is None
    assert answer(capsys, *command, "--batch", 2)["by_position"] == [
        {key: pytest.approx(value, rel=1e-4) for key, value in row.items()} for row in figures["by_position"]
    ]
    assert main([*map(str, command)]) == 0
    shown = capsys.readouterr().out
    assert "1,024-2,048" in shown
    assert f"{figures['by_position'][1]['ratio']:.4f}" in shown


def test_eval_against_the_source(pair: tuple[Path, Path], text_file: Path, capsys: Captured) -> None:
    source, result = pair
    command = ["eval", result, "--text", text_file, "--seq-len", 64, "--windows", 4]
    figures = answer(capsys, *command, "--against", source)
    alone = answer(capsys, *command)
    other = answer(capsys, *command[:1], source, *command[2:])
    assert {key: figures[key] for key in alone} == alone
    assert figures["ratio"] == pytest.approx(alone["perplexity"] / other["perplexity"])
    assert figures["against_perplexity"] == other["perplexity"]
    assert main([*map(str, command), "--against", str(source)]) == 0
    assert f"{figures['ratio']:.4f}" in capsys.readouterr().out


def test_what_does_not_go_together(
    pair: tuple[Path, Path], saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    source, _ = pair
    text = ["--text", text_file]
    assert "one of them at a time" in refusal(capsys, "eval", source, *text, "--by-position", "--retrieval")
    assert "eval needs --text" in refusal(capsys, "eval", source, "--by-position")
    assert "2100 positions" in refusal(capsys, "eval", source, *text, "--by-position", "--seq-len", 2101)
    assert "2100 positions" in refusal(capsys, "eval", source, "--retrieval", "--lengths", "1024,2101")
    beyond = ("--retrieval", "--lengths", "300", "--against", saved_llama)
    assert "256 positions" in refusal(capsys, "eval", source, *beyond)
    assert "256 positions" in refusal(capsys, "eval", source, *text, "--seq-len", 300, "--against", saved_llama)
    assert "are of --retrieval" in refusal(capsys, "eval", source, *text, "--lengths", "64")
    assert "are of --retrieval" in refusal(capsys, "eval", source, *text, "--trials", 3)
    assert "are of perplexity" in refusal(capsys, "eval", source, "--retrieval", "--seq-len", 64)
    assert "does not exist" in refusal(capsys, "eval", source, *text, "--against", "./gone")
    assert "give numbers" in refusal(capsys, "eval", "./gone", "--retrieval", "--lengths", "1k")
    other = save(make_llama(vocab_size=300), tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "have different tokenizers" in refusal(capsys, "eval", source, *text, "--against", other)


def test_by_position_is_in_the_library(llama: LlamaForCausalLM) -> None:
    with pytest.raises(UsageError, match="256 positions"):
        perplexity_by_position(llama, torch.zeros(4000, dtype=torch.int64), seq_len=300, windows=2)

"""Calibration windows of the closed form: which lengths, how many, from what, and what a result says of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import make_tokenizer
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import attnedit
from attnedit.cli import main
from attnedit.compiler.data.calibration_windows import (
    LONG_WINDOWS,
    SHORT_WINDOWS,
    CalibrationWindows,
    calibration_windows,
)
from attnedit.compiler.data.lengths import beyond
from attnedit.compiler.errors import UsageError

CONTEXT = 4096
SENTENCE = "The cache decides what a long context costs. "
IDS = torch.arange(200_000).remainder(250)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=260, num_hidden_layers=2, max_position_embeddings=CONTEXT, **sizes)
    ).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def shapes(data: CalibrationWindows) -> list[tuple[int, int]]:
    return [(len(part), part.shape[1]) for part in data.parts]


def test_long_windows_come_with_short_ones(model: LlamaForCausalLM) -> None:
    data = calibration_windows([IDS], None, model)
    assert shapes(data) == [(LONG_WINDOWS, CONTEXT), (SHORT_WINDOWS, 1024)]
    assert data.notes == []
    assert (data.length, data.tokens) == (CONTEXT, LONG_WINDOWS * CONTEXT + SHORT_WINDOWS * 1024)
    assert str(data) == "16 x 4,096, 32 x 1,024"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"length": 2048}, [(LONG_WINDOWS, 2048), (SHORT_WINDOWS, 1024)]),
        ({"length": 1024}, [(64, 1024)]),
        ({"length": 1500}, [(43, 1500)]),
        ({"length": 64}, [(1024, 64)]),
        ({"tokens": 16_384}, [(3, CONTEXT), (4, 1024)]),
        ({"tokens": 8192, "length": CONTEXT}, [(1, CONTEXT), (4, 1024)]),
        ({"tokens": CONTEXT, "length": CONTEXT}, [(1, CONTEXT)]),
        ({"least": 2048}, [(LONG_WINDOWS, CONTEXT), (SHORT_WINDOWS, 2048)]),
        ({"least": 3000}, [(16, CONTEXT)]),
    ],
)
def test_tokens_and_length_decide(
    model: LlamaForCausalLM, options: dict[str, int], expected: list[tuple[int, int]]
) -> None:
    data = calibration_windows([IDS], None, model, **options)
    assert shapes(data) == expected
    assert data.notes == []


@pytest.mark.parametrize(
    ("source", "options", "expected", "note"),
    [
        ([IDS], {"tokens": 2048}, [(1, 1638)], "from 4,096 to 1,638 tokens: 2,048 calibration tokens leave room"),
        ([IDS], {"tokens": 300}, [(1, 300)], "from 4,096 to 1,024 tokens: 300 calibration tokens leave room"),
        ([IDS[:1500]], {"least": 1200}, [(1, 1500), (1, 1200)], "from 4,096 to 1,500 tokens: the data has 1,500"),
        ([IDS[:1024]], {}, [(1, 1024)], "from 4,096 to 1,024 tokens: the data has 1,024"),
        ([IDS[:1500]], {}, [(1, 1500), (1, 1024)], "from 4,096 to 1,500 tokens: the data has 1,500"),
    ],
)
def test_shorter_windows_are_said(
    model: LlamaForCausalLM,
    source: list[Tensor],
    options: dict[str, int],
    expected: list[tuple[int, int]],
    note: str,
) -> None:
    data = calibration_windows(source, None, model, **options)
    assert shapes(data) == expected
    assert [note in line for line in data.notes] == [True]


def test_ready_windows_are_taken_as_they_are(model: LlamaForCausalLM) -> None:
    long, short = IDS[:8000].view(4, 2000), IDS[:900].view(3, 300)
    (part,) = calibration_windows(long, None, model).parts
    assert torch.equal(part, long)
    assert torch.equal(calibration_windows(long, None, model, length=2000).parts[0], long)
    several = calibration_windows([short, long], None, model)
    assert [torch.equal(*pair) for pair in zip(several.parts, (long, short), strict=True)] == [True, True]
    assert shapes(calibration_windows([long, short], None, model, tokens=4450)) == [(2, 2000), (1, 300)]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([IDS], {"length": CONTEXT + 1}, "calibration_length 4097 is not between 2 and the model's context of 4096"),
        ([IDS], {"length": 1}, "calibration_length 1 is not between"),
        (
            [IDS[:1500]],
            {"length": 2048},
            "2048 is beyond the data, whose longest window has 1500 tokens",
        ),
        ([IDS], {"length": 2048, "tokens": 1000}, "calibration_length 2048 is beyond the 1000 calibration tokens"),
        (IDS[:4000].view(4, 1000), {"length": 500}, "calibration_length is 500, and the windows given have 1000"),
        (torch.zeros(2, CONTEXT + 1, dtype=torch.int64), {}, "windows have 4097 tokens, and the model's context is"),
        (torch.zeros(2, 64), {}, "float32"),
        (torch.full((2, 64), 999), {}, "token id 999"),
        (torch.zeros(0, 64, dtype=torch.int64), {}, "empty"),
        (None, {"length": CONTEXT, "tokens": 100}, "is beyond the 100 calibration tokens"),
        ([IDS], {"tokens": 1}, "1 calibration tokens are too few"),
        ([IDS[:1500]], {"least": 3000}, "too short: 1500 tokens, and one window needs 3000"),
        ([IDS[:700]], {}, "too short: 700 tokens, and one window needs 1024"),
    ],
)
def test_refused(model: LlamaForCausalLM, source: Any, options: dict[str, int], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        calibration_windows(source, None, model, **options)


def test_a_short_part_of_a_mixture_shortens_nothing_else(
    tmp_path: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    (tmp_path / "long.txt").write_text(SENTENCE * 3000)
    (tmp_path / "short.txt").write_text("Only this much. " * 20)
    mixture = {str(tmp_path / "long.txt"): 1.0, str(tmp_path / "short.txt"): 1.0}
    data = calibration_windows(mixture, tokenizer, model)
    assert shapes(data) == [(8, CONTEXT), (16, 1024), (1, 320)]
    assert "Only this much." in tokenizer.decode(data.parts[2][0])
    with pytest.raises(UsageError, match="too short: 320 tokens, and one window needs 512"):
        calibration_windows({str(tmp_path / "short.txt"): 1.0}, tokenizer, model, length=512)


def test_long_windows_hold_long_documents(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    shorts = [f"Note {index}. " * 20 for index in range(400)]
    longs = [f"Chapter {index} goes on. " * 1000 for index in range(3)]
    data = calibration_windows([*shorts[:200], *longs, *shorts[200:]], tokenizer, model, tokens=5 * CONTEXT)
    long, short = data.parts
    texts = [tokenizer.decode(row) for row in long]
    assert all("Chapter" in text and "Note" not in text for text in texts)
    assert all(sum(f"Chapter {index}" in text for index in range(3)) == 1 for text in texts)
    assert any("Note" in tokenizer.decode(row) for row in short)


def test_a_stream_is_read_once_for_both_lengths(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    read = 0

    def stream() -> Iterator[str]:
        nonlocal read
        while True:
            read += 1
            yield SENTENCE * 10

    data = calibration_windows(stream(), tokenizer, model, tokens=4 * CONTEXT)
    assert shapes(data) == [(3, CONTEXT), (4, 1024)]
    assert read < 400


def test_own_samples_are_seen_joined_too(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    data = calibration_windows(None, tokenizer, model, tokens=CONTEXT)
    joined, plain = data.parts
    assert joined.shape == (1, CONTEXT)
    assert torch.equal(joined.flatten(), plain.flatten())


@pytest.fixture(scope="module")
def result(model: LlamaForCausalLM) -> attnedit.CompileResult:
    return attnedit.compile(model, calibration=[IDS], calibration_length=2048, calibration_tokens=8192, alternations=1)


def test_a_result_knows_its_length(result: attnedit.CompileResult, tmp_path: Path) -> None:
    assert result.report.calibration_length == 2048
    assert result.report.calibration_windows == "3 x 2,048, 2 x 1,024"
    assert result.report.recipe["calibration_length"] == 2048
    assert "in windows: 3 x 2,048, 2 x 1,024" in str(result.report)
    result.save(tmp_path / "out")
    assert "3 x 2,048, 2 x 1,024" in (tmp_path / "out" / "README.md").read_text()
    config = attnedit.load(tmp_path / "out").model.config
    assert beyond(config, 2048) is None
    assert beyond(config, 2049) == (
        "2,049 tokens are beyond what this result was made for: it was calibrated on windows of 2,048 tokens, and "
        "farther on it may lose much"
    )


def test_training_counts_too(model: LlamaForCausalLM) -> None:
    trained = attnedit.compile(
        model,
        calibration=[IDS],
        calibration_length=512,
        calibration_tokens=2048,
        alternations=1,
        distill_steps=1,
        seq_len=1536,
        batch_size=1,
    )
    assert trained.report.training_length == 1536
    assert beyond(trained.model.config, 1536) is None
    assert "trained on windows of 1,536" in str(beyond(trained.model.config, 1537))


def test_nothing_is_said_where_nothing_was_fitted(model: LlamaForCausalLM) -> None:
    exact = attnedit.compile(model, kv_budget=1.0)
    assert exact.report.calibration_length is None
    assert beyond(exact.model.config, CONTEXT) is None
    assert beyond(model.config, 10 * CONTEXT) is None


@pytest.mark.parametrize("arguments", [{"seq_len": CONTEXT + 1}, {"seq_len": 10 * CONTEXT, "fit_steps": 1}])
def test_training_windows_beyond_the_context(model: LlamaForCausalLM, arguments: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"seq_len {arguments['seq_len']} is beyond the model's context of 4096"):
        attnedit.compile(model, calibration=[IDS], **{"distill_steps": 1, **arguments})  # type: ignore[arg-type]


def test_the_command_line_says_what_is_beyond(
    result: attnedit.CompileResult,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    result.tokenizer = tokenizer
    result.save(tmp_path / "out")
    text = tmp_path / "text.txt"
    text.write_text(SENTENCE * 200)
    evaluate: Sequence[str] = ["eval", str(tmp_path / "out"), "--text", str(text), "--windows", "1"]
    assert main([*evaluate, "--seq-len", "2049"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("attnedit: 2,049 tokens are beyond what this result was made for")
    assert errors.count("\n") == 1
    assert main([*evaluate, "--seq-len", "2048"]) == 0
    assert capsys.readouterr().err == ""

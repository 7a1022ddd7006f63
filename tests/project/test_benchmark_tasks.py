"""benchmarks/ruler.py and tasks.py: questions in files, answers, scores, and tables beside a source."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from commands import save
from project import BENCHMARKS, run
from tiny_llama import make_llama, make_tokenizer
from torch.nn import functional

import attnedit
from attnedit.compiler.data.token_windows import demo_text
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import Source, load_config_only, load_source, load_tokenizer

RULER = [
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
]


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def prompt(text: str, outputs: list[str], **changes: Any) -> dict[str, Any]:
    whole = {"task": "niah", "length": 200, "input": text, "outputs": outputs, "new_tokens": 8, "any": False}
    return {**whole, "tokens": len(text), **changes}


def test_averages_count_cells_alike_and_ratios_are_paired(module: Any) -> None:
    items: ModuleType = module("items")
    hard = {"a": torch.tensor([100.0, 0.0] * 20), "b": torch.tensor([0.0] * 30 + [100.0] * 10)}
    mean, interval = items.average(hard)
    assert mean == 37.5
    assert interval[0] < 32 < 43 < interval[1]
    half = {cell: scores / 2 for cell, scores in hard.items()}
    assert items.ratio(half, hard) == (0.5, (0.5, 0.5))
    assert items.average({"a": torch.tensor([50.0])}) == (50, None)
    assert math.isnan(items.ratio(hard, {cell: 0 * scores for cell, scores in hard.items()})[0])


def test_items_and_results_are_kept(module: Any, tmp_path: Path) -> None:
    items: ModuleType = module("items")
    asked = [prompt("one", ["1"]), prompt("two", ["2"])]
    for name in ("plain.jsonl", "small.jsonl.gz"):
        items.write_items(tmp_path / name, asked)
        assert items.read_items(tmp_path / name, ["input", "outputs"]) == asked
    with pytest.raises(UsageError, match="line 1: there is no 'depth'"):
        items.read_items(tmp_path / "plain.jsonl", ["depth"])
    (tmp_path / "broken.jsonl").write_text("{")
    with pytest.raises(UsageError, match=r"cannot read .*broken"):
        items.read_items(tmp_path / "broken.jsonl", [])
    first, second = tmp_path / "one.json", tmp_path / "two.json"
    items.Results(first, asked).add("source", "niah/200", [{"score": 1.0}, {"score": 0.0}])
    assert items.Results(first, asked).answered("source", "niah/200")
    assert not items.Results(first, asked).answered("source", "niah/400")
    with pytest.raises(UsageError, match="results for other items"):
        items.Results(first, asked[:1])
    items.Results(second, asked).add("result", "niah/200", [{"score": 0.0}, {"score": 0.0}])
    assert list(items.merged([first, second])) == ["source", "result"]
    items.Results(tmp_path / "three.json", asked[:1]).add("result", "niah/200", [{"score": 0.0}])
    with pytest.raises(UsageError, match="cannot be compared"):
        items.merged([first, tmp_path / "three.json"])
    with pytest.raises(UsageError, match="cannot read results"):
        items.merged([tmp_path / "plain.jsonl"])


@pytest.fixture
def asked() -> list[dict[str, Any]]:
    texts = ["The number is", "What are the numbers that are written above? They are", "Yes, and"]
    return [prompt(text, ["12", "34"]) for text in texts]


def test_prompts_of_a_batch_are_answered_as_alone(module: Any, saved_llama: Path, asked: list[Any]) -> None:
    ruler: ModuleType = module("ruler")
    source = load_source(str(saved_llama))
    ids = ruler.encode(source, asked)
    alone = ruler.answer(source, asked, ids, 1)
    assert ruler.answer(source, asked, ids, 3) == alone
    with torch.no_grad():
        row = torch.tensor([ids[0]])
        for _ in range(8):
            row = torch.cat([row, source.model(row).logits[:, -1:].argmax(-1)], 1)
    assert source.tokenizer is not None
    assert alone[0]["prediction"] == source.tokenizer.decode(row[0, len(ids[0]) :], skip_special_tokens=True)
    assert all(answer["score"] == 0 for answer in alone)


TARGETS: dict[str, dict[str, Any]] = {
    "mla": {"kv_budget": 0.5, "alternations": 0},
    "gateswa": {"window": 16, "full_layers": 1},
}


@pytest.mark.parametrize("target", TARGETS)
def test_results_read_padded_prompts_at_once_or_in_parts(
    target: str, module: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    ruler: ModuleType = module("ruler")
    tokenizer, text = make_tokenizer(), demo_text()[0]
    data: dict[str, Any] = {"calibration": [text[:4000]], "tokenizer": tokenizer, "calibration_tokens": 1024}
    model = attnedit.compile(make_llama(initializer_range=0.2), target, **data, **TARGETS[target]).model
    source = Source(model, tokenizer, target)
    asked = [prompt(text[:size], ["12"]) for size in (60, 200, 131)]
    ids = ruler.encode(source, asked)
    alone = ruler.answer(source, asked, ids, 1)
    assert ruler.answer(source, asked, ids, 3) == alone
    monkeypatch.setattr(ruler, "SHORTEST", 10)
    monkeypatch.setattr(ruler, "READ_AT_ONCE", 16)
    assert ruler.answer(source, asked, ids, 3) == alone


def test_writing_ends_when_all_is_found(module: Any, saved_llama: Path, asked: list[Any]) -> None:
    ruler: ModuleType = module("ruler")
    source = load_source(str(saved_llama))
    ids = ruler.encode(source, asked)
    whole = ruler.answer(source, asked, ids, 3)
    letters = [next(letter for letter in answer["prediction"] if letter.isalnum()) for answer in whole]
    known = [{**item, "outputs": [letter]} for item, letter in zip(asked, letters, strict=True)]
    for found, before, letter in zip(ruler.answer(source, known, ids, 3), whole, letters, strict=True):
        assert found["score"] == 100
        end = before["prediction"].index(letter) + 1
        assert found["prediction"] == before["prediction"][:end]


@pytest.mark.parametrize("enough", [192, 60])
def test_texts_are_made_shorter_until_they_fit(module: Any, monkeypatch: pytest.MonkeyPatch, enough: int) -> None:
    """Some generators take a token off at a time, and one has to ask often."""
    ruler: ModuleType = module("ruler")

    def made(_: str, __: Any, room: int, *___: Any) -> list[dict[str, Any]]:
        return [{"input": "x" * (150 if room < enough else 151), "outputs": ["x"]}]

    monkeypatch.setattr(ruler, "generated", made)
    monkeypatch.setattr(ruler, "_tokens", lambda _, text: list(text))
    asked = ("fwe", {"task": "fwe", "tokens_to_generate": 50}, 200, 1, 0, None)
    if enough > 100:
        assert [item["tokens"] for item in ruler.fitting_prompts(*asked)] == [150]
    else:  # half of the length is no text of that length
        with pytest.raises(UsageError, match="fwe at 200 tokens: the texts do not fit"):
            ruler.fitting_prompts(*asked)


def test_prompts_for_another_model_are_refused(module: Any, saved_llama: Path, asked: list[Any]) -> None:
    ruler: ModuleType = module("ruler")
    source = load_source(str(saved_llama))
    with pytest.raises(UsageError, match="another tokenizer"):
        ruler.encode(source, [{**asked[0], "tokens": 3}])
    with pytest.raises(UsageError, match="has 256 positions"):
        ruler.encode(source, [{**asked[0], "length": 512}])
    assert ruler.chosen_lengths(None, 20_000) == [4096, 8192, 16_384]
    for lengths, limit, words in [
        ("1k", 8192, "give numbers"),
        ("1024", 8192, "RULER begins"),
        ("8192", 4096, "4096 positions"),
        (None, 2048, "2048 positions"),
        (None, None, "say which"),
        ("4096,4096", 8192, "each once"),
    ]:
        with pytest.raises(UsageError, match=words):
            ruler.chosen_lengths(lengths, limit)


def test_tasks_of_ruler(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ruler: ModuleType = module("ruler")
    monkeypatch.setattr(ruler, "package_tasks", lambda: {name: {} for name in RULER})
    assert list(ruler.chosen_tasks(None)) == RULER
    assert list(ruler.chosen_tasks("vt,niah_single_2")) == ["niah_single_2", "vt"]
    with pytest.raises(UsageError, match=r"^--tasks 'niah': RULER has niah_single_1, "):
        ruler.chosen_tasks("vt,niah")
    with pytest.raises(UsageError, match="name each once"):
        ruler.chosen_tasks("vt,vt")


def options_of(**given: Any) -> argparse.Namespace:
    names = ("tasks", "shots", "items", "write_items", "read_items", "results", "table", "lengths", "seed")
    nothing = dict.fromkeys((*names, "prompts", "write_prompts"))
    return argparse.Namespace(**{**nothing, "models": [], "batch": 1, "device": "auto", "dtype": "float32", **given})


def printed(module: Any, capsys: pytest.CaptureFixture[str], program: str, **given: Any) -> str:
    capsys.readouterr()
    module(program).run(options_of(**given))
    return capsys.readouterr().out


def test_ruler_from_a_file(
    module: Any, saved_llama: Path, asked: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, results = tmp_path / "prompts.jsonl.gz", tmp_path / "results.json"
    module("items").write_items(file, [*asked, *(dict(item, task="qa", any=True, outputs=[""]) for item in asked)])
    given = {"models": [str(saved_llama)], "prompts": file, "batch": 2}
    table = printed(module, capsys, "ruler", **given, results=results)
    assert "| niah | 0.0 (0.0-0.0) |" in table
    assert "| qa | 100.0 (100.0-100.0) |" in table
    assert f"| {saved_llama} | 50.0 (50.0-50.0) | 50.0 (50.0-50.0) | 1.000 (1.000-1.000) |" in table
    answers = json.loads(results.read_text())["models"][str(saved_llama)]
    assert [len(cell) for cell in answers.values()] == [3, 3]
    assert printed(module, capsys, "ruler", table=[results]) == table
    assert printed(module, capsys, "ruler", **{**given, "batch": 1}) == table
    results.write_text(results.read_text().replace('"score": 0.0', '"score": 50.0'))
    assert "| niah | 50.0" in printed(module, capsys, "ruler", **given, results=results)  # nothing is asked again


def test_options_that_do_not_go_together(module: Any) -> None:
    file = Path("x")
    for program, given, words in [
        ("ruler", {}, "give a MODEL"),
        ("ruler", {"models": ["m"], "batch": 0}, "at least 1"),
        ("ruler", {"models": ["m"], "prompts": file, "lengths": "4096"}, "leave these options out"),
        ("ruler", {"models": ["m"], "table": [file]}, "give no MODEL"),
        ("ruler", {"models": ["m"], "prompts": Path("gone.jsonl")}, "cannot read gone.jsonl"),
        ("tasks", {}, "give a MODEL"),
        ("tasks", {"models": ["m"], "read_items": file, "items": 3}, "leave these options out"),
        ("tasks", {"models": ["m"], "table": [file]}, "give no MODEL"),
    ]:
        with pytest.raises(UsageError, match=words):
            module(program).run(options_of(**given))


def test_likelihoods_of_answers(module: Any, saved_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same in any batch, and as from whole logits; a context that is too long loses its start."""
    tasks: ModuleType = module("tasks")
    source = load_source(str(saved_llama))
    requests = [["Question", " answer"], ["A longer question", " no"], ["x" * 400, " far"], ["Q", " Z"]]
    losses, _ = tasks.likelihoods(source, requests, 4096)
    assert "1 contexts lose their start, to fit 256 positions" in capsys.readouterr().err
    assert tasks.likelihoods(source, requests, 1)[0] == pytest.approx(losses, rel=1e-5)
    for (context, answer), loss in zip(requests, losses, strict=True):
        ids = torch.tensor([make_tokenizer()(context + answer)["input_ids"][-256:]])
        with torch.no_grad():
            logits = source.model(ids).logits[0, -len(answer) - 1 : -1]
        assert loss == pytest.approx(float(functional.cross_entropy(logits, ids[0, -len(answer) :], reduction="sum")))
        best = source.tokenizer.decode(logits.argmax(-1)) if source.tokenizer else ""
        (_,), (greedy,) = tasks.likelihoods(source, [[context, best]], 4096)
        assert greedy == (best == answer or len(best) == 1)
    with pytest.raises(UsageError, match="too few for an answer of 300 tokens"):
        tasks.likelihoods(source, [["Q", "x" * 300]], 4096)


def test_scores_of_questions(module: Any) -> None:
    score = module("tasks").score
    answers = {"requests": [["Q", " a"], ["Q", " much longer"]], "label": 1}
    assert score({**answers, "metric": "likelihood"}, [3.0, 4.0], [False, False]) == 0
    assert score({**answers, "metric": "likelihood per character"}, [3.0, 4.0], [False, False]) == 100
    one = {"requests": [["Q", " né"]], "label": 0}
    assert score({**one, "metric": "greedy"}, [3.0], [True]) == 100
    assert score({**one, "metric": "bits"}, [4 * math.log(2)], [True]) == pytest.approx(1)


def test_tasks_from_a_file(module: Any, saved_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model beside itself differs in nothing; scores of GSM8K are bits, and no part of the average."""
    file, results = tmp_path / "items.jsonl", tmp_path / "results.json"
    question = {"requests": [["Q:", " yes"], ["Q:", " no"]], "metric": "likelihood"}
    sums = {"task": "GSM8K bits per byte", "metric": "bits", "requests": [["1 + 1 =", " 2"]], "label": 0}
    easy = [{**question, "task": "ARC-Easy", "label": label} for label in (0, 1)]
    word = {"task": "LAMBADA", "metric": "greedy", "requests": [["The", " end"]], "label": 0}
    module("items").write_items(file, [*easy, word, word, sums, sums])
    copy = save(make_llama(), tmp_path / "copy")
    given = {"models": [str(saved_llama), str(copy)], "read_items": file, "batch_tokens": 64}
    table = printed(module, capsys, "tasks", **given, results=results)
    assert "| ARC-Easy (2) | LAMBADA (2) | GSM8K bits per byte (2) | average |" in table
    assert f"| {saved_llama} | 50.0 (0.0-100.0) | 0.0 (0.0-0.0) |" in table
    assert "+0.0 (+0.0 to +0.0) | +0.0 (+0.0 to +0.0) | +0.0000 (+0.0000 to +0.0000) |" in table
    bits = json.loads(results.read_text())["models"][str(copy)]["GSM8K bits per byte"][0]["score"]
    assert 7 < bits < 9  # a byte is a token here, of 260
    assert printed(module, capsys, "tasks", table=[results]) == table


@pytest.mark.long
def test_ruler_of_every_generator(module: Any, tmp_path: Path) -> None:
    """Prompts by the package's generators, its scores, and a tiny model that reads them with SmolLM2's tokenizer."""
    ruler: ModuleType = module("ruler")
    tokenizer = load_tokenizer(load_config_only("smollm2"))
    assert tokenizer is not None
    model = make_llama(vocab_size=len(tokenizer), max_position_embeddings=4096, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = tmp_path / "prompts.jsonl.gz"
    # The package makes a list of millions of words for every task with a needle: two of the eight.
    tasks = ["niah_multikey_3", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"]
    made = ["--lengths", "4096", "--items", "2", "--tasks", ",".join(reversed(tasks)), "--write-prompts", file]
    run("ruler.py", tmp_path / "model", *made)
    prompts = ruler.read_items(file, ruler.FIELDS)
    assert [item["task"] for item in prompts] == [task for task in tasks for _ in range(2)]
    assert all(2000 < item["tokens"] + item["new_tokens"] <= 4096 for item in prompts)
    for item in prompts:
        assert ruler.score(" and ".join(item["outputs"]), item) == 100
        if not item["task"].startswith("cwe"):  # its words may stand in the example before
            assert item["any"] or all(output in item["input"] for output in item["outputs"])
    scores = importlib.import_module("long_context_eval.eval.synthetic.constants").TASKS
    for item in prompts[::2]:
        kind = ruler.package_tasks()[item["task"]]["task"]
        for text in (item["outputs"][0].upper(), "nothing", " ".join(item["outputs"])):
            (wanted,) = scores[kind]["metric_fn_per_sample"]([text], [item["outputs"]])
            assert ruler.score(text, item) == pytest.approx(wanted)
    table = run("ruler.py", tmp_path / "model", "--prompts", file, "--batch", "2")
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows[-7:] == tasks


@pytest.mark.long
def test_all_tasks_on_a_few_items(tmp_path: Path) -> None:
    """A trained model is far from chance where a few items can show it."""
    results = tmp_path / "results.json"
    table = run("tasks.py", "smollm2", "--items", "6", "--results", results)
    heading = table.splitlines()[0]
    for task in ("ARC-Easy", "ARC-Challenge", "HellaSwag", "PIQA", "WinoGrande", "LAMBADA", "GSM8K bits per byte"):
        assert f"{task} (6)" in heading
    answers = json.loads(results.read_text())["models"]["smollm2"]
    bits = [answer["score"] for answer in answers["GSM8K bits per byte"]]
    assert all(0.1 < value < 1.5 for value in bits)
    assert sum(answer["losses"][0] for answer in answers["LAMBADA"]) / 6 < 8  # of all words alike: 10.8

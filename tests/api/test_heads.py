"""Decoders under other heads than a language model's: bare, or classifying sequences (reward models) and tokens."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import refusal
from compiled import compile_tiny, deviation, tokens
from families import build
from tiny_llama import make_tokenizer
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
)

import attnedit
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.evaluate import perplexity
from attnedit.compiler.model_io.models import load_config_only, load_source
from attnedit.targets.runtime.eager import attnedit_classes

HEADS: dict[str, Any] = {
    "bare": AutoModel,
    "sequences": AutoModelForSequenceClassification,
    "tokens": AutoModelForTokenClassification,
}
FAMILIES = ["llama", "gpt2", "qwen3_moe"]
DATA = {"calibration": tokens(4, 32), "alternations": 0}
IDS = tokens(2, 17)
EXACT = 1e-4


@functools.cache
def language(family: str) -> PreTrainedModel:
    return build(family, tie_word_embeddings=False)


@functools.cache
def headed(family: str, head: str) -> PreTrainedModel:
    """A decoder with the weights of the language model, and a random head that says something."""
    source = language(family)
    model: PreTrainedModel = HEADS[head].from_config(source.config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
        model.base_model.load_state_dict(source.base_model.state_dict())
    return model


@torch.no_grad()
def says(model: PreTrainedModel, ids: Tensor = IDS) -> Tensor:
    output = model(ids)
    found: Tensor = output.logits if "logits" in output else output.last_hidden_state
    return found


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_result_loads_under_every_head_that_its_source_has(family: str, head: str, tmp_path: Path) -> None:
    result = compile_tiny(language(family), 0.5)
    result.save(tmp_path / "out")
    loaded, info = HEADS[head].from_pretrained(tmp_path / "out", output_loading_info=True)
    new = [name for name in info["missing_keys"] if not name.startswith(("score", "classifier"))]
    assert not new
    assert not info["mismatched_keys"]
    assert isinstance(loaded, type(headed(family, head)))
    with torch.no_grad():
        found = loaded.eval().base_model(IDS).last_hidden_state
        assert deviation(found, result.model.base_model(IDS).last_hidden_state) <= 1e-6
    # Saved again, it is a model of its own, and under other heads still the same decoder.
    loaded.save_pretrained(tmp_path / "again")
    again = HEADS[head].from_pretrained(tmp_path / "again").eval()
    assert torch.equal(says(again), says(loaded))
    causal = AutoModelForCausalLM.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert deviation(causal.base_model(IDS).last_hidden_state, found) <= 1e-6


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_whole_budget_says_what_the_source_says(family: str, head: str, tmp_path: Path) -> None:
    source = headed(family, head)
    result = compile_tiny(source, 1.0, calibration=None)
    assert deviation(says(result.model), says(source)) <= EXACT
    assert "hidden states of the result against the source" in [check.what for check in result.report.verification]
    result.save(tmp_path / "out")
    for loaded in (attnedit.load(tmp_path / "out").model, HEADS[head].from_pretrained(tmp_path / "out").eval()):
        assert type(loaded) is type(result.model)
        assert torch.equal(says(loaded), says(result.model))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "phi"])
def test_every_target_and_choice_by_loss(family: str, head: str) -> None:
    source = headed(family, head)
    half = compile_tiny(source, 0.5, allocation="loss", alternations=0)
    assert half.report.kv_budget_achieved <= 0.5
    assert any(row.loss_increase for row in half.report.layers if row.kind == "mla")
    windowed = attnedit.compile(source, "gateswa", window=4, full_layers=1, **DATA)
    assert deviation(says(windowed.model), says(source)) > 0
    for result in (half, windowed):
        assert "decoding from the cache against prefill" in [check.what for check in result.report.verification]
        assert result.report.loss_curve is None


def test_the_layer_that_costs_most_is_measured_on_hidden_states() -> None:
    """The second layer's output projection is nearly nothing, so that its attention matters least."""
    source = HEADS["sequences"].from_config(language("llama").config).eval()
    source.load_state_dict(headed("llama", "sequences").state_dict())
    with torch.no_grad():
        source.model.layers[1].self_attn.o_proj.weight.mul_(1e-3)
    report = attnedit.compile(source, "gateswa", window=4, full_layers=1, **DATA).report
    assert report.full_layers == [0]
    first, second = (row.loss_increase for row in report.layers)
    assert first > 100 * second > 0


def test_fitting_needs_no_logits(tmp_path: Path) -> None:
    steps = {"fit_steps": 3, "batch_size": 2, "seq_len": 32, "calibration": tokens(8, 32)}
    report = compile_tiny(headed("llama", "sequences"), 0.5, run_directory=tmp_path / "run", **steps).report
    assert report.stages[0].best <= report.stages[0].before
    assert not report.perplexity
    assert report.loss_curve is None


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("target", [{"target": "mla"}, {"target": "gateswa", "window": 4, "full_layers": [1]}])
def test_layer_by_layer_gives_the_same(head: str, target: dict[str, Any], tmp_path: Path) -> None:
    source = headed("qwen3_moe", head)
    source.save_pretrained(tmp_path / "source")
    attnedit.compile_checkpoint(tmp_path / "source", tmp_path / "out", **target, **DATA)
    expected = attnedit.compile(source, **target, **DATA).model
    loaded = attnedit.load(tmp_path / "out").model
    assert type(loaded) is type(expected)
    assert deviation(says(loaded), says(expected)) <= EXACT


def test_a_checkpoint_loads_by_the_head_that_it_declares(tmp_path: Path) -> None:
    for head in HEADS:
        source = headed("llama", head)
        source.save_pretrained(tmp_path / head)
        assert type(load_source(str(tmp_path / head)).model) is type(source)
        assert type(load_config_only(str(tmp_path / head))) is type(source)
    # A bare decoder whose head would be its embeddings lacks nothing of a language model.
    tied = build("llama", tie_word_embeddings=True)
    tied.model.save_pretrained(tmp_path / "tied")
    assert type(load_source(str(tmp_path / "tied")).model) is type(tied)


def test_the_graph_gives_hidden_states() -> None:
    model = compile_tiny(headed("llama", "tokens"), 0.5)
    with torch.no_grad():
        found = model.graph(IDS, torch.ones_like(IDS))
        assert deviation(found, model.model.base_model(IDS).last_hidden_state) <= EXACT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "sampling text from the model itself needs logits of next tokens, and LlamaForSequenceClassification"),
        ({"kv_budget": 1.0, "target": "gateswa"}, "give calibration text"),
        ({**DATA, "distill_steps": 2}, "distillation needs logits"),
        ({**DATA, "fit_steps": 2, "self_generated": 0.5}, "give calibration text and self_generated 0"),
        ({**DATA, "profile": "deepseek_v3"}, "a form for engines (profile, engine, kernel_dims) needs logits"),
    ],
)
def test_what_needs_logits_is_refused(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnedit._live.capture", lambda *_: pytest.fail("work was done before"))
    with pytest.raises(UsageError) as caught:
        attnedit.compile(headed("llama", "sequences"), **options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("heads") / "out"
    result = compile_tiny(headed("llama", "sequences"), 0.5)
    result.tokenizer = make_tokenizer()
    result.save(directory)
    return directory


@pytest.mark.parametrize("runtime", ["onnx", "hf", "npu", "gguf"])
def test_exports_are_refused(runtime: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match=f"export to {runtime} needs logits of next tokens"):
        attnedit.load(saved).export(runtime, tmp_path / "out")
    message = refusal(capsys, "export", str(saved), "--to", runtime, "-o", str(tmp_path / "out"))
    assert f"export to {runtime} needs logits" in message
    assert "AttneditLlamaForSequenceClassification" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["generate", "eval", "sweep"])
def test_commands_that_need_logits_are_refused(
    command: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("A text. " * 40)
    text = ["--text", str(tmp_path / "notes.txt")]
    more = {
        "generate": ["--prompt", "A"],
        "eval": text,
        "sweep": [*text, "--kv-budgets", "0.5", "-o", str(tmp_path / "sweep")],
    }
    assert "needs logits of next tokens" in refusal(capsys, command, str(saved), *more[command])


def test_perplexity_is_refused() -> None:
    with pytest.raises(UsageError, match="perplexity needs logits"):
        perplexity(headed("llama", "bare"), tokens(1, 64).flatten(), seq_len=8, windows=2)


def test_other_heads_are_refused() -> None:
    answering = AutoModelForQuestionAnswering.from_config(language("llama").config)
    with pytest.raises(UsageError, match="LlamaForQuestionAnswering, whose head attnedit does not know"):
        attnedit.compile(answering, **DATA)


def test_classes_are_made_once_for_each_head() -> None:
    config = language("llama").config
    _, causal = attnedit_classes(config)
    again, head = attnedit_classes(config, type(headed("llama", "sequences")))
    assert AutoModelForCausalLM._model_mapping[again] is causal
    assert AutoModelForSequenceClassification._model_mapping[again] is head

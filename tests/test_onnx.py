"""ONNX export: the exported model against eager, its form, the runner, the command line, bad input."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnx
import pytest
import torch
from commands import Captured, answer, refusal
from commands import save as save_with_tokenizer
from compiled import MODULE, _remembered, compile_tiny, source, tokens
from conftest import make_llama
from transformers import PreTrainedModel

import attnedit
from attnedit.targets.runtime.onnx import Manifest, OnnxModel, export
from attnedit.targets.runtime.onnx.check import TOLERANCES, check_model
from attnedit.targets.runtime.onnx.runner import choose

PROMPT = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
MASK = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def windowed(family: str, target: str = "gateswa", **options: Any) -> PreTrainedModel:
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(source(family), target, calibration=tokens(4, 32), window=4, **options).model


def written(model: PreTrainedModel, directory: Path, **options: Any) -> Manifest:
    return export(SimpleNamespace(model=model, tokenizer=None), directory, **options)


def greedy(model: PreTrainedModel, count: int) -> np.ndarray[Any, Any]:
    generate: Any = model.generate
    lengths = {"min_new_tokens": count, "max_new_tokens": count}
    out = generate(PROMPT, attention_mask=MASK, do_sample=False, pad_token_id=0, **lengths)
    return np.asarray(out[:, PROMPT.shape[1] :])


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_latent_cache_generates_what_eager_does(cache: Any, tmp_path: Path) -> None:
    model = compile_tiny(source("llama"), 0.5).model
    manifest = written(model, tmp_path / "out", cache=cache)
    assert max(check["deviation"] for check in manifest.checks) < 1e-4
    graph = onnx.load(tmp_path / "out" / "model.onnx")
    scatters = sum(node.op_type == "TensorScatter" for node in graph.graph.node)
    assert scatters == (4 if cache == "static" else 0)
    exported = OnnxModel(tmp_path / "out")
    exported.manifest.eos_token_id.clear()  # as min_new_tokens does for eager
    allowed = greedy(model, 8)
    found = exported.generate(PROMPT.numpy(), MASK.numpy(), max_new_tokens=8)
    ended = (allowed == 2) | (found == 2)
    assert np.array_equal(found, allowed) or ended.any()
    state = exported.decoding(2, 20)
    state.feed(PROMPT.numpy(), MASK.numpy())
    for layer in manifest.layers:
        key, value = (state.cache[name].shape() for name in layer.names("past_key_values"))
        assert key == [2, 1, 20 if cache == "static" else 6, layer.key_size]
        assert value[3] == layer.value_size
        assert layer.key_size + layer.value_size == 16  # half of 2 x 2 x 8


@pytest.mark.parametrize(
    "form", [{"sinks": "logit,keep:1", "gate": "element"}, {"sinks": "logit,value", "gate": "head"}]
)
def test_window_cache_is_bounded_and_exact(form: dict[str, Any], tmp_path: Path) -> None:
    manifest = written(windowed("llama", full_layers=0, **form), tmp_path / "out")
    kept = 1 if "keep" in form["sinks"] else 0
    assert [layer.tokens for layer in manifest.layers] == [3 + kept] * 2
    assert max(check["deviation"] for check in manifest.checks) < 1e-4
    lengths = [sum(check["lengths"][:-1]) for check in manifest.checks]
    assert {4, 5} <= set(lengths)


def test_a_model_that_differs_is_noticed(tmp_path: Path) -> None:
    model = compile_tiny(source("llama"), 0.5).model
    written(model, tmp_path / "out")
    other = compile_tiny(source("llama"), 0.25).model
    with pytest.raises(attnedit.VerificationError, match="deviate"):
        check_model(other, OnnxModel(tmp_path / "out"), TOLERANCES["float32"])


def test_a_failed_check_leaves_nothing(tmp_path: Path) -> None:
    with (
        mock.patch.dict(TOLERANCES, {"float32": 1e-12}),
        pytest.raises(attnedit.VerificationError),
    ):
        written(source("llama"), tmp_path / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_integer_weights_are_smaller(tmp_path: Path) -> None:
    manifest = written(compile_tiny(source("llama"), 0.5).model, tmp_path / "out", quantize="int8")
    operators = [node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node]
    assert "MatMulNBits" in operators
    assert 1e-5 < max(check["deviation"] for check in manifest.checks) < TOLERANCES["int8"]


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "phi", "gpt_oss"])
@pytest.mark.parametrize("kind", ["source", "mla", "gateswa"])
def test_families(family: str, kind: str, tmp_path: Path) -> None:
    models = {"source": source, "mla": lambda name: compile_tiny(source(name), 0.5).model, "gateswa": windowed}
    manifest = written(models[kind](family), tmp_path / "out")
    assert max(check["deviation"] for check in manifest.checks) < 1e-3


def test_sampling_follows_the_probabilities() -> None:
    logits = np.log(np.array([[0.1, 0.6, 0.3]])).repeat(4000, axis=0)
    generator = np.random.default_rng(0)
    shares = np.bincount(choose(logits, generator, 1.0), minlength=3) / 4000
    assert np.allclose(shares, [0.1, 0.6, 0.3], atol=0.03)
    assert set(choose(logits, generator, 1.0, top_k=2)) == {1, 2}
    assert set(choose(logits, generator, 1.0, top_p=0.5)) == {1}


def test_command_line(tmp_path: Path, capsys: Captured) -> None:
    directory = save_with_tokenizer(make_llama(), tmp_path / "model")
    found = answer(capsys, "export", directory, "--to", "onnx", "-o", tmp_path / "out")
    assert found["checks"]
    text = answer(capsys, "generate", tmp_path / "out", "--prompt", "Hello", "--max-new-tokens", 5)
    eager = answer(capsys, "generate", directory, "--prompt", "Hello", "--max-new-tokens", 5)
    assert text["text"] == eager["text"]
    assert "not empty" in refusal(capsys, "export", directory, "--to", "onnx", "-o", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--dtype", "bfloat16"], "float32 or float16"),
        (["--opset", "17"], "from 18"),
        (["--cache", "static", "--opset", "23"], "TensorScatter"),
        (["--quantize", "int2"], "int8 or int4"),
        (["--flavor", "atc"], "--flavor"),
    ],
)
def test_bad_input(options: list[str], words: str, saved_llama: Path, tmp_path: Path, capsys: Captured) -> None:
    assert words in refusal(capsys, "export", saved_llama, "--to", "onnx", "-o", tmp_path / "out", *options)
    assert not list(tmp_path.iterdir())


def test_unknown_runtime(saved_llama: Path, tmp_path: Path, capsys: Captured) -> None:
    assert "no runtime 'abacus'" in refusal(capsys, "export", saved_llama, "--to", "abacus", "-o", tmp_path / "out")


def test_linear_attention_is_refused(tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match="layer 0"):
        written(source("qwen3_next"), tmp_path / "out")

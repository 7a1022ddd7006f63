"""ONNX export: the exported model against eager, its form, the runner, the command line, bad input."""

from __future__ import annotations

import json
import subprocess
import sys
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
from tiny_llama import make_llama
from transformers import PreTrainedModel

import attnedit
from attnedit.targets.runtime.check import check_model
from attnedit.targets.runtime.onnx import Manifest, OnnxModel, export
from attnedit.targets.runtime.onnx.cache import LayerCache
from attnedit.targets.runtime.onnx.export import ROUNDED_TOLERANCES, TOLERANCES
from attnedit.targets.runtime.onnx.genai import even_split
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
    cached = {sum(check["lengths"][:count]) for check in manifest.checks for count in range(len(check["lengths"]))}
    assert {0, 3, 4, 5} <= cached  # nothing, and around the window


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
    assert 1e-5 < max(check["deviation"] for check in manifest.checks) < ROUNDED_TOLERANCES["int8"]


GENAI = """
import json, sys
import onnxruntime_genai as og
model = og.Model(sys.argv[1])
parameters = og.GeneratorParams(model)
parameters.set_search_options(max_length=int(sys.argv[2]), min_length=int(sys.argv[2]))
generator = og.Generator(model, parameters)
generator.append_tokens(json.loads(sys.argv[3]))
while not generator.is_done():
    generator.generate_next_token()
print(json.dumps([int(token) for token in generator.get_sequence(0)]))
"""


@pytest.mark.parametrize("target", ["source", "mla"])
def test_onnxruntime_genai_generates_what_eager_does(target: str, tmp_path: Path) -> None:
    model = source("llama") if target == "source" else compile_tiny(source("llama"), 0.5).model
    manifest = written(model, tmp_path / "out", flavor="genai")
    assert {(layer.heads, layer.key_size, layer.value_size) for layer in manifest.layers} == {
        (2, 8, 8) if target == "source" else (1, 8, 8)
    }
    command = [sys.executable, "-c", GENAI, str(tmp_path / "out"), "16", json.dumps(PROMPT[1].tolist())]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    generate: Any = model.generate
    expected = generate(PROMPT[1:], min_new_tokens=10, max_new_tokens=10, do_sample=False, pad_token_id=0)
    assert found == expected[0].tolist()


def test_genai_fills_up_shorter_layers() -> None:
    layers = even_split([LayerCache(0, 1, 7, 4), LayerCache(1, 1, 5, 4)])
    assert [(layer.key_size, layer.value_size) for layer in layers] == [(6, 6), (6, 6)]


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("gateswa", {"full_layers": 0}, "layer 0 has a window cache"),
        ("gateswa+mla", {"full_layers": 1}, "window cache"),
    ],
)
def test_genai_refuses_what_it_cannot_serve(target: str, options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match=words):
        written(windowed("llama", target, **options), tmp_path / "out", flavor="genai")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["source", "mla", "gateswa", "gateswa+mla"])
def test_atc_reads_standard_operators_of_fixed_sizes(kind: str, tmp_path: Path) -> None:
    if kind == "source":
        model = source("llama")
    elif kind == "mla":
        model = compile_tiny(source("llama"), 0.5).model
    else:
        options = {"full_layers": 0, "sinks": "logit,keep:1"} if kind == "gateswa" else {"full_layers": 1}
        model = windowed("llama", kind, **options)
    manifest = written(model, tmp_path / "out", flavor="atc", seq_len=4, capacity=24)
    assert max(check["deviation"] for check in manifest.checks) < 1e-4
    for file, length in (("prefill.onnx", 4), ("decode.onnx", 1)):
        proto = onnx.load(tmp_path / "out" / file)
        onnx.checker.check_model(proto, full_check=True)
        assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]
        assert {node.domain for node in proto.graph.node} == {""}
        assert not proto.functions
        assert "Attention" not in {node.op_type for node in proto.graph.node}
        values = (*proto.graph.input, *proto.graph.output, *proto.graph.value_info)
        assert all(dim.HasField("dim_value") for value in values for dim in value.type.tensor_type.shape.dim)
        assert [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim] == [1, length]
    exported = OnnxModel(tmp_path / "out")
    exported.manifest.eos_token_id.clear()
    generate: Any = model.generate
    prompt = PROMPT[1:]
    expected = generate(prompt, max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert exported.generate(prompt.numpy(), max_new_tokens=6).tolist() == expected[:, 6:].tolist()
    with pytest.raises(attnedit.UsageError, match="for 1 rows"):
        exported.decoding(2)
    with pytest.raises(attnedit.AttneditError, match="takes 4 or 1 tokens"):
        exported.decoding().feed(np.ones((1, 3), dtype=np.int64))


def test_layers_of_both_kinds(tmp_path: Path) -> None:
    manifest = written(windowed("llama", "gateswa+mla", full_layers=1), tmp_path / "out")
    assert max(check["deviation"] for check in manifest.checks) < 1e-4
    assert sorted(layer.tokens or 0 for layer in manifest.layers) == [0, 7]  # three of the window, four sinks


@pytest.mark.long
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt2", "phi", "gpt_oss"])
@pytest.mark.parametrize("kind", ["source", "mla", "gateswa"])
def test_families(family: str, kind: str, tmp_path: Path) -> None:
    models = {"source": source, "mla": lambda name: compile_tiny(source(name), 0.5).model, "gateswa": windowed}
    manifest = written(models[kind](family), tmp_path / "out")
    assert max(check["deviation"] for check in manifest.checks) < 1e-3


def test_parts_in_bfloat16_are_computed_in_float32_and_rounded(tmp_path: Path) -> None:
    """Falcon's biases of positions, which no CPU kernel of ONNX Runtime multiplies."""
    manifest = written(compile_tiny(source("falcon_alibi"), 0.5).model, tmp_path / "out")
    assert max(check["deviation"] for check in manifest.checks) < 1e-4
    graph = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False).graph
    rounded = {
        node.output[0]
        for node in graph.node
        for given in node.attribute
        if node.op_type == "Cast" and given.i == onnx.TensorProto.BFLOAT16
    }
    users = {node.op_type for node in graph.node if rounded & set(node.input)}
    assert rounded
    assert users == {"Cast"}


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
        (["--flavor", "tflite"], "--flavor 'tflite' is not known"),
        (["--flavor", "genai", "--cache", "static"], "leave --cache static out"),
        (["--flavor", "atc", "--opset", "18"], "leave --quantize and --opset out"),
        (["--flavor", "atc", "--seq-len", "64", "--capacity", "64"], "more than seq-len"),
        (["--capacity", "64"], "for --flavor atc"),
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

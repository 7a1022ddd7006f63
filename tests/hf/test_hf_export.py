"""Checkpoints that load without attnedit: windows as other classes, refusals, the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Captured, answer, refusal
from commands import save as save_with_tokenizer
from compiled import compile_tiny, deviation, half, logits, source
from families import build
from hf_exports import IDS, alone, gated, greedy, needs_lfm3, windowed, written
from safetensors.torch import load_file
from tiny_llama import make_llama
from transformers import GemmaConfig, GemmaForCausalLM, PreTrainedModel

import attnedit
from attnedit.targets.runtime.hf.native import read_native


@pytest.mark.parametrize(
    ("family", "options", "profile", "architecture"),
    [
        ("qwen3", {}, "laguna", "LagunaForCausalLM"),
        ("qwen3", {"gate": "head"}, "laguna", "LagunaForCausalLM"),
        pytest.param("qwen3", {"gate": "element"}, "lfm3", "Lfm3ForCausalLM", marks=needs_lfm3),
        ("qwen3", {"gate": "head"}, "native", "Qwen3ForCausalLM"),
        ("qwen2", {}, "laguna", "LagunaForCausalLM"),
        ("qwen2", {}, "native", "SmolLM3ForCausalLM"),
        ("llama", {"gate": "head"}, "laguna", "LagunaForCausalLM"),
        pytest.param("llama", {}, "lfm3", "Lfm3ForCausalLM", marks=needs_lfm3),
        ("llama", {}, "native", "MinistralForCausalLM"),
        ("gpt_oss", {"sinks": "logit", "full_layers": 0, "window": 4}, "native", "GptOssForCausalLM"),
        ("gemma2", {"full_layers": 0, "window": 4}, "native", "Gemma2ForCausalLM"),
    ],
)
def test_windows_as_other_classes(
    family: str, options: dict[str, Any], profile: str, architecture: str, tmp_path: Path
) -> None:
    model = windowed(source(family), **options)
    manifest = written(model, tmp_path / "out", profile)
    assert manifest.architecture == architecture
    assert max(check["deviation"] for check in manifest.checks) < 1e-5
    # Through the window's edge, in prefill and in decoding.
    assert {sum(check["lengths"]) for check in manifest.checks} == {
        model.config.attnedit["sites"]["model.layers.1.self_attn"]["sliding_window"] + by for by in (4, 10)
    }


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


@pytest.mark.parametrize("engine", [None, "sglang", "vllm"])
def test_a_laguna_has_a_head_of_its_own_where_no_embeddings_stand_in(engine: str | None, tmp_path: Path) -> None:
    """SGLang's class ties no head. vLLM's does: a tied checkpoint, as all were once, is loaded as before."""
    model = windowed(build("qwen3", tie_word_embeddings=True))
    written(model, tmp_path / "out", "laguna", engine=engine)
    config, weights = config_of(tmp_path / "out"), load_file(tmp_path / "out" / "model.safetensors")
    assert config["tie_word_embeddings"] is (engine == "vllm")
    assert ("lm_head.weight" in weights) is (engine != "vllm")
    if engine != "vllm":
        assert torch.equal(weights["lm_head.weight"], model.get_input_embeddings().weight)
    assert deviation(logits(read_native(tmp_path / "out"), IDS), logits(model, IDS)) < 1e-5


def test_a_plain_class_keeps_its_head_tied(tmp_path: Path) -> None:
    written(windowed(build("llama", tie_word_embeddings=True)), tmp_path / "out", "native", engine="vllm")
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


@needs_lfm3
@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2"])
def test_trained_gates_as_lfm3(family: str, tmp_path: Path) -> None:
    model = gated(windowed(source(family), gate="head"))
    assert deviation(logits(model, IDS), logits(windowed(source(family)), IDS)) > 1e-2
    manifest = written(model, tmp_path / "out", "lfm3")
    assert max(check["deviation"] for check in manifest.checks) < 1e-5


@pytest.mark.parametrize(
    ("make", "profile", "reason"),
    [
        (lambda: half("qwen3").model, "deepseek_v3", "queries normalised"),
        (lambda: half("qwen2").model, "youtu", "a bias"),
        (lambda: half("mistral").model, "deepseek_v3", "sliding window"),
        (lambda: half("gpt_oss").model, "deepseek_v3", "no latent attention"),
        (lambda: half("phi3").model, "deepseek_v3", "gate_up_proj"),
        (lambda: compile_tiny(build("granite", logits_scaling=2.0), 0.5).model, "youtu", "logits_scaling"),
        (lambda: half("llama").model, "laguna", "latent attention"),
        (
            lambda: windowed(source("llama")),
            "deepseek_v3",
            r"\(GateSWA\), which profile deepseek_v3",
        ),
        (lambda: gated(windowed(source("qwen3"), gate="head")), "laguna", "sigmoid"),
        pytest.param(lambda: gated(windowed(source("qwen3"), gate="element")), "lfm3", "per element", marks=needs_lfm3),
        (lambda: gated(windowed(source("qwen3"), gate="head")), "native", "trained gate"),
        (lambda: windowed(source("qwen3"), sinks="keep:4"), "laguna", "kept sink tokens"),
        (lambda: windowed(source("qwen3"), sinks="logit"), "native", "sink logits"),
        pytest.param(lambda: windowed(source("olmo2")), "lfm3", "projection norm", marks=needs_lfm3),
        (lambda: windowed(source("smollm3")), "laguna", "no rotary embedding"),
    ],
)
def test_what_a_class_lacks_is_refused_by_name(make: Any, profile: str, reason: str, tmp_path: Path) -> None:
    refused(make(), profile, reason, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "profile", "reason"),
    [
        (lambda: compile_tiny(build("gpt_oss", layer_types=["full_attention"] * 2), 0.5).model, "youtu", "sink logits"),
        (lambda: compile_tiny(build("gemma2", layer_types=["full_attention"] * 2), 0.5).model, "youtu", "softcap"),
        (lambda: windowed(source("glm4")), "laguna", "neighbours"),
    ],
)
def test_what_rarer_classes_lack_is_refused_by_name(make: Any, profile: str, reason: str, tmp_path: Path) -> None:
    refused(make(), profile, reason, tmp_path)


def refused(model: PreTrainedModel, profile: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match=reason) as caught:
        written(model, tmp_path / "out", profile)
    assert not list(tmp_path.iterdir())
    assert "\n" not in str(caught.value)


def test_a_class_that_computes_otherwise_is_noticed(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 1, "max_position_embeddings": 128}
    torch.manual_seed(0)
    # Its norms add 1 to their weights, which no name or shape tells.
    gemma = GemmaForCausalLM(GemmaConfig(**sizes, initializer_range=0.3)).eval()
    with pytest.raises(attnedit.VerificationError, match="deviate"):
        written(compile_tiny(gemma, 0.5).model, tmp_path / "out", "deepseek_v3")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("make", "profile"),
    [
        (lambda: half("llama").model, "deepseek_v3"),
        (lambda: windowed(source("qwen3"), gate="head"), "laguna"),
        (lambda: half("qwen3").model, "remote"),
        (
            lambda: windowed(source("gpt_oss"), gate="head", sinks="logit,value,keep:2", full_layers=0, window=4),
            "remote",
        ),
    ],
)
def test_a_machine_without_attnedit_loads_it(make: Any, profile: str, tmp_path: Path) -> None:
    model = make()
    written(model, tmp_path / "out", profile)
    found, told = alone(tmp_path / "out", tmp_path, profile)
    assert deviation(found, logits(model, IDS)) < 1e-5
    assert told["text"] == greedy(model)


def test_command_line(tmp_path: Path, capsys: Captured) -> None:
    save_with_tokenizer(make_llama(), tmp_path / "source")
    data = tmp_path / "notes.txt"
    data.write_text("One and two are three. " * 400)
    arguments = ["--kv-budget", "0.5", "--calibration", str(data), "--calibration-tokens", "2048"]
    answer(capsys, "compile", str(tmp_path / "source"), *arguments, "-o", str(tmp_path / "mla"))
    saved, out = str(tmp_path / "mla"), str(tmp_path / "out")
    told = answer(capsys, "export", saved, "--to", "hf", "--profile", "deepseek_v3", "-o", out)
    assert told["profile"] == "deepseek_v3"
    assert all(check["deviation"] < 1e-3 for check in told["checks"])
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert "2,048 tokens" in (tmp_path / "out" / "README.md").read_text()
    other = str(tmp_path / "other")
    for arguments, message in (
        ([saved, "--to", "hf"], "--profile"),
        ([saved, "--to", "hf", "--profile", "bloom"], "'bloom' is not known"),
        ([saved, "--to", "hf", "--profile", "laguna"], "latent attention"),
        ([saved, "--to", "hf", "--profile", "remote", "--kernel-dims"], "--kernel-dims"),
        ([saved, "--to", "hf", "--profile", "remote", "--opset", "18"], "no option --opset"),
        ([saved, "--to", "onnx", "--profile", "remote"], "no option --profile"),
        ([str(tmp_path / "source"), "--to", "hf", "--profile", "remote"], "not rewritten"),
    ):
        assert message in refusal(capsys, "export", *arguments, "-o", other)
        assert not (tmp_path / "other").exists()


def test_a_class_that_transformers_lacks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = half("llama")
    monkeypatch.setattr(sys.modules["attnedit.targets.runtime.hf.profiles"], "CONFIG_MAPPING", {})
    with pytest.raises(attnedit.UsageError, match=r"youtu: transformers .* has no such class"):
        result.export("hf", tmp_path / "out", profile="youtu")
    with pytest.raises(attnedit.UsageError, match="has no such class"):
        attnedit.compile(source("llama"), profile="deepseek_v3", calibration=IDS)

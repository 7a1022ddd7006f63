"""Latent attention as a checkpoint of DeepSeek's and Youtu's classes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, deviation, exact, half, logits, source
from families import build
from hf_exports import IDS, needs_lfm3, windowed, written
from safetensors import safe_open
from transformers import AutoConfig

import attnedit
from attnedit.targets.runtime.hf.native import read_native

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("profile", "family", "budget", "options"),
    [
        ("deepseek_v3", "llama", 0.5, {}),
        ("deepseek_v3", "llama", 1.0, {}),
        ("deepseek_v3", "llama", 0.5, {"rope_parameters": LLAMA3}),
        ("deepseek_v3", "smollm3", 0.5, {}),
        ("youtu", "llama", 0.5, {}),
        ("youtu", "llama", 0.5, {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
        ("youtu", "llama", 0.5, {"rope_parameters": YARN}),
        ("youtu", "mistral", 0.5, {"sliding_window": None}),
        ("youtu", "granite", 0.5, {}),
    ],
)
def test_latent_attention_as_deepseek(
    profile: str, family: str, budget: float, options: dict[str, Any], tmp_path: Path
) -> None:
    model = compile_tiny(build(family, **options), budget).model
    manifest = written(model, tmp_path / "out", profile)
    assert max(check["deviation"] for check in manifest.checks) < 1e-5
    assert deviation(logits(read_native(tmp_path / "out"), IDS), logits(model, IDS)) < 1e-5
    config: Any = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.rms_norm_eps == 1e-6  # which engines take for the latent's norm too
    assert config.num_key_value_heads == config.num_attention_heads


def test_biases_that_are_zero_do_not_matter(tmp_path: Path) -> None:
    model = build("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    written(compile_tiny(model, 0.5).model, tmp_path / "out", "deepseek_v3")


def test_layers_of_different_sizes_are_padded(tmp_path: Path) -> None:
    model = compile_tiny(build("llama", num_hidden_layers=3), 0.55).model
    shapes = {(site["kv_lora_rank"], tuple(site["rope_columns"])) for site in model.config.attnedit["sites"].values()}
    assert len(shapes) > 1
    written(model, tmp_path / "out", "youtu")


def deepseek_tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a dense DeepSeek-V3 checkpoint without query compression, from its config.json alone.

    As engines read them: q_proj, kv_a_proj_with_mqa, kv_b_proj and o_proj without bias, gate_proj and up_proj apart.
    """
    hidden, heads, rank = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    layer = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (heads * (nope + rope), hidden),
        "self_attn.kv_a_proj_with_mqa": (rank + rope, hidden),
        "self_attn.kv_a_layernorm": (rank,),
        "self_attn.kv_b_proj": (heads * (nope + value), rank),
        "self_attn.o_proj": (hidden, heads * value),
        "mlp.gate_proj": (config["intermediate_size"], hidden),
        "mlp.up_proj": (config["intermediate_size"], hidden),
        "mlp.down_proj": (hidden, config["intermediate_size"]),
    }
    tensors: dict[str, tuple[int, ...]] = {
        f"model.layers.{i}.{name}.weight": shape
        for i in range(config["num_hidden_layers"])
        for name, shape in layer.items()
    }
    tensors |= {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    return tensors if config["tie_word_embeddings"] else {**tensors, "lm_head.weight": (config["vocab_size"], hidden)}


def stored(directory: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(directory / "model.safetensors", "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize("kernel_dims", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_engines_find_what_they_read(kernel_dims: bool, tied: bool, tmp_path: Path) -> None:
    model = compile_tiny(build("llama", tie_word_embeddings=tied, rms_norm_eps=1e-3), 0.25).model
    written(model, tmp_path / "out", "deepseek_v3", kernel_dims=kernel_dims)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored(tmp_path / "out") == deepseek_tensors(config)
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert config["q_lora_rank"] is None
    assert config["attention_bias"] is False
    assert config["rope_interleave"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["first_k_dense_replace"] == config["num_hidden_layers"]
    # Engines take rms_norm_eps for the latent's norm too, and know no tied head.
    assert config["rms_norm_eps"] == 1e-6
    assert config["tie_word_embeddings"] is False
    if kernel_dims:
        sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        assert [config[name] for name in sizes] == [512, 64, 128, 128]
        # vLLM and SGLang read no other rope alike.
        assert config["rope_parameters"]["rope_type"] == "default"


def test_kernel_dims_refuse_frequencies_that_repeat(tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match="rotary frequencies"):
        written(exact("llama").model, tmp_path / "out", "deepseek_v3", kernel_dims=True)
    assert not list(tmp_path.iterdir())


def test_the_latent_norm_passes_outliers(tmp_path: Path) -> None:
    model = copy.deepcopy(half("llama").model)
    with torch.no_grad():
        model.model.embed_tokens.weight[IDS[0, 0]] *= 1e4
    written(model, tmp_path / "out", "deepseek_v3")


@pytest.mark.parametrize("profile", ["deepseek_v3", "laguna"])
def test_bfloat16_loses_no_more_than_rounding(profile: str, tmp_path: Path) -> None:
    make: Any = (lambda m: compile_tiny(m, 0.5).model) if profile == "deepseek_v3" else windowed
    model = make(build("llama", dtype=torch.bfloat16))
    written(model, tmp_path / "out", profile)
    precise = logits(copy.deepcopy(model).float(), IDS)
    ours, theirs = (logits(m, IDS).float() for m in (model, read_native(tmp_path / "out")))
    assert (theirs - precise).square().mean() < 3 * (ours - precise).square().mean()


@pytest.mark.parametrize(
    ("profile", "make"),
    [("youtu", lambda: half("llama").model), pytest.param("lfm3", lambda: windowed(source("llama")), marks=needs_lfm3)],
)
def test_float16_is_refused(profile: str, make: Any, tmp_path: Path) -> None:
    model = copy.deepcopy(make()).half()
    with pytest.raises(attnedit.UsageError, match="float16"):
        written(model, tmp_path / "out", profile)

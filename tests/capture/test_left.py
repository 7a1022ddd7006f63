"""Attention of other kinds beside attention that is converted: it stays as it is, and every module is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from commands import answer
from compiled import deviation, in_pieces, logits, tokens
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GraniteMoeHybridConfig,
    Llama4TextConfig,
    PreTrainedModel,
    Qwen3NextConfig,
)

import attnedit
from attnedit.compiler.errors import CaptureError

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SHARING: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 4,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": 64,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
}
CHUNKED: dict[str, Any] = {
    "layer_types": ["chunked_attention", "full_attention"],
    "attention_chunk_size": 8,
    "num_local_experts": 2,
    "intermediate_size_mlp": 48,
    "no_rope_layers": [1, 0],
    "attn_temperature_tuning": False,
}
MAMBA: dict[str, Any] = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "shared_intermediate_size": 16,
}


def shared(kind: str) -> dict[str, str]:
    place, owned = "model.layers.{}.self_attn", f"({kind}): it attends to the keys and values of "
    owner = f"({kind}): other layers attend to its keys and values, so it cannot be replaced alone"
    return {
        **{place.format(index): owner for index in (2, 3)},
        **{place.format(index): owned + place.format(index - 2) for index in (4, 5)},
    }


FAMILIES: dict[str, tuple[Any, dict[str, Any], dict[str, str]]] = {
    "gemma3n": (Gemma3nTextConfig, SHARING, shared("Gemma3nTextAttention")),
    "gemma4": (Gemma4TextConfig, {**SHARING, "global_head_dim": 8}, shared("Gemma4TextAttention")),
    "qwen3_next": (
        Qwen3NextConfig,
        {"num_hidden_layers": 2, **LINEAR},
        {"model.layers.0": "(linear_attention): it runs no softmax attention"},
    ),
    "granitemoehybrid": (
        GraniteMoeHybridConfig,
        {"num_hidden_layers": 2, **MAMBA},
        {"model.layers.0": "(linear_attention): it runs no softmax attention"},
    ),
    "llama4": (
        Llama4TextConfig,
        {"num_hidden_layers": 2, **CHUNKED},
        {"model.layers.0.self_attn": "(Llama4TextAttention): its mask is neither causal nor a sliding window"},
    ),
}


def build(family: str) -> PreTrainedModel:
    config_class, options, _ = FAMILIES[family]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config_class(**{**SIZES, **options})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_stays_is_named_and_the_rest_is_exact(family: str, tmp_path: Path) -> None:
    model, left = build(family), FAMILIES[family][2]
    result = attnedit.compile(model, "mla", kv_budget=1.0)
    assert result.report.left == left
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    expected = logits(model, ids, mask)
    assert deviation(in_pieces(result.model, ids, mask, [6, 4, 1, 1])[0], expected) < 1e-4
    for name in left:
        assert type(result.model.get_submodule(name)) is type(model.get_submodule(name))
    console = Console(width=1000)
    with console.capture() as shown:
        console.print(result.report)
    for name, reason in left.items():
        line = next(line for line in shown.get().splitlines() if line.startswith("left") and f" {name}" in line)
        assert line.endswith(reason)
    assert all(name in result.report.to_html() for name in left)
    result.save(tmp_path / "out")
    loaded = attnedit.load(tmp_path / "out")
    assert torch.equal(logits(loaded.model, ids, mask), logits(result.model, ids, mask))
    assert loaded.report.left == left


@pytest.mark.parametrize("family", ["gemma3n", "qwen3_next", "llama4"])
def test_windows_beside_what_stays(family: str) -> None:
    model, left = build(family), FAMILIES[family][2]
    result = attnedit.compile(model, "gateswa", window=3, full_layers=0, calibration=tokens(8, 32))
    assert result.report.left == left
    ids = tokens(2, 12)
    assert deviation(logits(result.model, ids), logits(model, ids)) > 0


@pytest.mark.parametrize("family", ["gemma3n", "gemma4", "qwen3_next"])
def test_inspect_names_what_stays(family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build(family).config.save_pretrained(tmp_path)
    assert answer(capsys, "inspect", tmp_path)["left"] == FAMILIES[family][2]


def test_where_nothing_else_runs_it_is_refused() -> None:
    config = Llama4TextConfig(**{**SIZES, "num_hidden_layers": 2, **CHUNKED, "layer_types": ["chunked_attention"] * 2})
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(CaptureError, match=r"layers\.1\.self_attn .* its mask is neither causal nor a sliding window"):
        attnedit.compile(model, "mla", kv_budget=1.0)

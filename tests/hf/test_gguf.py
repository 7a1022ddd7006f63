"""Checkpoints of DeepSeek's form as GGUF: what llama.cpp's converter makes of them, and what its loader then computes.

Held against the `gguf` package, which has the names of architecture deepseek2; llama.cpp itself is not run.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import torch
import torch.nn.functional as F
from compiled import compile_tiny, deviation, exact, half, logits, tokens
from families import build
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

import attnedit
from attnedit.targets.runtime.hf import export

ARCHITECTURE = gguf.MODEL_ARCH.DEEPSEEK2
KEYS = gguf.Keys
IDS = tokens(2, 24)


def checkpoint(model: PreTrainedModel, directory: Path, profile: str, **options: Any) -> dict[str, Any]:
    export(SimpleNamespace(model=model, tokenizer=None), directory, profile=profile, gguf=True, **options)
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def convert(directory: Path, file: Path) -> None:
    """Write a directory as GGUF: DeepSeek's fields by their keys; keys up transposed, and apart from values up."""
    config = json.loads((directory / "config.json").read_text())
    layers, heads = config["num_hidden_layers"], config["num_attention_heads"]
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, value = config["qk_nope_head_dim"], config["v_head_dim"]
    assert config["rope_parameters"]["rope_type"] == "default"  # no key for any other but yarn
    assert config["num_key_value_heads"] == heads
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[ARCHITECTURE])
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(1)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config.get("first_k_dense_replace", layers))
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(nope + rope)
    writer.add_value_length_mla(value)
    writer.add_expert_feed_forward_length(config.get("moe_intermediate_size", config["intermediate_size"]))
    writer.add_expert_shared_count(config.get("n_shared_experts", 0))
    names = gguf.get_tensor_name_map(ARCHITECTURE, layers)
    for name, weight in load_file(directory / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        parts = {stem: weight.float()}
        if stem.endswith("kv_b_proj"):
            keys, values = weight.float().view(heads, nope + value, rank).split([nope, value], 1)
            base = stem.removesuffix("kv_b_proj")
            parts = {f"{base}k_b_proj": keys.mT.contiguous(), f"{base}v_b_proj": values.contiguous()}
        for part, tensor in parts.items():
            found = names.get_name(part)
            assert found is not None, f"{part} has no name in {ARCHITECTURE.name}"
            writer.add_tensor(f"{found}.weight", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded_tensors(get: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes, fastest dimension first, that a loader of deepseek2 asks for with every layer dense."""
    name, width = gguf.TENSOR_NAMES, get(KEYS.LLM.EMBEDDING_LENGTH)
    heads, rank = get(KEYS.Attention.HEAD_COUNT), get(KEYS.Attention.KV_LORA_RANK)
    rope, query_rank = get(KEYS.Rope.DIMENSION_COUNT), get(KEYS.Attention.Q_LORA_RANK)
    key, value = get(KEYS.Attention.KEY_LENGTH_MLA), get(KEYS.Attention.VALUE_LENGTH_MLA)
    inner, tensor = get(KEYS.LLM.FEED_FORWARD_LENGTH), gguf.MODEL_TENSOR
    layer = {
        tensor.ATTN_NORM: (width,),
        tensor.ATTN_Q_A: (width, query_rank),
        tensor.ATTN_Q_A_NORM: (query_rank,),
        tensor.ATTN_Q_B: (query_rank, heads * key),
        tensor.ATTN_KV_A_MQA: (width, rank + rope),
        tensor.ATTN_KV_A_NORM: (rank,),
        tensor.ATTN_K_B: (key - rope, rank, heads),
        tensor.ATTN_V_B: (rank, value, heads),
        tensor.ATTN_OUT: (heads * value, width),
        tensor.FFN_NORM: (width,),
        tensor.FFN_GATE: (width, inner),
        tensor.FFN_UP: (width, inner),
        tensor.FFN_DOWN: (inner, width),
    }
    vocabulary = get(KEYS.LLM.VOCAB_SIZE)
    found = {name[tensor.TOKEN_EMBD]: (width, vocabulary), name[tensor.OUTPUT_NORM]: (width,)}
    found[name[tensor.OUTPUT]] = (width, vocabulary)
    for block in range(get(KEYS.LLM.BLOCK_COUNT)):
        found |= {name[kind].format(bid=block): shape for kind, shape in layer.items()}
    return {f"{stem}.weight": shape for stem, shape in found.items()}


def run(weights: dict[str, Tensor], get: Any, ids: Tensor) -> Tensor:
    """Logits [B, T, V] as llama.cpp's graph of deepseek2 has them: one latent head, absorbed keys and values."""
    eps, rope = get(KEYS.Attention.LAYERNORM_RMS_EPS), get(KEYS.Rope.DIMENSION_COUNT)
    heads, rank = get(KEYS.Attention.HEAD_COUNT), get(KEYS.Attention.KV_LORA_RANK)
    key = get(KEYS.Attention.KEY_LENGTH_MLA)

    def norm(x: Tensor, name: str) -> Tensor:
        weight = weights[f"{name}.weight"]
        return F.rms_norm(x, weight.shape, weight, eps)

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T

    length = ids.shape[1]
    steps = get(KEYS.Rope.FREQ_BASE) ** -(torch.arange(0, rope, 2) / rope)
    angle = torch.arange(length)[:, None] * steps

    def turn(x: Tensor) -> Tensor:  # neighbours are pairs
        even, odd = x[..., 0::2], x[..., 1::2]
        return torch.stack(
            [even * angle.cos() - odd * angle.sin(), even * angle.sin() + odd * angle.cos()], -1
        ).flatten(-2)

    x = weights["token_embd.weight"][ids]
    mask = torch.full((length, length), -torch.inf).triu(1)
    for block in range(get(KEYS.LLM.BLOCK_COUNT)):
        at = f"blk.{block}."
        h = norm(x, f"{at}attn_norm")
        query = linear(norm(linear(h, f"{at}attn_q_a"), f"{at}attn_q_a_norm"), f"{at}attn_q_b")
        nope, rotary = query.unflatten(-1, (heads, key)).transpose(1, 2).split([key - rope, rope], -1)
        latent, shared = linear(h, f"{at}attn_kv_a_mqa").split([rank, rope], -1)
        latent = norm(latent, f"{at}attn_kv_a_norm")
        absorbed = torch.einsum("bhtk,hrk->bhtr", nope, weights[f"{at}attn_k_b.weight"])
        scores = absorbed @ latent[:, None].mT + turn(rotary) @ turn(shared)[:, None].mT
        read = (scores * key**-0.5 + mask).softmax(-1) @ latent[:, None]
        out = torch.einsum("bhtr,hvr->bthv", read, weights[f"{at}attn_v_b.weight"]).flatten(2)
        x = x + linear(out, f"{at}attn_output")
        h = norm(x, f"{at}ffn_norm")
        x = x + linear(F.silu(linear(h, f"{at}ffn_gate")) * linear(h, f"{at}ffn_up"), f"{at}ffn_down")
    return linear(norm(x, "output_norm"), "output" if "output.weight" in weights else "token_embd")


def check(directory: Path, file: Path, model: PreTrainedModel) -> float:
    """Read the file back, hold names and shapes against a loader's, and compare its logits with the live model's."""
    convert(directory, file)
    reader = gguf.GGUFReader(file)
    architecture = reader.get_field(KEYS.General.ARCHITECTURE)
    assert architecture is not None
    assert architecture.contents() == "deepseek2"

    def get(key: str) -> Any:
        field = reader.get_field(key.format(arch="deepseek2"))
        assert field is not None, key
        return field.contents()

    assert get(KEYS.LLM.LEADING_DENSE_BLOCK_COUNT) == get(KEYS.LLM.BLOCK_COUNT)
    assert get(KEYS.Attention.KEY_LENGTH_MLA) > get(KEYS.Rope.DIMENSION_COUNT)
    wanted = loaded_tensors(get)
    assert {tensor.name: tuple(int(size) for size in tensor.shape) for tensor in reader.tensors} == wanted
    weights = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    return deviation(run(weights, get, IDS), logits(model, IDS).float())


@pytest.mark.parametrize(("profile", "tied"), [("deepseek_v3", False), ("youtu", True)])
def test_a_checkpoint_as_gguf_computes_the_same(profile: str, tied: bool, tmp_path: Path) -> None:
    options = {"tie_word_embeddings": tied, "rms_norm_eps": 1e-3}
    model = compile_tiny(build("llama", **options), 0.5, profile=profile).model
    config = checkpoint(model, tmp_path / "out", profile)
    assert config["q_lora_rank"] == config["hidden_size"]
    assert config["rms_norm_eps"] == 1e-6
    assert check(tmp_path / "out", tmp_path / "model.gguf", model) < 1e-4


def test_norms_that_became_linear_go_the_same_way(tmp_path: Path) -> None:
    model = compile_tiny(build("qwen3"), 0.5, profile="deepseek_v3").model
    checkpoint(model, tmp_path / "out", "deepseek_v3")
    assert check(tmp_path / "out", tmp_path / "model.gguf", model) < 1e-4


@pytest.mark.long
def test_bfloat16_loses_no_more_than_rounding(tmp_path: Path) -> None:
    model = compile_tiny(build("llama", dtype=torch.bfloat16), 0.25).model
    checkpoint(model, tmp_path / "out", "deepseek_v3")
    assert check(tmp_path / "out", tmp_path / "model.gguf", model) < 0.05


def test_what_llama_cpp_does_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match="rope_type longrope"):
        checkpoint(exact("llama").model, tmp_path / "out", "deepseek_v3")
    with pytest.raises(attnedit.UsageError, match="--gguf goes with"):
        checkpoint(half("llama").model, tmp_path / "out", "remote")
    assert not list(tmp_path.iterdir())

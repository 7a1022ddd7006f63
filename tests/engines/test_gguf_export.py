"""GGUF files written by us: what llama.cpp's graphs compute from them, tokenizers, refusals, the command line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Captured, answer, refusal
from compiled import CONTEXT, compile_tiny, half, tokens
from families import build
from gguf_models import RULES, VOCABULARY, WINDOW, latent, sliding, trained_tokenizer, with_tokenizer
from tiny_llama import make_llama, make_tokenizer
from tokenizers import pre_tokenizers
from transformers import AddedToken, PreTrainedModel

import attnedit
from attnedit.targets.runtime.gguf import GGUFManifest, export
from attnedit.targets.runtime.gguf.file import Written, check_file, write_file
from attnedit.targets.runtime.gguf.form import rms
from attnedit.targets.runtime.gguf.latent import latent_form
from attnedit.targets.runtime.gguf.tokenizer import tokenizer_keys


def write(model: PreTrainedModel, file: Path, **options: Any) -> GGUFManifest:
    return export(with_tokenizer(model), file, **options)


def worst(manifest: GGUFManifest) -> float:
    return max(check["deviation"] for check in manifest.checks)


@pytest.mark.parametrize(
    ("family", "options"),
    [("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}), ("llama", {}), ("qwen3", {}), ("qwen2", {})],
)
def test_latent_attention_becomes_deepseek2(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    manifest = write(latent(family, **options), tmp_path / "model.gguf")
    assert (manifest.architecture, manifest.dtype) == ("deepseek2", "float32")
    assert worst(manifest) < 1e-5


@pytest.mark.parametrize(("options", "bound"), [({"dtype": "float16"}, 0.01), ({"dtype": "bfloat16"}, 0.03)])
def test_half_precision_holds_the_neutralised_norm(options: dict[str, Any], bound: float, tmp_path: Path) -> None:
    model = latent(tie_word_embeddings=True, rms_norm_eps=1e-6)
    assert worst(write(model, tmp_path / "model.gguf", **options)) < bound


def test_blocks_with_float16_scales_hold_it_too(tmp_path: Path) -> None:
    model = latent(hidden_size=64, intermediate_size=96, head_dim=16, rms_norm_eps=1e-6)
    manifest = write(model, tmp_path / "model.gguf", quantize="q8_0")
    assert manifest.dtype == "q8_0"
    assert worst(manifest) < 0.05
    # llama-quantize takes this file on to coarser blocks: no weights without a scale.
    rank = model.model.layers[0].self_attn.mla.config.kv_lora_rank
    assert rms(Written(tmp_path / "model.gguf").tensor("blk.0.attn_kv_a_mqa.weight")[:rank]) > 2.0**-13


@pytest.mark.parametrize(
    ("family", "options", "architecture"),
    [
        ("llama", {"gate": "head", "tie_word_embeddings": True}, "step35"),
        ("llama", {}, "step35"),
        ("qwen3", {"gate": "head"}, "step35"),
        ("llama", {"sinks": "logit"}, "granite_swa"),
        ("qwen2", {"sinks": "logit", "tie_word_embeddings": True}, "granite_swa"),
        ("qwen2", {}, "granite_swa"),
    ],
)
def test_windows_become_what_holds_them(
    family: str, options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    model = sliding(family, **options)
    manifest = write(model, tmp_path / "model.gguf")
    assert manifest.architecture == architecture
    assert worst(manifest) < 1e-5
    written = Written(tmp_path / "model.gguf")
    assert written.key("{arch}.attention.sliding_window") == WINDOW
    assert sorted(written.key("{arch}.attention.sliding_window_pattern")) == [False, True]


def test_a_gate_that_learned_nothing_costs_nothing(tmp_path: Path) -> None:
    model = sliding(gate="element")
    for name, parameter in model.named_parameters():
        if "g_proj" in name:
            torch.nn.init.zeros_(parameter)
    assert worst(write(model, tmp_path / "model.gguf")) < 1e-5
    assert not any("gate.weight" in name and "attn" in name for name in Written(tmp_path / "model.gguf").names())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: half("llama").model, "rotary slots need rope_type longrope.*--engine llama.cpp"),
        (lambda: compile_tiny(build("qwen3"), 0.5).model, "queries normalised"),
        (lambda: compile_tiny(build("qwen2"), 0.5).model, "a bias"),
        (lambda: compile_tiny(build("gemma2", layer_types=["full_attention"] * 2), 0.5).model, "a softcap"),
        (lambda: sliding(gate="element"), "a gate per element"),
        (lambda: sliding(sinks="keep:2"), "2 kept sink tokens"),
        (lambda: sliding(sinks="value"), "a sink value"),
        (lambda: sliding("qwen2", gate="head"), "biases, .* a trained gate, and no architecture"),
        (lambda: sliding("qwen3_moe"), "experts|mlp"),
        (lambda: sliding("llama", rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}), "linear"),
        (lambda: sliding("phi"), "which|norm"),
    ],
)
def test_what_llama_cpp_does_not_hold_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match=message):
        write(make(), tmp_path / "deep" / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_layers_of_several_ranks_are_refused(tmp_path: Path) -> None:
    model = latent()
    uneven = copy.deepcopy(model)
    attention: Any = uneven.get_submodule("model.layers.1.self_attn.mla")
    attention.config = attention.config.from_dict({**attention.config.to_dict(), "kv_lora_rank": 3})
    with pytest.raises(attnedit.UsageError, match=r"ranks from 3 to .* has one for all"):
        write(uneven, tmp_path / "model.gguf")


def test_values_beyond_float16_are_refused(tmp_path: Path) -> None:
    model = copy.deepcopy(latent())
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[0, 0] = 1e6
    with pytest.raises(attnedit.UsageError, match=r"blk.0.ffn_up.weight has values up to 1e.06, beyond float16"):
        write(model, tmp_path / "model.gguf", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_noticed(tmp_path: Path) -> None:
    form = latent_form(latent(), half=False)
    write_file(form, {}, "tiny", "float32", tmp_path / "model.gguf")
    check_file(form, {}, "float32", tmp_path / "model.gguf")
    form.tensors["blk.1.attn_q.weight"][0, 0] += 1e-3
    with pytest.raises(attnedit.VerificationError, match=r"blk.1.attn_q.weight was not stored as it was meant"):
        check_file(form, {}, "float32", tmp_path / "model.gguf")
    with pytest.raises(attnedit.VerificationError, match=r"another general\.name"):
        check_file(form, {"general.name": "huge"}, "float32", tmp_path / "model.gguf")


@pytest.mark.parametrize("rules", list(RULES))
def test_tokenizers_are_known_by_their_rules(rules: str) -> None:
    tokenizer = trained_tokenizer(rules, 400)
    keys, notes = tokenizer_keys(tokenizer, make_llama(vocab_size=420), 420)
    assert keys["tokenizer.ggml.pre"] == rules
    assert notes[0] == f"Pre-tokenizer {rules}."
    assert len(keys["tokenizer.ggml.tokens"]) == 420
    assert keys["tokenizer.ggml.tokens"][len(tokenizer) :] == [f"[PAD{index}]" for index in range(400, 420)]
    assert (keys["tokenizer.ggml.add_bos_token"], keys["tokenizer.ggml.add_eos_token"]) == (False, False)


def _changed(change: Any) -> Any:
    tokenizer = make_tokenizer()
    change(tokenizer)
    return tokenizer


def _prefix_space(tokenizer: Any) -> None:
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (_changed(_prefix_space), r"pre-tokenizer \(ByteLevel\) is none of those"),
        (make_tokenizer(), "no merges"),
    ],
)
def test_tokenizers_by_other_rules_are_refused(tokenizer: Any, message: str) -> None:
    with pytest.raises(attnedit.UsageError, match=message):
        tokenizer_keys(tokenizer, make_llama(), 300)


def test_tokens_that_swallow_spaces_are_refused() -> None:
    tokenizer = copy.deepcopy(trained_tokenizer("gpt-2", VOCABULARY))
    tokenizer.add_tokens([AddedToken("<x>", lstrip=True)])
    with pytest.raises(attnedit.UsageError, match="<x> has lstrip set"):
        tokenizer_keys(tokenizer, make_llama(), VOCABULARY + 1)


def test_a_file_needs_its_tokenizer_to_fit() -> None:
    with pytest.raises(attnedit.UsageError, match="comes without one"):
        tokenizer_keys(None, make_llama(), VOCABULARY)
    with pytest.raises(attnedit.UsageError, match="has 260 tokens, the model 64 rows"):
        tokenizer_keys(make_tokenizer(), make_llama(), 64)


def test_the_command_line_writes_a_file_or_a_directory(tmp_path: Path, capsys: Captured) -> None:
    result = tmp_path / "result"
    compiled = compile_tiny(
        build("llama", vocab_size=VOCABULARY), 0.5, profile="deepseek_v3", calibration=tokens(2, CONTEXT)
    )
    compiled.tokenizer = trained_tokenizer("gpt-2", VOCABULARY)
    compiled.save(result)
    done = answer(capsys, "export", result, "--to", "gguf", "--dtype", "float16", "-o", tmp_path / "new" / "m.gguf")
    assert done["bytes"] == (tmp_path / "new" / "m.gguf").stat().st_size
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["m.gguf"]
    answer(capsys, "export", result, "--to", "gguf", "-o", tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model.gguf", "README.md", "attnedit-report.json", "report.html"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "llama-server" in card
    assert "Engines that were tried with this form: llama.cpp (CPU" in card
    again = ("export", result, "--to", "gguf", "-o")
    assert "is a file" in refusal(capsys, *again, tmp_path / "new" / "m.gguf")
    both = ("--dtype", "float16", "--quantize", "q8_0")
    assert "give one of them" in refusal(capsys, *again, tmp_path / "n.gguf", *both)
    assert "give q8_0" in refusal(capsys, *again, tmp_path / "n.gguf", "--quantize", "int8")
    assert "no option --profile" in refusal(capsys, *again, tmp_path / "n.gguf", "--profile", "youtu")
    with pytest.raises(attnedit.UsageError, match="was not rewritten by attnedit"):
        write(build("llama"), tmp_path / "n.gguf")

"""Refusals that say in one line what is wrong, where, and what to do, where advice once led nowhere."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Captured, answer, refusal
from compiled import compile_tiny, logits, tokens
from families import build
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Florence2Config, GenerationConfig, StaticCache

import attnedit
from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError


def edited(directory: Path, **changes: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def vision(directory: Path) -> None:
    Florence2Config().save_pretrained(directory)


def unknown_quantiser(directory: Path) -> None:
    build("llama").save_pretrained(directory)
    edited(directory, quantization_config={"quant_method": "squeeze"})


def compiled_names(directory: Path) -> None:
    build("llama").save_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    save_file(
        {f"_orig_mod.{name}": value for name, value in weights.items()},
        directory / "model.safetensors",
        metadata={"format": "pt"},
    )


def adapter(directory: Path) -> None:
    directory.mkdir()
    (directory / "adapter_config.json").write_text("{}")


SOURCES: dict[str, tuple[Callable[[Path], None], list[str], str]] = {
    "vision": (vision, [], "is an encoder-decoder (florence2)"),
    "quantiser": (unknown_quantiser, [], "'squeeze', which this transformers does not know"),
    "quantiser, unpacked": (unknown_quantiser, ["--dequantize"], "'squeeze', which this transformers does not know"),
    "compiled": (compiled_names, [], "save model._orig_mod instead"),
    "adapter": (adapter, [], "holds an adapter of PEFT; merge it into its model first"),
}


@pytest.mark.parametrize(("make", "options", "message"), SOURCES.values(), ids=SOURCES)
def test_sources(
    make: Callable[[Path], None], options: list[str], message: str, tmp_path: Path, capsys: Captured
) -> None:
    make(tmp_path / "model")
    line = refusal(capsys, "compile", tmp_path / "model", *options, "-o", tmp_path / "out")
    assert message in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("write", ["save_pretrained", "no report"])
def test_a_directory_that_a_trainer_wrote(
    write: str, saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    compile_tiny(build("llama"), 0.5).model.save_pretrained(tmp_path / "run")
    message = "has no attnedit-report.json: save_pretrained or a Trainer wrote it"
    with pytest.raises(UsageError, match=message):
        attnedit.load(tmp_path / "run")
    asked = ("--teacher", saved_llama, "--calibration", text_file, "--fit-steps", "1", "-o", tmp_path / "out")
    assert message in refusal(capsys, "calibrate", tmp_path / "run", *asked)
    assert logits(AutoModelForCausalLM.from_pretrained(tmp_path / "run"), tokens(1, 5)).shape[:2] == (1, 5)


def test_a_generation_config_with_several_sequences(saved_llama: Path, tmp_path: Path, capsys: Captured) -> None:
    from transformers import AutoTokenizer

    model = build("llama", vocab_size=260)
    model.generation_config = GenerationConfig(do_sample=True, num_return_sequences=3)
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(saved_llama).save_pretrained(tmp_path / "model")
    found = answer(capsys, "generate", tmp_path / "model", "--prompt", "Hello", "--max-new-tokens", "3")
    assert found["new_tokens"] <= 3


@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_masks_that_are_no_tensors_are_refused(target: str) -> None:
    options: dict[str, Any] = {"window": 8} if target == "gateswa" else {}
    model = attnedit.compile(build("llama"), target, calibration=tokens(4, 32), **options).model
    attention = model.model.layers[-1].self_attn.get_submodule(target)
    query = torch.zeros(1, 4, 4, 16)
    latent = (torch.zeros(1, 4, getattr(attention.config, "input_size", 0)), None, None)
    given = latent if target == "mla" else (*torch.zeros(2, 1, 2, 4, 16), None)
    with pytest.raises(UsageError, match="use attn_implementation 'sdpa' or 'eager'"):
        attention(query, *given, object())


def test_flex_attention_is_refused_before_any_work() -> None:
    model = build("llama")
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UsageError, match=r"is set to flex_attention.*set_attn_implementation\('sdpa'\)"):
        attnedit.compile(model, calibration=tokens(4, 32))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("cached", [False, True])
def test_flex_attention_on_a_result_is_refused_before_the_first_token(cached: bool) -> None:
    model = compile_tiny(build("llama"), 0.5).model
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UsageError, match=r"attention mask BlockMask .* use attn_implementation 'sdpa' or 'eager'"):
        model.generate(tokens(1, 4), max_new_tokens=2, use_cache=cached)


def test_static_caches_of_other_sizes_are_refused() -> None:
    model = compile_tiny(build("llama"), 0.5).model
    cache = StaticCache(config=build("llama").config, max_cache_len=16)  # the source's
    cache.early_initialization(1, 2, 8, torch.float32, torch.device("cpu"))
    with pytest.raises(UsageError, match="layer 0 was given a cache for 2 heads of 8 values and caches 1 of"):
        model(tokens(1, 4), **with_cache(model, cache))


ROPES = {
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    "longrope": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def test_dynamic_rope_through_onnx(tmp_path: Path) -> None:
    result = compile_tiny(build("llama", rope_parameters=ROPES["dynamic"]), 0.5)
    with pytest.raises(UsageError, match="no ONNX graph can follow"):
        result.export("onnx", tmp_path / "onnx")
    assert not (tmp_path / "onnx").exists()


def test_longrope_to_deepseek(tmp_path: Path) -> None:
    """Its lists of factors have the source's length, so the class gets the whole table."""
    result = compile_tiny(build("llama", rope_parameters=ROPES["longrope"]), 0.35)
    result.export("hf", tmp_path / "hf", profile="deepseek_v3")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    for length in (12, 80):  # before and past the original positions
        expected = logits(result.model, tokens(2, length))
        torch.testing.assert_close(logits(exported, tokens(2, length)), expected, rtol=1e-3, atol=1e-3)

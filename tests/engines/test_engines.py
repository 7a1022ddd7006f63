"""``--engine``: what an engine takes decides the form of a result, and what it does not is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from commands import Captured, refusal
from compiled import compile_tiny, half, tokens
from families import build
from gguf_models import VOCABULARY, trained_tokenizer, with_tokenizer
from hf_exports import windowed, written
from project import ROOT
from tiny_llama import make_llama
from transformers import CONFIG_MAPPING, PreTrainedModel, Qwen2Config

import attnedit
from attnedit.targets.runtime.engines import check_checkpoint, stock_rank, tried, window_cache
from attnedit.targets.runtime.gguf import export as export_gguf
from attnedit.targets.runtime.hf import PROFILES, export
from attnedit.targets.runtime.hf.files import check_files


def wide(**options: Any) -> PreTrainedModel:
    """A tiny model that caches 512 values per token and layer."""
    return build("llama", num_attention_heads=4, num_key_value_heads=4, head_dim=64, **options)


def config_of(directory: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return config


def test_llama_cpp_gets_linear_maps_and_one_size(tmp_path: Path) -> None:
    result = compile_tiny(build("qwen3", vocab_size=VOCABULARY), 0.5, engine="llama.cpp")
    assert result.report.recipe["engine"] == "llama.cpp"
    manifest = export_gguf(with_tokenizer(result.model), tmp_path / "model.gguf", engine="llama.cpp")
    assert manifest.architecture == "deepseek2"


def test_vllm_gets_one_of_its_sizes(tmp_path: Path) -> None:
    result = compile_tiny(wide(tie_word_embeddings=True), 0.7, engine="vllm")
    result.export("hf", tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (256, 64)
    assert config["rms_norm_eps"] == 1e-6
    assert config["tie_word_embeddings"] is False
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]


def test_vllm_takes_the_largest_of_its_sizes_within_the_budget() -> None:
    assert [stock_rank("vllm", 2048, budget) for budget in (0.5, 0.27, 0.2)] == [512, 448, 256]
    assert stock_rank("sglang", 2048, 0.5) is None
    with pytest.raises(attnedit.UsageError, match=r"allows 192; give kv_budget 0\.84, or use attnedit's plugin"):
        stock_rank("vllm", 384, 0.5)
    with pytest.raises(attnedit.UsageError, match=r"and the source 256: nothing would be saved; use attnedit's plugin"):
        stock_rank("vllm", 256, 0.5)


def test_what_engines_were_seen_to_allocate_for_windows() -> None:
    """SmolLM2 (384 values, float32): tokens that vLLM had in 1 GiB, and MiB of llama.cpp's float16 cache."""
    found = window_cache("vllm", [None] * 8 + [64] * 22, 384, 4, 8192)
    assert found is not None
    assert 2**30 / found[0] == pytest.approx(71_450, rel=0.001)
    assert found[1] == "--max-num-batched-tokens 512 --block-size 32 --no-async-scheduling"
    found = window_cache("llama.cpp", [None] * 7 + [128] * 23, 384, 4, 2048)
    assert found == (38.25 / 2 * 2**20 / 2048, "-ub 256")
    assert window_cache("sglang", [None, 64], 384, 4, 8192) is None


def test_nearly_as_many_full_layers_as_windows_share_blocks_of_the_larger_number() -> None:
    """3 windows and 4 full layers: vLLM makes two groups of 4, and of 2 and 4 three groups of 2."""
    page = 32 * 100 * 2
    window = (511 + 1 + 512) // 32  # a multiple of the block, and one block more
    found = [window_cache("vllm", [None] * full + [512] * slides, 100, 2, 4096) for full, slides in ((4, 3), (2, 4))]
    sizes = [round(size[0] * 4096) for size in found if size is not None]
    assert sizes == [page * (4 * 128 + 4 * (window + 1)), page * (2 * 128 + 4 * (window + 1))]


@pytest.mark.parametrize(("engine", "name"), [("vllm", "--block-size 32"), ("llama.cpp", "-ub 256"), ("sglang", "")])
def test_the_report_says_what_the_engine_allocates_for_windows(engine: str, name: str) -> None:
    options = {"calibration": tokens(2, 32), "window": 8, "full_layers": 1, "alternations": 0, "engine": engine}
    report = attnedit.compile(build("llama", vocab_size=VOCABULARY), "gateswa", **options).report
    notes = [note for note in report.notes if note.startswith(f"{engine} allocates")]
    assert len(notes) == bool(name)
    assert all(name in note for note in notes)
    printed = " ".join(str(report).split())
    assert all(note in printed for note in notes)


def test_a_result_of_another_size_is_refused_by_vllm_only(tmp_path: Path) -> None:
    result = compile_tiny(wide(), 0.25, engine="sglang")
    with pytest.raises(attnedit.UsageError, match=r"stock vLLM admits .* compile with --engine vllm, or use"):
        result.export("hf", tmp_path / "out", engine="vllm")
    assert not (tmp_path / "out").exists()
    assert result.export("hf", tmp_path / "out").architecture == "DeepseekV3ForCausalLM"
    with pytest.raises(attnedit.UsageError, match="rope_type longrope, which sglang reads in its own way"):
        half("llama").export("hf", tmp_path / "other", engine="sglang")


@pytest.mark.parametrize(
    ("family", "engine", "profile", "architecture"),
    [
        ("llama", "vllm", "native", "LlamaForCausalLM"),
        ("qwen2", "vllm", "native", "LlamaForCausalLM"),
        ("qwen3", "vllm", "laguna", "LagunaForCausalLM"),
        ("llama", "sglang", "laguna", "LagunaForCausalLM"),
    ],
)
def test_windows_go_where_the_engine_has_them(
    family: str, engine: str, profile: str, architecture: str, tmp_path: Path
) -> None:
    model = windowed(build(family), engine=engine)
    result = SimpleNamespace(model=model, tokenizer=None)
    assert export(result, tmp_path / "out", engine=engine).profile == profile
    config = config_of(tmp_path / "out")
    assert config["architectures"] == [architecture]
    assert sorted(config["layer_types"]) == ["full_attention", "sliding_attention"]
    assert "Engines that were tried with this form: vLLM 0.32.0" in (tmp_path / "out" / "README.md").read_text()


def test_sglang_wants_a_full_layer(tmp_path: Path) -> None:
    result = SimpleNamespace(model=windowed(build("llama"), full_layers=0), tokenizer=None)
    with pytest.raises(attnedit.UsageError, match="SGLang's Laguna wants a full layer"):
        export(result, tmp_path / "out", engine="sglang")


def test_sglang_is_given_no_laguna_with_a_tied_head() -> None:
    config = CONFIG_MAPPING["laguna"](layer_types=["full_attention"], num_hidden_layers=1, tie_word_embeddings=True)
    assert check_checkpoint("vllm", config) is None
    with pytest.raises(attnedit.UsageError, match="SGLang's Laguna ties no head"):
        check_checkpoint("sglang", config)


def test_qwen3_windows_are_not_ignored_by_vllm(tmp_path: Path) -> None:
    model = windowed(build("qwen3"))
    written(model, tmp_path / "out", "native")
    config = config_of(tmp_path / "out")
    # Its class there has windows in no layer, and says so unless this is the number of layers.
    assert config["max_window_layers"] == 0
    with pytest.raises(attnedit.UsageError, match="vllm takes profile laguna of this result, not native"):
        written(model, tmp_path / "other", "native", engine="vllm")


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("mla", {"engine": "tgi"}, "engine 'tgi' is not known; give vllm or sglang or llama.cpp"),
        ("gateswa+mla", {"engine": "vllm"}, "engine vllm holds target mla or gateswa, not gateswa.mla; use attnedit's"),
        ("mla", {"engine": "vllm", "profile": "youtu"}, "engine vllm takes profile deepseek_v3 .* not profile youtu"),
        ("mla", {"engine": "sglang", "kernel_dims": True, "profile": "deepseek_v3"}, "kernel_dims and engine sglang"),
        ("gateswa", {"engine": "llama.cpp", "profile": "laguna"}, r"takes a \.gguf and no profile"),
        ("gateswa", {"engine": "llama.cpp", "sinks": "keep:4"}, "holds no sinks keep:4"),
        ("gateswa", {"engine": "llama.cpp", "gate": "element"}, "not per element"),
        ("gateswa", {"engine": "llama.cpp", "gate": "head", "sinks": "logit"}, "a gate or sink logits, not both"),
        ("gateswa", {"engine": "vllm", "gate": "head"}, "profile native holds gate none"),
        ("mla", {"engine": "vllm", "allocation": "loss"}, "leave allocation out"),
        ("mla", {"engine": "vllm"}, "nothing would be saved"),
    ],
)
def test_arguments_against_an_engine_are_refused(target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnedit.UsageError, match=message):
        attnedit.compile(build("llama"), target, **options)


def test_the_command_line_refuses_what_contradicts_an_engine(
    saved_llama: Path, tmp_path: Path, capsys: Captured
) -> None:
    compile_it = ("compile", saved_llama, "-o", tmp_path / "out")
    assert "not known" in refusal(capsys, *compile_it, "--engine", "tgi")
    assert "engine needs the whole model" in refusal(capsys, *compile_it, "--engine", "sglang", "--low-memory")
    result = compile_tiny(make_llama(), 0.5, engine="sglang", calibration=tokens(2, 256))
    result.save(tmp_path / "result")
    export_it = ("export", tmp_path / "result", "-o", tmp_path / "exported")
    assert "give --to gguf" in refusal(capsys, *export_it, "--to", "hf", "--engine", "llama.cpp")
    assert "for sglang give --to hf" in refusal(capsys, *export_it, "--to", "gguf", "--engine", "sglang")
    assert "no option --engine" in refusal(capsys, *export_it, "--to", "onnx", "--engine", "vllm")
    assert "not for engine sglang" in refusal(capsys, *export_it, "--to", "hf", "--engine", "sglang", "--gguf")


def test_another_tokenizer_and_other_settings_are_noticed(tmp_path: Path) -> None:
    tokenizer, model = trained_tokenizer("smollm", 2000), make_llama()
    tokenizer.save_pretrained(tmp_path)
    model.generation_config.save_pretrained(tmp_path)
    check_files(tokenizer, model, tmp_path)
    Qwen2Config().save_pretrained(tmp_path)  # of which transformers makes a tokenizer of its own
    with pytest.raises(attnedit.VerificationError, match="reads the written tokenizer as Qwen2Tokenizer"):
        check_files(tokenizer, model, tmp_path)
    model.generation_config.top_k = 7
    with pytest.raises(attnedit.VerificationError, match=r"has top_k .*, the model 7"):
        check_files(None, model, tmp_path)


def test_engines_that_are_said_to_be_tried_are_those_of_the_pages() -> None:
    """Every version in model cards stands under "What was run" of an engine's page, and the pinned ones in cards."""
    pages = [ROOT / "docs" / "engines" / name for name in ("vllm.md", "llama.cpp.md", "sglang.md")]
    run = " ".join(page.read_text(encoding="utf-8").partition("## What was run")[2] for page in pages)
    cards = {form: tried(form) for form in (*PROFILES, "saved", "gguf")}
    for form, card in cards.items():
        assert all(version in run for version in re.findall(r"\d+(?:\.\d+)+", card)), form
    pinned = re.findall(r"^(?:VLLM|LLAMACPP) := \S+==(\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    assert len(pinned) == 2
    assert all(version in cards["saved"] + cards["gguf"] for version in pinned)

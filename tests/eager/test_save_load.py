"""Directories of rewritten models: written whole or not at all, read back bit for bit."""

import functools
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import families
import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    set_seed,
)

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.errors import AttneditError, UsageError, VerificationError
from attnedit.targets.attention import MLAConfig
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import (
    AttneditConfig,
    attnedit_classes,
    load_model,
    save,
    share_copy,
    source_config,
    splice,
    to_attnedit,
)

torch.set_num_threads(1)
SIZES = {**families.SIZES, "max_position_embeddings": 64, "initializer_range": 0.2}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "llama_tied_yarn": lambda: LlamaConfig(**SIZES, tie_word_embeddings=True, rope_parameters=YARN),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SIZES, head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2
    ),
    "gemma3": lambda: Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
}
LINEAR = {f"linear_num_{kind}_heads": 2 for kind in ("key", "value")} | {
    f"linear_{kind}_head_dim": 8 for kind in ("key", "value")
}
HYBRID: dict[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_next": lambda: Qwen3NextConfig(
        **SIZES,
        **LINEAR,
        head_dim=16,
        layer_types=["linear_attention", "full_attention"],
        num_experts=2,
        num_experts_per_tok=1,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    )
}
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))


@functools.cache
def rewritten(family: str) -> PreTrainedModel:
    set_seed(1)
    model = AutoModelForCausalLM.from_config((FAMILIES | HYBRID)[family]()).eval()
    model.generation_config.max_new_tokens = 7
    student = share_copy(model)
    configs, graphs = {}, {}
    for site in capture(model):
        if site.window is not None:
            continue
        configs[site.name] = MLAConfig(
            layer_idx=site.layer_idx,
            num_attention_heads=site.num_attention_heads,
            head_dim=site.head_dim,
            v_head_dim=site.v_head_dim,
            kv_lora_rank=10,
            rope_columns=site.rope.columns[::2],
            qk_nope_head_dim=site.head_dim,
            input_size=site.num_key_value_heads * (site.head_dim + site.v_head_dim),
            scale=site.scale,
            softcap=site.softcap,
            sinks=site.sinks is not None,
        )
        graphs[site.name] = mla_graph(student, site, configs[site.name])
        for parameter in graphs[site.name].get_submodule("mla").parameters():
            nn.init.normal_(parameter, std=0.3)
    splice(student, graphs)
    return to_attnedit(student, configs).requires_grad_(False)


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = share_copy(rewritten(family)).to(dtype)
    assert rewritten(family).dtype == torch.float32
    for name, buffer in rewritten(family).named_buffers():  # loading never rounds rotary frequencies, .to() does
        model.get_submodule(name.rpartition(".")[0]).register_buffer(name.rpartition(".")[2], buffer, persistent=False)
    expected = logits(model)
    save(model, tmp_path / "out")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for other in (loaded, load_model(tmp_path / "out")):
        assert type(other) is type(model)
        assert other.dtype == dtype
        assert torch.equal(logits(other), expected)
        assert other.state_dict().keys() == model.state_dict().keys()
        assert other.generation_config.max_new_tokens == 7
        assert other.config.attnedit == model.config.attnedit
    assert expected.isfinite().all()


def test_models_that_cannot_run_on_meta(tmp_path: Path) -> None:
    save(rewritten("qwen3_next"), tmp_path / "out")
    other = load_model(tmp_path / "out")
    assert list(other.config.attnedit["sites"]) == ["model.layers.1.self_attn"]
    assert torch.equal(logits(other), logits(rewritten("qwen3_next")))


@pytest.mark.parametrize("family", ["llama_tied_yarn", "qwen3_moe"])
def test_shards_device_maps_and_other_dtypes(family: str, tmp_path: Path) -> None:
    model = rewritten(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for arguments in ({}, {"device_map": "cpu"}, {"device_map": {"": "cpu"}}):
        other, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, **arguments)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        assert torch.equal(logits(other), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for name, p in half.named_parameters() if ".mla." in name} == {torch.bfloat16}
    assert logits(half).isfinite().all()


def test_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    save(rewritten("llama_tied_yarn"), tmp_path / "out")
    other = load_model(tmp_path / "out")
    assert other.lm_head.weight is other.model.embed_tokens.weight


def test_second_generation_saves_the_same(tmp_path: Path) -> None:
    save(rewritten("qwen3_moe"), tmp_path / "first")
    save(load_model(tmp_path / "first"), tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second"))
    assert first == second
    assert torch.equal(logits(load_model(tmp_path / "second")), logits(rewritten("qwen3_moe")))


def test_config_on_disk(tmp_path: Path) -> None:
    save(rewritten("llama"), tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert saved["model_type"] == "attnedit"
    assert saved["source_model_type"] == "llama"
    assert saved["architectures"] == ["AttneditLlamaForCausalLM"]
    assert saved["attnedit"]["format_version"] == 1
    assert set(saved["attnedit"]["sites"]) == {"model.layers.0.self_attn", "model.layers.1.self_attn"}
    for config in (AutoConfig.from_pretrained(tmp_path / "out"), AttneditConfig.from_pretrained(tmp_path / "out")):
        assert isinstance(config, LlamaConfig)
        assert config.hidden_size == 32
        plain = source_config(config)
        assert type(plain) is LlamaConfig
        assert plain.to_dict()["model_type"] == "llama"
        assert "attnedit" not in plain.to_dict()
        assert attnedit_classes(config)[1] is attnedit_classes(plain)[1]
    assert "quantization_config" not in saved


def test_from_config_builds_the_shape() -> None:
    model = rewritten("llama")
    other = AutoModelForCausalLM.from_config(model.config)
    shapes = {name: tensor.shape for name, tensor in other.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert logits(other).isfinite().all()


def test_without_attnedit_loading_fails_loudly(tmp_path: Path) -> None:
    save(rewritten("llama"), tmp_path / "out")
    script = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode != 0
    assert "attnedit" in done.stderr
    assert "does not recognize" in done.stderr


def test_a_fresh_process_loads_and_unpickles(tmp_path: Path) -> None:
    model = rewritten("llama")
    save(model, tmp_path / "out")
    (tmp_path / "model.pickle").write_bytes(pickle.dumps(model))
    script = (
        "import pickle, sys, pathlib, torch; torch.set_num_threads(1)\n"
        "other = pickle.loads(pathlib.Path(sys.argv[1], 'model.pickle').read_bytes())\n"
        "from transformers import AutoModelForCausalLM\n"
        "loaded = AutoModelForCausalLM.from_pretrained(sys.argv[1] + '/out')\n"
        "ids = torch.arange(3, 15)[None]\n"
        "assert torch.equal(loaded(ids).logits, other(ids).logits)\n"
        "assert type(loaded) is type(other), (type(loaded), type(other))\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_quantisation_marks_are_dropped(tmp_path: Path) -> None:
    set_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    model.config.quantization_config = {"quant_method": "gguf"}
    student = to_attnedit(share_copy(model), {})
    assert not hasattr(student.config, "quantization_config")
    assert model.config.quantization_config == {"quant_method": "gguf"}


def test_report_and_tokenizer_are_written(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, directory: Path) -> None:
            (Path(directory) / "tokenizer.json").write_text("{}")

    where = save(rewritten("llama"), tmp_path / "a" / "b", tokenizer=Tokenizer(), report={"sites": 2})
    assert json.loads((where / "attnedit-report.json").read_text()) == {"sites": 2}
    assert (where / "tokenizer.json").exists()
    assert where.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]


def test_directories_that_are_not_free(tmp_path: Path) -> None:
    model = rewritten("llama")
    save(model, tmp_path / "mine")
    with pytest.raises(UsageError, match="not empty"):
        save(model, tmp_path / "mine")
    (tmp_path / "mine" / "left-over").write_text("")
    save(model, tmp_path / "mine", overwrite=True)
    assert not (tmp_path / "mine" / "left-over").exists()

    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(UsageError):
            save(model, tmp_path / "theirs", overwrite=overwrite)
    assert (tmp_path / "theirs" / "thesis.tex").read_text() == "years of work"
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        save(model, tmp_path / "file", overwrite=True)
    (tmp_path / "empty").mkdir()
    save(model, tmp_path / "empty")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "theirs", "file", "empty"}


def test_failure_leaves_what_was_there(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, directory: Path) -> None:
            raise OSError("disk full")

    model = rewritten("llama")
    save(model, tmp_path / "out")
    with pytest.raises(AttneditError, match="disk full"):
        save(model, tmp_path / "out", tokenizer=Broken(), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert torch.equal(logits(load_model(tmp_path / "out")), logits(model))


def test_a_source_model_is_not_saved_as_ours(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not rewritten"):
        save(LlamaForCausalLM(LlamaConfig(**SIZES)), tmp_path / "out")


def damage(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for name, value in changes.items():
        config[name] = {**config[name], **value} if isinstance(value, dict) else value
    path.write_text(json.dumps(config))


def test_unreadable_directories_are_one_line_errors(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no directory"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UsageError, match=r"no readable config\.json"):
        load_model(tmp_path)
    LlamaConfig(**SIZES).save_pretrained(tmp_path / "plain")
    with pytest.raises(UsageError, match="'llama'"):
        load_model(tmp_path / "plain")
    for changes, message in (
        ({"attnedit": {"format_version": 99}}, "format 99"),
        ({"source_model_type": "unheard_of"}, "unheard_of"),
        ({"source_model_type": None}, "did not write it"),
        ({"attnedit": {"sites": {"model.layers.9.self_attn": {}}}}, "layers.9"),
    ):
        out = save(rewritten("llama"), tmp_path / "out", overwrite=True)
        damage(out, **changes)
        with pytest.raises(UsageError, match=message) as caught:
            load_model(out)
        assert "\n" not in str(caught.value)


def test_weights_that_do_not_match(tmp_path: Path) -> None:
    out = save(rewritten("llama"), tmp_path / "out")
    sites = json.loads((out / "config.json").read_text())["attnedit"]["sites"]
    damage(out, attnedit={"sites": dict(list(sites.items())[:1])})
    with pytest.raises(VerificationError, match="keys"):
        load_model(out)
    name, values = next(iter(sites.items()))
    out = save(rewritten("llama"), tmp_path / "other")
    damage(out, attnedit={"sites": {**sites, name: {**values, "kv_lora_rank": 9}}})
    with pytest.raises(UsageError):
        load_model(out)
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(UsageError, match="cannot read"):
        load_model(out)

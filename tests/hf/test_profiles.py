"""Compilation towards a checkpoint's class: what it lacks is left out from the start; export changes nothing."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Captured, answer, refusal, save
from compiled import MODULE, _remembered, compile_tiny, deviation, logits, source, tokens
from families import build
from hf_exports import needs_lfm3
from tiny_llama import make_llama
from transformers import AutoConfig, PreTrainedModel
from transformers.models.qwen3 import Qwen3ForCausalLM

import attnedit
from attnedit.compiler.execution.stream import stream
from attnedit.passes.mla.linear import linearise
from attnedit.passes.site_sample import take_samples
from attnedit.targets.runtime.hf import export
from attnedit.targets.runtime.hf.native import read_native

IDS = tokens(2, 24)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0}
LLAMA3 |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 32}
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 128}
"""More cached values than engines' kernels have."""


def towards(model: PreTrainedModel, profile: str, kv_budget: float | None = 0.5, **options: Any) -> Any:
    with mock.patch.object(MODULE, "capture", _remembered):
        given = {"calibration": tokens(4, 32), "kv_budget": kv_budget, "profile": profile, **options}
        return attnedit.compile(model, **given)


def sites(result: attnedit.CompileResult) -> list[dict[str, Any]]:
    return list(result.model.config.attnedit["sites"].values())


def check_export(result: attnedit.CompileResult, directory: Path) -> Any:
    """Export as the recipe says, and compare; returns the configuration that was written."""
    manifest = result.export("hf", directory)
    assert manifest.profile == result.report.recipe["profile"]
    assert max(check["deviation"] for check in manifest.checks) < 1e-5
    assert deviation(logits(read_native(directory), IDS), logits(result.model, IDS)) < 1e-5
    return AutoConfig.from_pretrained(directory)


@pytest.mark.parametrize(
    ("profile", "family", "budget", "options"),
    [
        pytest.param("deepseek_v3", "llama", 0.5, {}, marks=pytest.mark.long),
        ("deepseek_v3", "llama", 1.0, {}),
        ("deepseek_v3", "qwen3", 0.5, {}),
        ("youtu", "qwen3", 0.25, {"dtype": torch.float64}),
        ("youtu", "qwen2", 0.5, {}),
        ("youtu", "llama", 1.0, {"rope_parameters": LLAMA3}),
        pytest.param("deepseek_v3", "smollm3", 0.5, {}, marks=pytest.mark.long),
    ],
)
def test_latent_profiles(profile: str, family: str, budget: float, options: dict[str, Any], tmp_path: Path) -> None:
    result = towards(build(family, **options), profile, budget)
    found = sites(result)
    assert len({site["kv_lora_rank"] for site in found}) == 1
    assert all(site["linear"] and len(set(site["rope_columns"])) == len(site["rope_columns"]) for site in found)
    config = check_export(result, tmp_path / "out")
    assert config.rope_parameters["rope_type"] == options.get("rope_parameters", {}).get("rope_type", "default")
    # What was asked for is what is cached: nothing is padded.
    assert config.kv_lora_rank == found[0]["kv_lora_rank"]
    assert config.qk_rope_head_dim == 2 * max(len(site["rope_columns"]) for site in found)
    assert result.report.kv_budget_achieved <= budget
    approximated = family.startswith("qwen")
    assert bool(result.report.notes) == approximated
    assert not approximated or "linear maps in place of" in result.report.notes[0]


def test_what_is_trained_is_what_is_saved(tmp_path: Path) -> None:
    model = build("qwen3")
    steps = {"fit_steps": 12, "distill_steps": 4, "batch_size": 8, "seq_len": 32, "fit_learning_rate": 0.002}
    start = towards(model, "deepseek_v3", alternations=0)
    # From a few windows, whose closed form leaves something to learn.
    result = towards(model, "deepseek_v3", calibration=tokens(64, 32), calibration_tokens=128, alternations=0, **steps)
    prefix = "model.layers.0.self_attn."
    names = ("q_proj.weight", "mla.kv_a_proj_with_mqa.weight", "o_proj.weight")
    for name in names:
        assert not torch.equal(*(one.model.get_parameter(prefix + name) for one in (start, result)))
    inside = {name.removeprefix(prefix) for name, _ in result.model.named_parameters() if name.startswith(prefix)}
    assert inside == {*names, "mla.kv_b_proj.weight", "mla.q_rope_proj"}
    result.save(tmp_path / "saved")
    again = attnedit.load(tmp_path / "saved")
    assert deviation(logits(again.model, IDS), logits(result.model, IDS)) == 0
    check_export(again, tmp_path / "out")
    assert again.report.stages[0].best < again.report.stages[0].before


def test_biases_of_the_output_go(tmp_path: Path) -> None:
    model = build("llama", attention_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = towards(model, "deepseek_v3")
    assert not [name for name, _ in result.model.named_parameters() if "self_attn" in name and "bias" in name]
    check_export(result, tmp_path / "out")
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    result.save(tmp_path / "saved")
    assert deviation(logits(attnedit.load(tmp_path / "saved").model, IDS), logits(result.model, IDS)) == 0


@pytest.mark.parametrize(("rope", "slots"), [(None, 32), pytest.param(LLAMA3, 1, marks=pytest.mark.long)])
def test_kernel_sizes(rope: dict[str, Any] | None, slots: int, tmp_path: Path) -> None:
    options = {**WIDE, "rms_norm_eps": 1e-5, **({"rope_parameters": rope} if rope else {})}
    result = towards(build("qwen3", **options), "deepseek_v3", None, kernel_dims=True)
    config = check_export(result, tmp_path / "out")
    sizes = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
    assert [getattr(config, name) for name in sizes] == [512, 64, 128, 128]
    assert config.rope_parameters["rope_type"] == "default"
    assert config.rms_norm_eps == 1e-6
    assert slots <= len(sites(result)[0]["rope_columns"]) <= 32
    assert result.report.kv_budget_achieved == pytest.approx(576 / 1024, abs=0.07)
    assert result.report.kv_budget_asked is None


def sample_of(model: PreTrainedModel, layer: int) -> tuple[Any, Any]:
    found = _remembered(model)
    taken: dict[str, Any] = {}

    def visit(site: Any, inputs: Any) -> None:
        (taken[site.name],) = take_samples(model, site, inputs, lambda length: 32, 0, True)

    stream(model, found, [tokens(16, 64)], visit)
    return found[layer], taken[found[layer].name]


def test_linear_maps_are_the_projections_where_those_are_linear() -> None:
    model = source("llama")
    site, sample = sample_of(model, 1)
    linear, (approximated,) = linearise(model, site, [sample])
    assert max(linear.errors) < 1e-10
    attention: Any = model.get_submodule(site.name)
    assert torch.equal(linear.query, attention.q_proj.weight.double())
    assert torch.allclose(approximated.key, sample.key, atol=1e-5)
    assert torch.equal(approximated.target, sample.target)


def test_linear_maps_are_better_than_any_factor() -> None:
    model = build("qwen3")
    assert isinstance(model, Qwen3ForCausalLM)
    site, sample = sample_of(model, 1)
    linear, (approximated,) = linearise(model, site, [sample])
    weight: Any = model.get_submodule(site.name).k_proj.weight.detach()
    plain = (sample.hidden @ weight.T).unflatten(2, (sample.groups, -1)).transpose(1, 2)
    token = sample.token_weight[:, None, :, None]
    factor = (token * plain * sample.key).sum((0, 2)) / (token * plain.square()).sum((0, 2))
    error = (token * (plain * factor[None, :, None] - sample.key).square()).sum()
    assert 0 < linear.errors[1] < float(error / (token * sample.key.square()).sum())
    assert linear.errors[2] < 1e-10
    # The attention that is to be met is the source's, not that of the maps.
    assert torch.equal(approximated.target, sample.target)
    assert torch.equal(approximated.thinned(4).target, sample.thinned(4).target)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        ("gemma2", {"profile": "youtu"}, "softcap"),
        ("gpt_oss", {"profile": "deepseek_v3"}, "sink logits"),
        ("mistral", {"profile": "deepseek_v3"}, "sliding window"),
        ("phi3", {"profile": "deepseek_v3"}, "gate_up_proj"),
        ("llama", {"profile": "bloom"}, "'bloom' is not known"),
        ("llama", {"profile": "laguna"}, "holds target gateswa"),
        ("llama", {"profile": "deepseek_v3", "target": "gateswa", "kv_budget": None}, "holds target mla"),
        ("llama", {"profile": "deepseek_v3", "kernel_dims": True}, "kv_budget and kernel_dims"),
        ("llama", {"profile": "deepseek_v3", "kernel_dims": True, "kv_budget": None}, "nothing would be saved"),
        ("llama", {"profile": None, "kernel_dims": True}, "goes with profile"),
        ("llama", {"profile": "remote", "kernel_dims": True}, "not with remote"),
        ("qwen3", {"profile": "laguna", "target": "gateswa", "kv_budget": None, "gate": "head"}, "holds gate none"),
        pytest.param(
            *("qwen3", {"profile": "lfm3", "target": "gateswa", "kv_budget": None, "gate": "element"}),
            "holds gate none or",
            marks=needs_lfm3,
        ),
        ("qwen3", {"profile": "laguna", "target": "gateswa", "kv_budget": None, "sinks": "keep:4"}, "no sinks keep:4"),
        ("llama", {"profile": "deepseek_v3", "kv_budget": 0.01}, "cached values per token"),
    ],
)
def test_refusals(make: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(attnedit.UsageError, match=message) as caught:
        towards(source(make), **options)
    assert "\n" not in str(caught.value)


def test_float16_is_refused_before_any_work() -> None:
    with pytest.raises(attnedit.UsageError, match="float16"):
        towards(build("llama", dtype=torch.float16), "deepseek_v3")


@pytest.mark.parametrize(
    ("profile", "options"),
    [("laguna", {}), pytest.param("lfm3", {"gate": "head"}, marks=needs_lfm3), ("native", {})],
)
def test_window_profiles_choose_what_their_class_has(profile: str, options: dict[str, Any], tmp_path: Path) -> None:
    result = towards(source("qwen3"), profile, None, target="gateswa", window=6, full_layers=1, **options)
    windowed = [site for site in sites(result) if site["kind"] == "gateswa"]
    assert windowed
    assert all(site["sink_tokens"] == 0 and site["gate"] == options.get("gate", "none") for site in windowed)
    check_export(result, tmp_path / "out")


def test_a_profile_for_any_result_asks_for_nothing() -> None:
    result = towards(source("llama"), "remote")
    assert not any(site["linear"] for site in sites(result))
    assert deviation(logits(result.model, IDS), logits(compile_tiny(source("llama"), 0.5).model, IDS)) == 0


def test_an_explicit_profile_counts_first(tmp_path: Path) -> None:
    result = towards(source("llama"), "deepseek_v3")
    model = SimpleNamespace(model=result.model, tokenizer=None, report=result.report)
    assert export(model, tmp_path / "out", profile="youtu").architecture == "YoutuForCausalLM"


def test_command_line(tmp_path: Path, capsys: Captured) -> None:
    save(make_llama(), tmp_path / "source")
    data = tmp_path / "notes.txt"
    data.write_text("One and two are three. " * 400)
    arguments = ["--profile", "deepseek_v3", "--calibration", data, "--calibration-tokens", "2048"]
    report = answer(capsys, "compile", tmp_path / "source", *arguments, "-o", tmp_path / "mla")
    assert report["recipe"]["profile"] == "deepseek_v3"
    told = answer(capsys, "export", tmp_path / "mla", "--to", "hf", "-o", tmp_path / "out")
    assert max(check["deviation"] for check in told["checks"]) < 1e-5
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "deepseek_v3"
    recipe = tmp_path / "mla" / "attnedit-recipe.yaml"
    again = answer(capsys, "compile", "--recipe", recipe, "-o", tmp_path / "again")
    assert again["recipe"] == report["recipe"]
    for extra, message in ((["--profile", "x"], "'x' is not known"), (["--kernel-dims"], "kernel_dims goes with")):
        assert message in refusal(capsys, "compile", tmp_path / "source", *extra, "-o", tmp_path / "other")

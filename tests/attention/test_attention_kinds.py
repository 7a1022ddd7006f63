"""A kind of attention that another package brings, through its entry point alone: all that ours have, it has."""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import Captured, answer, refusal
from families import build
from project import ROOT
from transformers import PreTrainedModel

import attnedit
from attnedit.targets.attention import config, cost
from attnedit.targets.attention.kinds import KINDS
from attnedit.testing import check_decode, check_exact, check_saved, deviation, logits, refused, same_weights, tokens

FOLDER = ROOT / "examples" / "grouped_latent_attention"
DATA = tokens(6, 48)


@pytest.fixture(autouse=True)
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind of an editable install: the folder on the path, and the package's metadata."""
    project: dict[str, Any] = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site-packages" / "attnedit_gla-0.1.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: 0.1.0\n")
    points = project["entry-points"]["attnedit.targets"]
    lines = [f"{name} = {place}" for name, place in points.items()]
    (metadata / "entry_points.txt").write_text("\n".join(["[attnedit.targets]", *lines, ""]))
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.syspath_prepend(str(metadata.parent))
    importlib.invalidate_caches()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_the_whole_budget_loses_nothing(family: str) -> None:
    source = build(family)
    result = attnedit.compile(source, "gla", kv_budget=1.0)
    check_exact(result, source)
    check_decode(result)
    assert result.report.rules[0].contract == "close"
    assert result.report.kv_budget_achieved == 1.0


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_a_budget_is_kept_and_the_report_shows_it(family: str, tmp_path: Path) -> None:
    source = build(family)
    result = attnedit.compile(source, "gla", kv_budget=0.5, calibration=DATA)
    report = result.report
    changed = [row for row in report.layers if row.kind == "gla"]
    assert changed
    assert all(row.values_after == (row.kv_lora_rank or 0) + (row.qk_rope_head_dim or 0) for row in changed)
    assert report.kv_budget_achieved <= 0.5 + 1e-9
    assert {row.figures["latent_groups"] for row in changed} == {2}
    assert all(row.output_error is not None and row.output_error < 0.7 for row in changed)
    assert set(report.columns()["latent groups"]) - {"-"} == {"2"}
    assert report.kv_curve is not None
    assert report.kv_curve.after[-1] < report.kv_curve.before[-1]
    check_decode(result)
    loaded = check_saved(result, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "config.json").read_text())["attnedit"]["sites"]
    assert {values["kind"] for values in record.values()} == {"gla"}
    assert "grouped latent attention (GLA)" in (tmp_path / "out" / "README.md").read_text()
    ids = tokens(1, 6)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded.model.generate(ids, **options), result.model.generate(ids, **options))


def test_more_cache_loses_less_and_fitting_helps() -> None:
    source, ids = build("qwen3"), tokens(2, 24, seed=9)
    expected = logits(source, ids)
    errors = [
        deviation(logits(attnedit.compile(source, "gla", kv_budget=b, calibration=DATA).model, ids), expected)
        for b in (0.25, 0.75)
    ]
    assert errors[1] < errors[0]
    quick = attnedit.compile(source, "gla", kv_budget=0.4, calibration=DATA, alternations=0)
    fitted = attnedit.compile(source, "gla", kv_budget=0.4, calibration=DATA, alternations=2)
    assert sum(row.output_error or 0 for row in fitted.report.layers) < sum(
        row.output_error or 0 for row in quick.report.layers
    )


def test_a_head_sees_the_latent_of_its_own_group_alone() -> None:
    result = attnedit.compile(build("llama"), "gla", kv_budget=0.5, calibration=DATA)
    module: Any = result.model.get_submodule("model.layers.0.self_attn.gla")
    config = module.config
    query, kv = torch.randn(1, config.num_attention_heads, 5, config.head_dim), torch.randn(1, 5, config.input_size)
    cos, sin = torch.ones(2, 5, max(config.rope_columns) + 1)
    before = module(query, kv, cos, sin)
    with torch.no_grad():
        module.kv_a_proj_with_mqa.weight[: config.ranks[0]] += 1
    after = module(query, kv, cos, sin)
    heads = config.num_attention_heads // 2
    assert not torch.allclose(after[:, :, :heads], before[:, :, :heads])
    assert torch.equal(after[:, :, heads:], before[:, :, heads:])


def test_loss_allocation_windows_and_training() -> None:
    source = build("llama")
    loss = attnedit.compile(source, "gla", kv_budget=0.25, allocation="loss", calibration=DATA)
    assert all(row.loss_increase is not None for row in loss.report.layers)
    assert loss.report.recipe["target"] == "gla"
    both = attnedit.compile(source, "gateswa+gla", window=8, full_layers=[1], calibration=DATA, distill_steps=2)
    assert [row.kind for row in both.report.layers] == ["gateswa", "gla"]
    assert [rule.name for rule in both.report.rules] == ["gateswa", "gla"]
    check_decode(both)


def test_layer_by_layer_gives_the_same(tmp_path: Path) -> None:
    source = build("qwen3")
    source.save_pretrained(tmp_path / "source")
    options: dict[str, Any] = {"kv_budget": 0.5, "calibration": DATA, "alternations": 1}
    expected = attnedit.compile(source, "gla", **options)
    report = attnedit.compile_checkpoint(tmp_path / "source", tmp_path / "out", "gla", **options)
    found = attnedit.load(tmp_path / "out")
    for name, value in expected.model.state_dict().items():
        assert torch.allclose(found.model.state_dict()[name], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))
    assert [row.kind for row in report.layers] == [row.kind for row in expected.report.layers]
    assert "only mla, gateswa, gateswa+mla and other targets with a budget" in refused_rewrites(tmp_path)


def refused_rewrites(tmp_path: Path) -> str:
    target = attnedit.Target("nothing", [attnedit.Rewrite()])
    with pytest.raises(attnedit.UsageError) as caught:
        attnedit.compile_checkpoint(tmp_path / "source", tmp_path / "other", target)  # type: ignore[arg-type]
    return str(caught.value)


def test_the_command_line_knows_it(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    data = ("--calibration", text_file, "--calibration-tokens", "512", "--alternations", "1")
    found = answer(capsys, "compile", saved_llama, "--target", "gla", "--kv-budget", "0.5", *data, "-o", out)
    assert found["target"] == "gla"
    explained = answer(capsys, "compile", saved_llama, "--target", "gla", "--explain", "-o", out)
    assert [each["stage"] for each in explained["stages"]][2:5] == ["data", "allocation", "fit"]
    again = answer(capsys, "compile", saved_llama, "--recipe", out / "attnedit-recipe.yaml", "-o", tmp_path / "again")
    assert again["kv_budget_achieved"] == found["kv_budget_achieved"]
    asked = ("compile", saved_llama, "--target", "gla", "-o", tmp_path / "other")
    assert "window is for the targets gateswa and gateswa+mla, not for gla" in refusal(capsys, *asked, "--window", "8")
    profile = refusal(capsys, *asked, "--profile", "deepseek_v3")
    assert "profile is for the targets mla, gateswa and gateswa+mla, not for gla" in profile
    assert "no target 'gla+gla'" in refusal(capsys, "compile", saved_llama, "--target", "gla+gla", "-o", tmp_path / "x")


def test_near_misses_say_why_a_layer_stays() -> None:
    from attnedit_gla import GroupedLatentTarget

    source = build("llama")
    with refused("cannot change: 2 key/value heads, which do not divide into 3 groups", source):
        attnedit.compile(source, GroupedLatentTarget(3), calibration=DATA)
    with refused("groups must be at least 2"):
        GroupedLatentTarget(1)


def test_a_result_says_what_it_needs_to_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attnedit.compile(build("llama"), "gla", kv_budget=1.0).save(tmp_path / "out")
    kinds: Any = importlib.import_module("attnedit.targets.attention.kinds")
    monkeypatch.setattr(kinds, "_OTHERS", {})
    monkeypatch.setattr(sys, "path", [place for place in sys.path if "site-packages" not in place or ".venv" in place])
    importlib.invalidate_caches()
    with refused("attention of kind 'gla' is not known"):
        attnedit.load(tmp_path / "out")


def test_what_knows_its_own_attention_alone_refuses_it_in_a_line(tmp_path: Path) -> None:
    limits: Any = importlib.import_module("attnedit.targets.runtime.vllm.limits")
    result = attnedit.compile(build("qwen3"), "gla", kv_budget=0.5, calibration=DATA, alternations=0)
    asked: list[tuple[str, dict[str, Any], str]] = [
        (
            "hf",
            {"profile": "deepseek_v3"},
            "is grouped latent attention (GLA), which profile deepseek_v3 does not have",
        ),
        ("gguf", {}, "is grouped latent attention (GLA), which llama.cpp does not have; save the result instead"),
        ("onnx", {"flavor": "genai"}, "keys and values of one size, and grouped latent attention (GLA) caches"),
    ]
    for runtime, options, words in asked:
        with refused(words, result.model):
            result.export(runtime, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
    with refused("grouped latent attention (GLA) of another package, which the plugin does not know"):
        limits.check(result.model.config, limits.Settings())


def test_a_cache_of_its_own_is_not_traced(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    result = attnedit.compile(build("llama"), "gla", kv_budget=0.5, calibration=DATA, alternations=0)
    module = importlib.import_module("attnedit_gla")
    monkeypatch.setattr(module.GroupedLatent, "bind_cache", lambda self, cache: None, raising=False)
    for runtime in ("onnx", "npu"):
        with refused("keeps a cache of its own and has no lowering to " + runtime, result.model):
            result.export(runtime, tmp_path / "out")


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_onnx_by_the_default_lowering(cache: str, tmp_path: Path) -> None:
    result = attnedit.compile(build("qwen3"), "gla", kv_budget=0.5, calibration=DATA, alternations=0)
    manifest: Any = result.export("onnx", tmp_path / "onnx", cache=cache)
    assert manifest.checks
    assert max(check["deviation"] for check in manifest.checks) < 1e-3


def test_npu_by_the_default_lowering(tmp_path: Path) -> None:
    result = attnedit.compile(build("qwen3"), "gla", kv_budget=0.5, calibration=DATA, alternations=0)
    manifest: Any = result.export("npu", tmp_path / "npu", capacity=256)
    reasons = {decision["reason"] for decision in manifest.decisions}
    assert any("no lowering to this chip" in reason for reason in reasons)
    assert max(check["deviation"] for check in manifest.checks) < 1e-3


def test_a_checkpoint_with_code_of_its_own_carries_the_package(tmp_path: Path) -> None:
    result = attnedit.compile(build("llama"), "gla", kv_budget=0.5, calibration=DATA, alternations=0)
    result.export("hf", tmp_path / "hf", profile="remote")
    code = (tmp_path / "hf" / "attnedit_attnedit_gla_module.py").read_text()
    assert "from attnedit_gla" not in code.replace("from .attnedit_attnedit_gla", "")
    again: PreTrainedModel = attnedit.load(tmp_path / "hf").model
    assert same_weights(again, result.model)


def test_a_kind_has_a_name_of_its_own() -> None:
    from attnedit_gla import KIND, GroupedLatentTarget

    target = GroupedLatentTarget()
    target.kind = dataclasses.replace(KIND, name="mla")
    with refused("there is an attention of kind 'mla' already"):
        attnedit.compile(build("llama"), target, kv_budget=1.0)
    target.kind = dataclasses.replace(KIND, name="gla2")
    result = attnedit.compile(build("llama"), target, kv_budget=1.0)
    assert "no package registers grouped latent attention (GLA) as 'gla2'" in " ".join(result.report.notes)


def test_names_of_earlier_versions_are_found_where_they_were() -> None:
    assert config.MLAConfig is KINDS["mla"].config
    assert cost.gateswa_values(KINDS["gateswa"].config(0, 9, 3, 64, 64, 576, 128, 0.125)) == 384
    with pytest.raises(AttributeError, match="no attribute 'Unknown'"):
        config.Unknown  # noqa: B018

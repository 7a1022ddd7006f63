"""The pipeline as a list of stages: shown before any work, and in the report with what each did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Captured, answer
from examples import EXAMPLES

import attnedit
from attnedit._pipeline import every_stage, explained, stages_of
from attnedit._stages import Job, Stage
from attnedit.cli import main
from attnedit.compiler.reporting.records import PipelineStage
from attnedit.options import CompileOptions
from attnedit.testing import tiny_model, tokens

CASES: dict[str, dict[str, Any]] = {
    "mla": {"allocation": "loss"},
    "gateswa+mla": {"window": 4, "full_layers": 1},
    "exact": {"target": "mla", "kv_budget": 1.0},
    "trained": {"target": "mla", "distill_steps": 2, "batch_size": 2, "seq_len": 16, "verify": False},
}


@pytest.mark.parametrize("case", CASES)
def test_the_report_has_the_stages_that_were_announced(case: str) -> None:
    options = {"target": case, "calibration": tokens(6, 32), "alternations": 0, **CASES[case]}
    result = attnedit.compile(tiny_model(), **options)
    announced = [each["stage"] for each in explained(CompileOptions.of(**options))]
    entries = result.report.pipeline
    assert [entry.name for entry in entries] == [name for name in announced if name not in _idle(case)]
    assert all(entry.did and entry.seconds > 0 for entry in entries)
    checked = {entry.name: entry.checked for entry in entries}
    assert len(checked.get("verify", [])) == {"exact": 2, "trained": 0}.get(case, 1)
    assert all("allowed" in line for lines in checked.values() for line in lines)
    assert attnedit.Report.from_json(result.report.to_json()).pipeline == entries


def _idle(case: str) -> list[str]:
    return ["data"] if case == "exact" else []


def test_rewrites_have_stages_too() -> None:
    result = attnedit.rewrite(tiny_model(), EXAMPLES["HeadGate"]()())
    ran = [entry.name for entry in result.report.pipeline]
    assert ran == ["load", "capture", "rewrite", "reference", "lower", "verify"]
    assert "HeadGate: 2 of 2 matches" in result.report.pipeline[2].did
    target = attnedit.Target("gated", (EXAMPLES["HeadGate"]()(),))
    assert [each["stage"] for each in explained(CompileOptions.of(target=target))] == ran


@pytest.mark.parametrize("parts", [False, True], ids=["live", "layer by layer"])
def test_the_list_that_runs_is_the_list_explained(
    parts: bool, saved_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage put into the list is explained, runs in its place, and is reported; one taken out does neither."""
    seen: list[int] = []

    def count(job: Job, entry: PipelineStage) -> None:
        seen.append(len(job.sites))
        entry.did = "counted"

    def other(options: CompileOptions, parts: bool) -> list[Stage]:
        first, *rest = (each for each in every_stage(options, parts) if each.name != "verify")
        return [first, rest[0], rest[1], Stage("count", "count the sites", ("seed",), count), *rest[2:]]

    monkeypatch.setattr("attnedit._pipeline.every_stage", other)
    asked: dict[str, Any] = {"target": "gateswa", "window": 4, "full_layers": "0,", "calibration": tokens(6, 32)}
    options = CompileOptions.of(**asked)
    names = [each.name for each in stages_of(options, parts=parts)]
    assert [each["stage"] for each in explained(options, parts=parts)] == names
    if parts:
        report = attnedit.compile_checkpoint(saved_llama, tmp_path / "out", **asked)
        names.remove("reference")  # what is read layer by layer is run for what must stay the same only
    else:
        report = attnedit.compile(tiny_model(), **asked).report
    assert [entry.name for entry in report.pipeline] == names
    assert names[3] == "count"
    assert seen == [2]
    assert not any(entry.checked for entry in report.pipeline)


def test_every_option_is_shown_with_its_value() -> None:
    shown: dict[str, Any] = {}
    for target in ("gateswa+mla", attnedit.Target("gated", (EXAMPLES["HeadGate"]()(),))):
        for each in explained(CompileOptions.of(target=target, fit_steps=3)):
            shown |= each["options"]
    assert shown["fit_steps"] == 3
    everything = set(CompileOptions.model_fields) - {"tokenizer", "processor", "progress"}
    assert set(shown) == everything
    stages = every_stage(CompileOptions.of(), parts=False)
    assert {name for stage in stages for name in stage.options} <= set(CompileOptions.model_fields)


def test_explain_does_nothing_else(tmp_path: Path, capsys: Captured) -> None:
    asked = ["compile", "nowhere", "--window", "64", "--target", "gateswa", "--full-layers", "1,", "--explain"]
    stages = answer(capsys, *asked, "-o", tmp_path / "out")["stages"]
    assert [each["stage"] for each in stages] == ["load", "capture", "data", "windows", "reference", "lower", "verify"]
    assert stages[3]["options"]["window"] == 64
    parts = answer(capsys, *asked, "--low-memory", "-o", tmp_path / "out")["stages"]
    assert [each["stage"] for each in parts] == ["load", "capture", "data", "fit", "reference", "lower", "verify"]
    assert main([*asked, "-o", str(tmp_path / "out")]) == 0
    assert "window: 64" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

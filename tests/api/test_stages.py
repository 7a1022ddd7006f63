"""The pipeline as a list of stages: shown before any work, and in the report with what each did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from commands import Captured, answer
from examples import EXAMPLES

import attnedit
from attnedit._stages import STAGES, stages_of
from attnedit.cli import main
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
    announced = [each["stage"] for each in stages_of(CompileOptions.of(**options))]
    entries = result.report.pipeline
    assert [entry.name for entry in entries] == [name for name in announced if name not in ("load", *_idle(case))]
    assert all(entry.did and entry.seconds > 0 for entry in entries)
    checked = {entry.name: entry.checked for entry in entries}
    assert len(checked.get("verify", [])) == {"exact": 2, "trained": 0}.get(case, 1)
    assert all("allowed" in line for lines in checked.values() for line in lines)
    assert attnedit.Report.from_json(result.report.to_json()).pipeline == entries


def _idle(case: str) -> list[str]:
    return ["data"] if case == "exact" else []


def test_rewrites_have_stages_too() -> None:
    result = attnedit.rewrite(tiny_model(), EXAMPLES["HeadGate"]()())
    assert [entry.name for entry in result.report.pipeline] == ["capture", "rewrite", "lower", "verify"]
    assert "HeadGate: 2 of 2 matches" in result.report.pipeline[1].did
    target = attnedit.Target("gated", (EXAMPLES["HeadGate"]()(),))
    announced = [each["stage"] for each in stages_of(CompileOptions.of(target=target))]
    assert announced == ["load", "capture", "rewrite", "lower", "verify"]


def test_every_option_is_shown_with_its_value() -> None:
    shown: dict[str, Any] = {}
    for target in ("gateswa+mla", attnedit.Target("gated", (EXAMPLES["HeadGate"]()(),))):
        for each in stages_of(CompileOptions.of(target=target, fit_steps=3)):
            shown |= each["options"]
    assert shown["fit_steps"] == 3
    everything = set(CompileOptions.model_fields) - {"tokenizer", "processor", "progress"}
    assert set(shown) == everything
    assert {name for stage in STAGES for name in stage.options} <= set(CompileOptions.model_fields)


def test_explain_does_nothing_else(tmp_path: Path, capsys: Captured) -> None:
    asked = ["compile", "nowhere", "--window", "64", "--target", "gateswa", "--full-layers", "1,", "--explain"]
    stages = answer(capsys, *asked, "-o", tmp_path / "out")["stages"]
    assert [each["stage"] for each in stages] == ["load", "capture", "data", "windows", "lower", "verify"]
    assert stages[3]["options"]["window"] == 64
    parts = answer(capsys, *asked, "--low-memory", "-o", tmp_path / "out")["stages"]
    assert [each["stage"] for each in parts] == ["load", "capture", "data", "fit", "lower", "verify"]
    assert main([*asked, "-o", str(tmp_path / "out")]) == 0
    assert "window: 64" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()

"""What is written names its format: another one is refused where it is read, and what was saved before still loads."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from compiled import half
from project import ROOT
from safetensors.torch import load_file, save_file

import attnedit
from attnedit import layerwise, run_directory
from attnedit.cli import main, sweep
from attnedit.compiler.errors import UsageError
from attnedit.compiler.formats import own_version
from attnedit.compiler.reporting import report
from attnedit.layerwise import Rewritten
from attnedit.passes.calibration import journal
from attnedit.passes.calibration.journal import STATE_FILE, Journal
from attnedit.recipe import RECIPE_FILE, Recipe
from attnedit.run_directory import check_run, open_run
from attnedit.targets.runtime.eager import classes
from attnedit.targets.runtime.eager.checkpoint import REPORT_FILE, RUN_FILE
from attnedit.targets.runtime.npu import run_npu
from attnedit.targets.runtime.npu.run_npu import NpuModel
from attnedit.targets.runtime.onnx import manifest
from attnedit.targets.runtime.onnx.manifest import MANIFEST_FILE
from attnedit.targets.runtime.onnx.manifest import Manifest as OnnxManifest
from attnedit.testing import deviation, logits

SAVED = Path(__file__).parent / "saved"
"""A result of each version that ever wrote another form: files as they were, and logits [B, T, V] for ids [B, T]."""
OTHER = "format 2, this version of attnedit reads 1; use the version that wrote it"


def changed(file: Path, version: int | None) -> None:
    """A file of JSON with another format, or of a time before formats."""
    values = json.loads(file.read_text())
    assert values.pop("format_version") == 1
    file.write_text(json.dumps(values if version is None else {"format_version": version, **values}))


def test_reports(tmp_path: Path) -> None:
    result = half("llama")
    assert result.report.attnedit_version == own_version()
    file = result.save(tmp_path / "out") / REPORT_FILE
    changed(file, 2)
    with pytest.raises(UsageError, match=OTHER):
        attnedit.load(tmp_path / "out")
    changed_back = json.loads(file.read_text()) | {"format_version": 1}
    file.write_text(json.dumps(changed_back))
    changed(file, None)
    values = json.loads(file.read_text())
    del values["attnedit_version"]
    file.write_text(json.dumps(values))
    older = attnedit.load(tmp_path / "out").report
    assert (older.format_version, older.attnedit_version) == (1, "")
    assert older.layers == result.report.layers


def test_unfinished_runs(tmp_path: Path) -> None:
    open_run(tmp_path / "out", {"seed": 3}, overwrite=False)
    file = tmp_path / "out" / RUN_FILE
    assert check_run(tmp_path / "out", {"seed": 3}, overwrite=False)
    changed(file, 2)
    with pytest.raises(UsageError, match=OTHER):
        check_run(tmp_path / "out", {"seed": 3}, overwrite=False)
    file.write_text(json.dumps({"recipe": {"seed": 3}}))
    assert check_run(tmp_path / "out", {"seed": 3}, overwrite=False)


def test_runs_layer_by_layer(tmp_path: Path) -> None:
    hidden = torch.ones(2, 3)
    Rewritten(done=2, seconds=1.5, hidden=[hidden]).save(tmp_path)
    again = Rewritten.load(tmp_path)
    assert (again.done, again.seconds) == (2, 1.5)
    assert again.hidden is not None
    assert torch.equal(again.hidden[0], hidden)
    state = {"done": 2, "configs": {}}
    save_file({}, tmp_path / "layers.safetensors", metadata={"state": json.dumps(state)})
    assert Rewritten.load(tmp_path).done == 2
    save_file({}, tmp_path / "layers.safetensors", metadata={"state": json.dumps({"format_version": 2, **state})})
    with pytest.raises(UsageError, match=OTHER):
        Rewritten.load(tmp_path)


def test_checkpoints_of_training(tmp_path: Path) -> None:
    Journal(tmp_path).checkpoint({"name": "fit", "step": 4}, {}, {}, None, {})
    saved = torch.load(tmp_path / STATE_FILE, weights_only=True)
    assert saved.pop("format_version") == 1
    for stages in (saved, {"format_version": 1, **saved}):
        torch.save(stages, tmp_path / STATE_FILE)
        found = Journal(tmp_path).resume("fit")
        assert found is not None
        assert found["state"]["step"] == 4
    torch.save({"format_version": 2, **saved}, tmp_path / STATE_FILE)
    with pytest.raises(UsageError, match=OTHER):
        Journal(tmp_path)


def test_exports(tmp_path: Path) -> None:
    (tmp_path / MANIFEST_FILE).write_text(json.dumps({"format_version": 2}))
    with pytest.raises(UsageError, match=OTHER):
        OnnxManifest.read(tmp_path)
    (tmp_path / "attnedit-npu.json").write_text(json.dumps({"format_version": 2}))
    with pytest.raises(ValueError, match="has format 2, this script reads 1"):
        NpuModel.load(tmp_path)


@pytest.mark.parametrize("version", [folder.name for folder in SAVED.iterdir()])
def test_what_earlier_versions_saved_still_loads(version: str) -> None:
    result = attnedit.load(SAVED / version)
    expected = load_file(SAVED / version / "expected.safetensors")
    assert deviation(logits(result.model, expected["ids"]), expected["logits"]) < 1e-5
    assert [layer.kind for layer in result.report.layers] == ["gateswa", "mla"]
    assert Recipe.load(SAVED / version / "attnedit-recipe.yaml").target == "gateswa+mla"


def test_the_page_names_the_versions_of_today() -> None:
    text = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"^\| `([\w./-]+)` \| [^|]+ \| (\d+) \|$", text, re.MULTILINE))
    assert {name: int(version) for name, version in found.items()} == {
        "config.json": classes.FORMAT_VERSION,
        REPORT_FILE: report.FORMAT_VERSION,
        RECIPE_FILE: Recipe().format,
        RUN_FILE: run_directory.FORMAT_VERSION,
        "run/layers.safetensors": layerwise.FORMAT_VERSION,
        STATE_FILE: journal.FORMAT_VERSION,
        "sweep.json": sweep.FORMAT_VERSION,
        MANIFEST_FILE: manifest.FORMAT_VERSION,
        run_npu.MANIFEST_FILE: run_npu.FORMAT_VERSION,
    }


def test_the_command_line_says_its_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"attnedit {own_version()}\n"

"""A package of somebody else adds a target, a pass and a runtime; nothing of ours is edited."""

from __future__ import annotations

import copy
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Captured, answer, refusal
from compiled import logits, tokens
from tiny_llama import make_llama
from transformers import PreTrainedModel

import attnedit
from attnedit.result import find_runtime

CODE = '''
import dataclasses
from pathlib import Path

import torch

import attnedit
from attnedit import Rewrite, attention


@dataclasses.dataclass
class Damped(Rewrite):
    """Every attention output times a number."""

    factor: float = 0.5

    def pattern(self, query_BHTd, key_BGTd, value_BGTv):
        return attention(query_BHTd, key_BGTd, value_BGTv)

    def replacement(self, match, query_BHTd, key_BGTd, value_BGTv):
        return attention(query_BHTd, key_BGTd, value_BGTv) * self.factor


class Swapped(Rewrite):
    """The same, computed from keys and values that were put into one tensor and taken apart again."""

    contract = attnedit.exact

    def pattern(self, query_BHTd, key_BGTd, value_BGTv):
        return attention(query_BHTd, key_BGTd, value_BGTv)

    def replacement(self, match, query_BHTd, key_BGTd, value_BGTv):
        key, value = torch.cat((key_BGTd, value_BGTv), dim=-1).split((key_BGTd.shape[-1], value_BGTv.shape[-1]), -1)
        return attention(query_BHTd, key, value)


DAMPED = attnedit.Target("damped", [Damped(0.25)], "attention, quietly")


def list_weights(result, directory, *, progress=None):
    Path(directory).mkdir(parents=True)
    lines = [f"{name} {list(value.shape)}" for name, value in result.model.state_dict().items()]
    (Path(directory) / "weights.txt").write_text("\\n".join(lines))
'''
ENTRY_POINTS = """
[attnedit.targets]
damped = damping:DAMPED
[attnedit.passes]
swapped = damping:Swapped
[attnedit.runtimes]
listing = damping:list_weights
"""


def install(directory: Path, name: str, code: str, entry_points: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What pip leaves behind of a package: its module, and its metadata."""
    (directory / f"{name}.py").write_text(code, encoding="utf-8")
    metadata = directory / f"{name}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n", encoding="utf-8")
    (metadata / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    monkeypatch.syspath_prepend(directory)
    monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()


@pytest.fixture
def damping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    place = tmp_path / "site-packages"
    place.mkdir()
    install(place, "damping", CODE, ENTRY_POINTS, monkeypatch)
    return place


@pytest.mark.usefixtures("damping")
def test_a_target_a_pass_and_a_runtime_of_another_package(saved_llama: Path, tmp_path: Path, capsys: Captured) -> None:
    out = tmp_path / "out"
    found = answer(capsys, "compile", saved_llama, "--target", "swapped+damped", "-o", out)
    assert [(rule["name"], rule["matched"], rule["rewritten"]) for rule in found["rules"]] == [
        ("Swapped", 2, 2),
        ("Damped", 2, 2),
    ]
    assert found["target"] == "Swapped+Damped"
    record = json.loads((out / "config.json").read_text())["attnedit"]["sites"]["model.layers.0.self_attn"]
    assert [entry["rewrite"] for entry in record["rewrites"]] == ["damping:Swapped", "damping:Damped"]
    assert record["rewrites"][1]["options"] == {"factor": 0.25}
    again = answer(capsys, "compile", saved_llama, "--recipe", out / "attnedit-recipe.yaml", "-o", tmp_path / "again")
    assert again["rules"][1]["rewritten"] == 2
    assert (
        "has rewritten the attention of tiny-llama in this model: Swapped and Damped."
        in (out / "README.md").read_text()
    )
    assert "give the model that it came from" in refusal(capsys, "inspect", out)
    answer(capsys, "export", out, "--to", "listing", "-o", tmp_path / "listing")
    assert "model.layers.0.self_attn.q_proj.weight [64, 64]" in (tmp_path / "listing" / "weights.txt").read_text()
    assert "has no option --opset" in refusal(
        capsys, "export", out, "--to", "listing", "--opset", "20", "-o", tmp_path / "other"
    )
    assert "kv_budget is for the targets mla" in refusal(
        capsys, "compile", saved_llama, "--target", "damped", "--kv-budget", "0.5", "-o", tmp_path / "other"
    )
    assert "window is for the targets gateswa" in refusal(
        capsys, "compile", saved_llama, "--target", "damped", "--window", "8", "-o", tmp_path / "other"
    )
    assert "there is mla, gateswa, gateswa+mla, damped, swapped" in refusal(
        capsys, "compile", saved_llama, "--target", "damp", "-o", tmp_path / "other"
    )
    assert "no target 'mla+damped'" in refusal(
        capsys, "compile", saved_llama, "--target", "mla+damped", "-o", tmp_path / "other"
    )


IGNORED: list[tuple[dict[str, Any], str]] = [
    ({"kv_budget": 0.25}, "kv_budget is for the targets mla, gateswa and gateswa+mla, not for {}"),
    ({"window": 8}, "window is for the targets gateswa and gateswa+mla, not for {}"),
    ({"full_layers": 1}, "full_layers is for the targets gateswa"),
    ({"gate": "head"}, "gate is for the targets gateswa"),
    ({"sinks": "none"}, "sinks is for the targets gateswa"),
    ({"profile": "deepseek_v3"}, "profile is for the targets mla"),
    ({"kernel_dims": True}, "kernel_dims is for the targets mla"),
    ({"allocation": "loss"}, "allocation is for the targets mla"),
    ({"alternations": 1}, "alternations is for the targets mla"),
]


@pytest.mark.usefixtures("damping")
@pytest.mark.parametrize(("options", "message"), IGNORED, ids=[next(iter(options)) for options, _ in IGNORED])
def test_options_that_a_target_of_others_does_not_read_are_refused(
    options: dict[str, Any], message: str, llama: PreTrainedModel
) -> None:
    damping = importlib.import_module("damping")
    for target, name in ((damping.DAMPED, "damped"), ("damped", "damped"), ("swapped+damped", "swapped+damped")):
        with pytest.raises(attnedit.UsageError) as caught:
            attnedit.compile(llama, target, **options)
        assert message.format(name) in str(caught.value)
    # A Target is no target of ours, even by a name of ours.
    with pytest.raises(attnedit.UsageError, match=next(iter(options))):
        attnedit.compile(llama, attnedit.Target("mla", damping.DAMPED.rewrites, ""), **options)


@pytest.mark.usefixtures("damping")
def test_in_place_holds_for_a_target_of_others(llama: PreTrainedModel) -> None:
    damping = importlib.import_module("damping")
    ids = tokens(1, 7)
    expected = attnedit.compile(llama, damping.DAMPED)
    assert expected.model is not llama
    for target in (damping.DAMPED, "damped"):
        model = copy.deepcopy(llama)
        result = attnedit.compile(model, target, in_place=True)
        assert result.model is model
        assert torch.equal(result.model(ids).logits, expected.model(ids).logits)


@pytest.mark.usefixtures("damping")
def test_a_sweep_checks_its_smallest_budget_with_the_targets_own_plan(
    saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    asked = ("--text", text_file, "--calibration", text_file, "-o", tmp_path / "out", "--kv-budgets", "0.5,0.01")
    for target, message in (
        ("gateswa", "with a window in every layer that can have one the cache still needs"),
        ("gateswa+mla", "other layers and one slot per latent layer need"),
        ("damped", "kv_budget is for the targets mla"),
    ):
        # Said before anything is measured.
        with mock.patch.object(importlib.import_module("attnedit.cli.sweep"), "measure", side_effect=AssertionError):
            assert message in refusal(capsys, "sweep", saved_llama, "--target", target, *asked)


@pytest.mark.long
@pytest.mark.usefixtures("damping")
def test_names_and_target_objects_in_python(llama: torch.nn.Module) -> None:
    damping = importlib.import_module("damping")
    ids = tokens(1, 7)
    results = [
        attnedit.rewrite(llama, "damped"),  # type: ignore[arg-type]
        attnedit.rewrite(llama, damping.DAMPED),  # type: ignore[arg-type]
        attnedit.rewrite(llama, ["damped"]),  # type: ignore[arg-type]
        attnedit.compile(llama, damping.DAMPED),  # type: ignore[arg-type]
        attnedit.rewrite(llama, damping.Damped(0.25)),  # type: ignore[arg-type]
    ]
    assert all(torch.equal(logits(result.model, ids), logits(results[0].model, ids)) for result in results)
    with pytest.raises(attnedit.UsageError, match=r"no target 'dumped'; there is mla, .*damped, swapped"):
        attnedit.rewrite(llama, "dumped")  # type: ignore[arg-type]
    with pytest.raises(attnedit.UsageError, match=r"mla is made by attnedit.compile"):
        attnedit.rewrite(llama, "mla")  # type: ignore[arg-type]


def test_without_the_package_a_result_is_refused_in_one_line(
    damping: Path, saved_llama: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(capsys, "compile", saved_llama, "--target", "damped", "-o", tmp_path / "out")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(damping)])
    monkeypatch.delitem(sys.modules, "damping")
    with pytest.raises(attnedit.UsageError, match=r"was rewritten by damping:Damped, which cannot be imported"):
        attnedit.load(tmp_path / "out")
    line = refusal(capsys, "generate", tmp_path / "out", "--prompt", "x")
    assert "damping:Damped, which cannot be imported (No module named 'damping'); install the package" in line


@pytest.fixture(scope="module")
def damped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved result of the target; tests copy it."""
    place = tmp_path_factory.mktemp("damped")
    with pytest.MonkeyPatch.context() as patch:
        install(place, "damping", CODE, ENTRY_POINTS, patch)
        attnedit.rewrite(make_llama(), "damped").save(place / "out")
        patch.delitem(sys.modules, "damping")
    return place / "out"


@pytest.mark.usefixtures("damping")
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"rewrite": "subprocess:Popen"},
            "names the rewrite subprocess:Popen, which is no subclass of attnedit.Rewrite",
        ),
        ({"rewrite": "attnedit:rewrite"}, "which is no subclass of attnedit.Rewrite"),
        ({"rewrite": "damping:Gone"}, "damping:Gone, which cannot be imported"),
        ({"rewrite": "nonsense"}, "cannot be imported"),
        ({"options": {"size": 1}}, "damping:Damped does not take the options"),
        ({"options": []}, "describes no rewrite"),
        ({"decisions": [True, True]}, "matched 2 times when this model was rewritten, 1 times now"),
        ({"rewrite": "__main__:Mine"}, "it was defined in a script or notebook"),
    ],
)
def test_a_damaged_or_hostile_record_is_refused(
    change: dict[str, object], words: str, damped: Path, tmp_path: Path
) -> None:
    shutil.copytree(damped, tmp_path / "out")
    file = tmp_path / "out" / "config.json"
    values = json.loads(file.read_text())
    for site in values["attnedit"]["sites"].values():
        site["rewrites"][0].update(change)
    file.write_text(json.dumps(values))
    with pytest.raises(attnedit.UsageError, match=words) as caught:
        attnedit.load(tmp_path / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("entry_points", "words"),
    [
        (
            "[attnedit.targets]\ndamped = other:X",
            r"attnedit.targets: \w+ registers 'damped' \(.*\), which \w+ has already",
        ),
        ("[attnedit.passes]\nmla = other:X", "registers 'mla' .other:X., which attnedit has already"),
    ],
)
@pytest.mark.usefixtures("damping")
def test_a_name_that_is_taken_is_refused(
    entry_points: str, words: str, llama: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "more").mkdir()
    install(tmp_path / "more", "other", "X = 1", entry_points, monkeypatch)
    with pytest.raises(attnedit.UsageError, match=words):
        attnedit.rewrite(llama, "damped")  # type: ignore[arg-type]


def test_a_runtime_that_takes_our_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path, "other", "def export(): ...", "[attnedit.runtimes]\nonnx = other:export", monkeypatch)
    with pytest.raises(attnedit.UsageError, match=r"registers 'onnx' \(other:export\), which attnedit has already"):
        find_runtime("onnx")


def test_an_entry_point_that_cannot_be_imported_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, llama: torch.nn.Module
) -> None:
    install(tmp_path, "broken", "", "[attnedit.passes]\nbroken = broken:Missing", monkeypatch)
    with pytest.raises(attnedit.UsageError, match=r"pass broken \(broken:Missing, of broken\) cannot be imported"):
        attnedit.rewrite(llama, "broken")  # type: ignore[arg-type]

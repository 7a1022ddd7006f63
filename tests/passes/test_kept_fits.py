"""What fails after the fits keeps them: the same command goes on."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Captured, answer
from safetensors.torch import load_file

from attnedit.cli import main
from attnedit.compiler.errors import VerificationError
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE

COMPILE: Any = importlib.import_module("attnedit._pipeline")
PLACES = {"mla": "attnedit.passes.mla.target.fit_layer", "gateswa": "attnedit.passes.gateswa.target.fit_window"}
OPTIONS = {"mla": [], "gateswa": ["--window", "8", "--full-layers", "0"]}


def command(target: str, model: Path, text: Path, output: Path) -> list[str]:
    asked = ["compile", model, "--target", target, *OPTIONS[target], "--calibration", text, "-o", output]
    return [*map(str, asked), "--calibration-tokens", "512", "--alternations", "1"]


@pytest.mark.parametrize("target", PLACES)
def test_what_fails_after_the_fits_keeps_them(
    target: str, saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    answer(capsys, *command(target, saved_llama, text_file, tmp_path / "whole"))
    asked = command(target, saved_llama, text_file, tmp_path / "out")
    with mock.patch.object(COMPILE, "same_decode", side_effect=VerificationError("it differs")):
        assert main(asked) == 1
    assert (tmp_path / "out" / RUN_FILE).exists()
    assert len(list((tmp_path / "out" / "fits").iterdir())) == 2
    assert main([*asked, "--seed", "1"]) == 2
    assert "unfinished run of another recipe (seed" in capsys.readouterr().err
    with mock.patch(PLACES[target], side_effect=AssertionError("fitted again")):
        answer(capsys, *asked)
    assert not (tmp_path / "out" / RUN_FILE).exists()
    assert not (tmp_path / "out" / "fits").exists()
    whole, found = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == found.keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)


def test_a_failure_before_the_fits_leaves_nothing(
    saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    asked = command("mla", saved_llama, text_file, tmp_path / "new" / "out")
    assert main([*asked, "--kv-budget", "0.001"]) == 2
    assert not (tmp_path / "new").exists()


def test_other_data_is_fitted_anew(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())
    asked = command("mla", saved_llama, text, tmp_path / "out")
    with mock.patch.object(COMPILE, "same_decode", side_effect=VerificationError("it differs")):
        assert main(asked) == 1
    text.write_text(text.read_text()[::-1])
    with mock.patch(PLACES["mla"], side_effect=VerificationError("fitted again")):
        assert main(asked) == 1
    assert "fitted again" in capsys.readouterr().err

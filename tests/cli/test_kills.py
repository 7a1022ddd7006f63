"""Killed at any point, a command leaves nothing, a run to go on with, or something whole."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import Captured, answer

import attnedit
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE

pytestmark = pytest.mark.kills
KILLS = 5
"""Of each command."""


@pytest.fixture
def commands(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> dict[str, list[str]]:
    fit = ["--calibration", text_file, "--calibration-tokens", "2048"]
    answer(capsys, "compile", saved_llama, *fit, "--alternations", "0", "-o", tmp_path / "result")
    training = [*fit[:2], "--seq-len", "32", "--batch-size", "2", "--checkpoint-every", "5"]
    made: dict[str, list[object]] = {
        "compile": ["compile", saved_llama, *fit],
        "train": ["compile", saved_llama, *fit, *training[2:], "--fit-steps", "20", "--distill-steps", "20"],
        "calibrate": ["calibrate", tmp_path / "result", "--teacher", saved_llama, *training, "--distill-steps", "40"],
        "export": ["export", tmp_path / "result", "--to", "hf", "--profile", "remote"],
        "export onnx": ["export", tmp_path / "result", "--to", "onnx"],
    }
    return {name: [str(part) for part in parts] for name, parts in made.items()}


def files(directory: Path) -> list[str]:
    return sorted(str(file.relative_to(directory)) for file in directory.rglob("*"))


def check(name: str, output: Path) -> str:
    """What a killed command left: "nothing", "run" or "whole", which an export is with all files of one not killed."""
    if not output.exists() or not any(output.iterdir()):
        return "nothing"
    if (output / RUN_FILE).exists():
        json.loads((output / RUN_FILE).read_text())
        return "run"
    if name.startswith("export"):
        assert files(output) == files(output.parent / "whole")
    else:
        attnedit.load(output)
    return "whole"


@pytest.mark.parametrize("name", ["compile", "train", "calibrate", "export", "export onnx"])
def test_kills_at_random_points(name: str, commands: dict[str, list[str]], tmp_path: Path) -> None:
    asked = [sys.executable, "-m", "attnedit.cli", *commands[name]]
    start = time.monotonic()
    subprocess.run([*asked, "-o", str(tmp_path / "whole")], check=True, capture_output=True)
    duration = time.monotonic() - start
    assert check(name, tmp_path / "whole") == "whole"
    choose = random.Random(0)
    left = []
    for index in range(KILLS):
        output = tmp_path / f"{name}-{index}"
        process = subprocess.Popen([*asked, "-o", str(output)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        # The start of Python and the imports write nothing: kill after them.
        try:
            process.wait(timeout=duration * choose.uniform(0.4, 1.0))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        left.append(check(name, output))
        if left[-1] == "run":  # the same command goes on
            subprocess.run([*asked, "-o", str(output)], check=True, capture_output=True)
            assert check(name, output) == "whole"
    assert len(left) == KILLS

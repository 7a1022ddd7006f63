"""The benchmarks of decoding on a GPU run through, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def run(program: str, *arguments: str | Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_tiny_generation() -> None:
    lines = run("gpu_generate.py", "--tiny", "--tokens", "6").splitlines()
    assert sum("'same': True" in line for line in lines) == 4
    assert sum("tokens/s plain" in line for line in lines) == 4


@pytest.mark.long
def test_tiny_run_and_plot(tmp_path: Path) -> None:
    results, image = tmp_path / "tiny.json", tmp_path / "plot.svg"
    run("gpu_decode.py", "--tiny", "--out", results)
    run("gpu_decode.py", "--plot", results, image)
    values = json.loads(results.read_text())
    assert {case["name"] for case in values["model"]} == {"source", "MLA", "GateSWA", "GateSWA + MLA"}
    names = {case["name"] for case in values["layer"]}
    assert names >= {"source default", "MLA 512+64", "MLA 1/4", "GateSWA 8", "GateSWA 8, compiled"}
    assert all(case["us"] > 0 and case["bytes"] > 0 for case in values["layer"])
    assert image.stat().st_size > 1000

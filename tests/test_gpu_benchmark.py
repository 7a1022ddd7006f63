"""The benchmark of decoding on a GPU runs through, on tiny shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu_decode.py"


@pytest.mark.long
def test_tiny_run_and_plot(tmp_path: Path) -> None:
    results, image = tmp_path / "tiny.json", tmp_path / "plot.svg"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    for arguments in (["--tiny", "--out", results], ["--plot", results, image]):
        done = subprocess.run([sys.executable, PROGRAM, *arguments], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    values = json.loads(results.read_text())
    assert {case["name"] for case in values["model"]} == {"source", "MLA", "GateSWA", "GateSWA + MLA"}
    names = {case["name"] for case in values["layer"]}
    assert names >= {"source default", "MLA 512+64", "MLA 1/4", "GateSWA 8", "GateSWA 8, compiled"}
    assert all(case["us"] > 0 and case["bytes"] > 0 for case in values["layer"])
    assert image.stat().st_size > 1000

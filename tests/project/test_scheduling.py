"""Which tests run in one process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from project import ROOT
from scheduling import subject_of


def test_the_subject_of_a_test() -> None:
    assert subject_of("tests/api/test_compile.py::test_decodes[qwen3_moe-one by one]") == "qwen3_moe"
    assert subject_of("tests/npu/test_npu_training.py::test_steps[gpt_oss mla]") == "gpt_oss"
    assert subject_of("tests/api/test_recipe.py::test_llama[0.5-mla]") == "tests/api/test_recipe.py"
    assert subject_of("tests/api/test_recipe.py::test_llama") == "tests/api/test_recipe.py"


@pytest.mark.long
def test_a_subject_stays_in_one_process(tmp_path: Path) -> None:
    """With the scheduler that this run has: what pytest-xdist groups by itself, new versions of pytest split."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for name in ("one", "two"):
        (tmp_path / f"test_{name}.py").write_text(
            "import pytest\n@pytest.mark.parametrize('what', ['llama', 'qwen3', 'gemma2', 'rest', 'others'])\n"
            "@pytest.mark.parametrize('number', range(4))\ndef test_it(what, number): pass\n"
        )
    command = [sys.executable, "-m", "pytest", "-v", "-n", "2", "-c", "/dev/null", "--rootdir", str(tmp_path)]
    command += ["-o", f"pythonpath={ROOT / 'tests' / 'support'}", str(tmp_path)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    workers: dict[str, set[str]] = {}
    for worker, test in re.findall(r"\[(gw\d)\] \[ *\d+%\] PASSED (\S+)", said):
        workers.setdefault(subject_of(test), set()).add(worker)
    assert set(workers) >= {"llama", "qwen3", "gemma2"}
    assert len(workers) == 5
    assert all(len(ones) == 1 for ones in workers.values()), workers
    assert {one for ones in workers.values() for one in ones} == {"gw0", "gw1"}

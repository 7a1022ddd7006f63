"""The project itself as tests see it: its folders, modules, benchmarks, and code in its pages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = {"attnedit": "compiler/api", "attnedit.compiler": "compiler", "attnedit.passes": "passes"}
FOLDERS["attnedit.targets"] = "targets"


def modules() -> list[str]:
    """Dotted names of all our modules, from the files."""
    names = []
    for package, folder in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            if package == "attnedit.compiler" and parts[0] == "api":
                continue
            names.append(".".join([package, *parts]).removesuffix(".__init__"))
    return names


MODULES = modules()

BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)  # a language and its code

BENCHMARKS = ROOT / "benchmarks"


def run(program: str, *arguments: str | Path) -> str:
    """What a benchmark prints, from a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, BENCHMARKS / program, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout

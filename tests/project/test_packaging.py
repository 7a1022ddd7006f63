"""The layout: packages, guards, imports in one direction, doctests, links for static tools."""

from __future__ import annotations

import ast
import doctest
import importlib
import importlib.util
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from project import FOLDERS, MODULES, ROOT

ENGINES = {f"attnedit.targets.runtime.vllm.{name}" for name in ("attention", "latent_layer", "model")}
"""They import an engine, which has an environment of its own: what serves in it imports them (make test-vllm)."""


def test_the_listed_packages_are_the_folders() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = []
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("__init__.py"):
            parts = file.parent.relative_to(ROOT / folder).parts
            if package == "attnedit.compiler" and parts[:1] == ("api",):
                continue
            found.append(".".join([package, *parts]))
    assert sorted(listed) == sorted(found)


def test_every_folder_with_modules_is_a_package() -> None:
    for folder in ("compiler", "passes", "targets"):
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), file


@pytest.mark.parametrize("name", [name for name in MODULES if name not in ENGINES])
def test_the_module_imports_and_its_doctests_hold(name: str) -> None:
    module = importlib.import_module(name)
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    assert failed == 0


@pytest.mark.parametrize("folder", ["compiler", "passes", "targets", "compiler.api"])
def test_importing_by_folder_name_is_refused(folder: str) -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {folder}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "is installed as" in done.stderr.splitlines()[-1]


def test_the_links_for_static_tools_are_in_place() -> None:
    for name in ("compiler", "passes", "targets", "__init__.py", "py.typed"):
        link = ROOT / ".links" / "attnedit" / name
        assert link.is_symlink()
        assert link.resolve().exists()


# What a package may import of ours, outermost name first; compiler/api sees all.
ALLOWED = {
    "attnedit.compiler": {"attnedit.compiler"},
    "attnedit.targets.attention": {"attnedit.compiler", "attnedit.targets.attention"},
    "attnedit.passes": {"attnedit.compiler", "attnedit.targets.attention", "attnedit.passes"},
    "attnedit.targets.runtime": {"attnedit.compiler", "attnedit.targets.attention", "attnedit.targets.runtime"},
}


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith(tuple(ALLOWED))])
def test_imports_go_one_way(name: str) -> None:
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    allowed = next(targets for package, targets in ALLOWED.items() if name.startswith(package))
    for node in ast.walk(ast.parse(Path(spec.origin).read_text())):
        imported = []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            imported = [node.module or ""]
        elif isinstance(node, ast.Import):
            imported = [alias.name for alias in node.names]
        for target in imported:
            if target.split(".")[0] == "attnedit":
                assert target.startswith(tuple(allowed)), f"{name} imports {target}"


def test_no_relative_imports() -> None:
    for folder in ("compiler", "passes", "targets"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                assert not (isinstance(node, ast.ImportFrom) and node.level), file


def test_the_wheel_holds_every_module_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet", "-w", str(tmp_path)]
    copy = tmp_path / "source"  # setuptools leaves a build folder where it builds
    for folder in ("compiler", "passes", "targets"):
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    subprocess.run([*build, str(copy)], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    listing = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    )
    files = {line.split()[0] for line in listing.stdout.splitlines()[1:]}
    expected = {
        name.replace(".", "/") + suffix
        for name in MODULES
        for suffix in (".py", "/__init__.py")
        if name.replace(".", "/") + suffix in files
    }
    assert len(expected) == len(MODULES)
    assert "attnedit/py.typed" in files
    assert all(file.startswith(("attnedit/", "attnedit-")) for file in files)

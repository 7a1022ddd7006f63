"""What a release takes: one version everywhere, and a lock file that has the Makefile's versions and no other host."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from typing import Any

import yaml
from project import ROOT

HOSTS = {"https://pypi.org", "https://files.pythonhosted.org"}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(text("pyproject.toml"))


def lock() -> dict[str, Any]:
    return tomllib.loads(text("uv.lock"))


def pins(requirements: str) -> dict[str, str]:
    return dict(re.findall(r"([\w-]+)==([\w.]+)", requirements))


def test_one_version_stands_everywhere() -> None:
    version = project()["project"]["version"]
    assert yaml.safe_load(text("CITATION.cff"))["version"] == version
    newest = re.findall(r"^## (\S+)", text("CHANGELOG.md"), re.MULTILINE)[0]
    assert newest == version, "the newest section of CHANGELOG.md is another version's"
    (own,) = (package for package in lock()["package"] if package["name"] == "attnedit")
    assert own["version"] == version, "run make lock"


def test_the_pinned_group_has_the_versions_of_the_makefile() -> None:
    variables = re.findall(r"^(TORCH|PINNED|CHECKS) := (.+)$", text("Makefile"), re.MULTILINE)
    assert len(variables) == 3
    wanted = pins(" ".join(value for _, value in variables))
    assert pins(" ".join(project()["dependency-groups"]["pinned"])) == wanted
    locked: dict[str, set[str]] = {}
    for package in lock()["package"]:
        locked.setdefault(package["name"], set()).add(package.get("version", ""))
    assert all(version in locked[name] for name, version in wanted.items()), "run make lock"


def test_the_lock_file_has_the_dependencies_of_today() -> None:
    (own,) = (package for package in lock()["package"] if package["name"] == "attnedit")
    asked = [(name, "") for name in project()["project"]["dependencies"]]
    for extra, names in project()["project"]["optional-dependencies"].items():
        asked += [(name, extra) for name in names]
    wanted = {(re.split(r"[\[<>=;]", name)[0].replace("_", "-"), extra) for name, extra in asked}
    found = set()
    for entry in own["metadata"]["requires-dist"]:
        extra = re.search(r"extra == '([\w-]+)'", entry.get("marker", ""))
        found.add((entry["name"], extra[1] if extra else ""))
    assert found == wanted, "run make lock"


def addresses(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from addresses(inner)
    elif isinstance(value, str) and "://" in value:
        yield value


def test_the_lock_file_names_the_public_index_alone() -> None:
    found = {"/".join(address.split("/")[:3]) for address in addresses(lock())}
    assert found == HOSTS

"""Tables, charts and drawings of the pages are those of the figures in docs/data; tutorials are those that were run."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
from project import ROOT

from attnedit.cli import app

DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
TUTORIALS = ["tutorials/first-model", "tutorials/train-on-a-gpu"]
RESULTS = ["results", "results/quality", "results/retrieval", "results/cost"]


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a module that makes figures."""
    monkeypatch.syspath_prepend(FIGURES)
    monkeypatch.syspath_prepend(DOCS / "tutorials")
    return importlib.import_module


def test_tables_are_those_of_the_figures(made: Any) -> None:
    tables = made("page_tables")
    used = set()
    for page in DOCS.rglob("*.md"):
        text = page.read_text(encoding="utf-8")
        found = re.findall("<!-- table: (.*?) -->", text)
        assert bool(found) == (page.relative_to(DOCS).as_posix() in tables.PAGES), page
        used.update(found)
        assert tables.filled(page) == text, f"{page.name}: run docs/figures/make.py"
    assert used == set(tables.TABLES)


@pytest.mark.parametrize("module", ["charts", "concepts"])
def test_charts_and_concepts_are_those_of_today(module: str, made: Any) -> None:
    for name, text in getattr(made(module), module)().items():
        assert (FIGURES / name).read_text(encoding="utf-8") == text + "\n", f"{name}: run docs/figures/make.py"


@pytest.mark.long
def test_drawings_of_graphs_are_those_of_today(made: Any) -> None:
    for name, text in made("make").drawings().items():
        assert (FIGURES / name).read_text(encoding="utf-8") == text + "\n", f"{name}: run docs/figures/make.py"


def test_a_question_of_the_results_is_one_screen() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    questions = text.split("\n## ")[1:]
    assert len(questions) == 5
    for question in questions:
        assert "figures/" in question, question
        assert "\n| " in question, question
        assert "Measured" in question or "one run" in question, question
        assert "](results/" in question, question
        for table in re.findall(r"(?:^\|.*\n)+", question, re.MULTILINE):
            assert table.count("\n") <= 9, table
    for picture in re.findall(r"figures/([\w-]+)\.svg", text):
        assert (FIGURES / f"{picture}.svg").exists(), picture


def test_every_picture_is_shown_somewhere() -> None:
    pages = [ROOT / "README.md", *DOCS.rglob("*.md")]
    shown = {name for page in pages for name in re.findall(r"figures/([\w.-]+)\)", page.read_text(encoding="utf-8"))}
    assert shown == {file.name for file in FIGURES.iterdir() if file.suffix in (".svg", ".png")}


def test_the_tutorial_is_what_was_recorded(made: Any) -> None:
    record = made("record")
    page, recorded = record.PAGE.read_text(encoding="utf-8"), json.loads(record.RECORDED.read_text(encoding="utf-8"))
    assert record.digest(page) == recorded["digest"], "its commands are not those that were run: make tutorial"
    assert record.written(page, recorded) == page, "its outputs are not those that were recorded: make tutorial"
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    assert recorded["versions"]["attnedit"] == version, "recorded with another version: make tutorial"


@pytest.mark.parametrize("name", [*TUTORIALS, *RESULTS])
def test_commands_of_a_page_parse(name: str) -> None:
    text = (DOCS / f"{name}.md").read_text(encoding="utf-8").replace("\\\n", "")
    code = "".join(re.findall("```(?:bash|console)\n(.*?)```", text, re.DOTALL))
    lines = [line.removeprefix("$ ") for line in code.splitlines() if re.match(r"(\$ )?attnedit \w", line)]
    assert len(lines) > (4 if name in TUTORIALS else 0)
    group = typer.main.get_command(app)
    for line in lines:
        _, command, *arguments = shlex.split(line, comments=True)
        group.commands[command].make_context(command, arguments)


def test_recording_goes_on_and_fills_the_page(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = made("record")
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(6 * 7)\n```\n\n```text\n```\n\n```bash\necho once >> log\n```\n", encoding="utf-8"
    )
    monkeypatch.setattr(record, "PAGE", page)
    recorded = record.record(tmp_path)
    assert [step["output"] for step in recorded["steps"]] == ["42\n", "\n"]
    text = record.written(page.read_text(encoding="utf-8"), recorded)
    assert "```text\n42\n```" in text
    assert record.digest(text) == recorded["digest"]
    assert record.record(tmp_path) == recorded
    assert (tmp_path / "log").read_text() == "once\n"  # run once only
    with pytest.raises(SystemExit, match="failed with 3"):
        record.run("bash", "exit 3", tmp_path)

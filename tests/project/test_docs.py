"""The code in README and user guide runs, on a tiny model in place of the hub's."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import re
import runpy
import shlex
import shutil
import sys
import textwrap
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from project import BLOCK, ROOT
from public_names import described, entries, public
from vision_processors import llava_processor, llava_with_words, write_chats

import attnedit
from attnedit.cli import main

PAGES = ["README.md", "docs/index.md", "docs/writing-a-rewrite.md"]
LONG = [
    f"docs/{name}.md" for name in ("user-guide", "mla", "gateswa", "onnx", "ascend", "export-hf", "ecosystem", "api")
]
LONG += [f"docs/engines/{name}.md" for name in ("llama.cpp", "sglang")]
"""Pages whose code takes its time, or wants the extra `ecosystem`."""
HUB_NAME = "Qwen/Qwen3-0.6B"
VISION_NAME = "llava-hf/llava-1.5-7b-hf"
NAMED = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file


def blocks(page: str) -> list[tuple[str, str]]:
    found = BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))
    return [(language, code) for language, code in found if language != "console"]  # what takes an engine or its files


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it by its old name
@pytest.mark.parametrize("page", [*PAGES, *(pytest.param(page, marks=pytest.mark.long) for page in LONG)])
def test_the_code_of_a_page_runs_in_order(
    page: str,
    saved_llama: Path,
    text_file: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "grouped_latent_attention"))  # as pip would
    # A byte is a token here, and the fits take their time from the number of tokens.
    (tmp_path / "notes.txt").write_text(text_file.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    if VISION_NAME in (ROOT / page).read_text(encoding="utf-8"):
        llava_with_words().save_pretrained(tmp_path / "llava")
        llava_processor().save_pretrained(tmp_path / "llava")
        shutil.copy(write_chats(tmp_path).with_name("0.png"), tmp_path / "photo.png")
    names: dict[str, Any] = {}
    for language, text in blocks(page):
        code = text.replace(HUB_NAME, str(saved_llama)).replace(VISION_NAME, str(tmp_path / "llava"))
        if language == "toml":
            tomllib.loads(code)
            continue
        if file := NAMED.match(code):
            (tmp_path / file[1]).write_text(code, encoding="utf-8")
            monkeypatch.syspath_prepend(tmp_path)
            continue
        if language == "python":
            exec(compile(code, page, "exec"), names)
            continue
        if "compile" in code:  # the page shows the same job in Python before
            shutil.rmtree(tmp_path / "qwen3-mla", ignore_errors=True)
        for line in code.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "attnedit":
                assert main(words[1:]) == 0, capsys.readouterr().err
            else:
                check_setup(words)


def check_setup(words: list[str]) -> None:
    """Commands that set up a machine are not run; make's must exist."""
    assert words[0] in ("make", "pip")
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_links_between_pages_lead_somewhere() -> None:
    for page in ["README.md", *(file.relative_to(ROOT).as_posix() for file in (ROOT / "docs").rglob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", (ROOT / page).read_text(encoding="utf-8")):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_every_page_is_in_the_site() -> None:
    site = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = set(re.findall(r"[\w/.-]+\.md", str(site["nav"])))
    docs = ROOT / "docs"
    assert listed == {file.relative_to(docs).as_posix() for file in docs.rglob("*.md")}
    for name in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.MULTILINE):
        assert pkgutil.resolve_name(name) is not None


def test_the_reference_covers_every_public_name() -> None:
    covered = [found for _, found in public()]
    for name in attnedit.__all__:
        assert any(getattr(attnedit, name) is each for each in covered), name
        assert not inspect.ismodule(getattr(attnedit, name)), name
        assert f"attnedit.{name}" not in sys.modules, name
    modules = {file.stem for file in (ROOT / "compiler" / "api").glob("[a-z]*.py")}
    assert not modules & set(attnedit.__all__)


def test_the_reference_covers_what_other_pages_import() -> None:
    covered = [found for _, found in public()]
    modules = [found for _, found, _ in entries() if inspect.ismodule(found)]
    pages = [page.relative_to(ROOT).as_posix() for page in (ROOT / "docs").rglob("*.md")]
    for page in ["README.md", *pages]:
        code = "\n".join(code for language, code in blocks(page) if language == "python")
        for module, names in re.findall(r"^from (attnedit(?:\.[\w.]+)?) import (.+)$", code, re.MULTILINE):
            for name in names.split("#")[0].replace(" ", "").split(","):
                found = getattr(pkgutil.resolve_name(module), name)
                assert any(found is each for each in covered) or any(vars(one).get(name) is found for one in modules), (
                    f"{page}: {module}.{name}"
                )


def test_every_public_function_is_described() -> None:
    pages = ("docs/api.md", "docs/writing-a-rewrite.md")
    examples = "\n".join(code for page in pages for language, code in blocks(page) if language == "python")
    for name, function in described():
        text = inspect.getdoc(function) or ""
        (code,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
        parameters = [node.arg for node in ast.walk(code.args) if isinstance(node, ast.arg)]  # type: ignore[attr-defined]
        for parameter in set(parameters) - {"self", "cls"}:
            assert re.search(rf"^    \*{{0,2}}{parameter}: ", text, re.MULTILINE), f"{name} says nothing of {parameter}"
        if inspect.signature(function).return_annotation not in ("None", None) and "Yields:" not in text:
            assert re.search(r"^Returns:\n    ", text, re.MULTILINE), f"{name} does not say what it returns"
        if any(isinstance(node, ast.Raise) and node.exc is not None for node in ast.walk(code)):
            assert re.search(r"^Raises:\n    \w*Error: ", text, re.MULTILINE), f"{name} does not say what it raises"
        short = name.removesuffix(".forward").rpartition(".")[2]  # modules are called
        assert ">>> " in text or re.search(rf"\b{short}\b", examples), f"{name} has no example"
    for name, found in public():
        assert not inspect.isclass(found) or inspect.getdoc(found), name


def test_the_page_of_commands_is_that_of_today() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["page"]()
    assert made == (ROOT / "docs" / "commands.md").read_text(encoding="utf-8"), "run make commands"


def test_the_readme_is_short() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 120
    assert any("make demo" in line for line in lines[:8])

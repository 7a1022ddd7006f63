"""Runs the commands of a tutorial and writes what they print into its page: ``make tutorial``.

A page has its commands in blocks of ``bash`` or ``python``; the block of ``text`` after one is what it printed. A JSON
file keeps every command with its output, the version of attnedit and what it ran on. A test holds the page to it, so
that a command that was changed and not run again is noticed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "first-model.md"
RECORDED = HERE.parent / "data" / "tutorial-first-model.json"
PICTURE = HERE.parent / "figures" / "tutorial-report.png"
STEP = re.compile(r"```(bash|python)\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)
BAR = re.compile(r".*\r(?!\n)")  # what a progress bar wrote over
WIDTH = "100"


def steps(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Language, code and printed text (None where the page shows none) of each step, in order."""
    for found in STEP.finditer(text):
        yield found[1], found[2], found[3]


def digest(text: str) -> str:
    """What the steps of a page are known by: SHA-256 of their code."""
    code = "\n".join(f"{language}\n{code}" for language, code, _ in steps(text))
    return hashlib.sha256(code.encode()).hexdigest()


def run(language: str, code: str, directory: Path) -> str:
    """Run one step in a directory; what it printed.

    Raises:
        SystemExit: it failed.
    """
    binaries = Path(sys.executable).parent
    environment = {**os.environ, "COLUMNS": WIDTH, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}
    python = os.environ.get("ATTNEDIT_LLAMACPP_PYTHON", sys.executable) if "xllamacpp" in code else sys.executable
    command = ["bash", "-ec", code] if language == "bash" else [python, "-c", code]
    print(code, end="", file=sys.stderr, flush=True)
    done = subprocess.run(command, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"failed with {done.returncode}: {code}")
    lines = [BAR.sub("", line).rstrip() for line in done.stdout.splitlines()]
    return "\n".join(lines).strip("\n") + "\n"


def record(directory: Path) -> dict[str, Any]:
    """Run what was not run in this directory, in order.

    A step that was run leaves its output in the directory, so that a recording goes on where it was stopped.
    """
    text = PAGE.read_text(encoding="utf-8")
    found = []
    for number, (language, code, _) in enumerate(steps(text)):
        kept = directory / f"step-{number}-{hashlib.sha256(code.encode()).hexdigest()[:12]}.txt"
        if not kept.exists():
            kept.write_text(run(language, code, directory), encoding="utf-8")
        found.append({"language": language, "code": code, "output": kept.read_text(encoding="utf-8")})
    versions = {name: version(name) for name in ("attnedit", "torch", "transformers")}
    where = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return {"digest": digest(text), "versions": versions, "machine": where, "steps": found}


def written(text: str, recorded: dict[str, Any]) -> str:
    """The page with the outputs that were recorded."""
    outputs = iter([step["output"] for step in recorded["steps"]])

    def one(found: re.Match[str]) -> str:
        output = next(outputs)
        if found[3] is None:
            return found[0]
        return f"```{found[1]}\n{found[2]}```\n\n```text\n{output}```\n"

    return STEP.sub(one, text)


def picture(directory: Path) -> None:
    """Photograph the report, where there is a browser."""
    browser = next((found for name in ("chromium", "google-chrome") if (found := shutil.which(name))), None)
    if browser is None:
        print("no chromium here: the picture of the report stays as it is", file=sys.stderr)
        return
    report = (directory / "half" / "report.html").resolve().as_uri()
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1000,1250"]
    subprocess.run([browser, *options, f"--screenshot={PICTURE}", report], check=True, capture_output=True)


def main() -> None:
    """Record, and write page and file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="where the steps run; kept, to go on there")
    directory = parser.parse_args().directory
    directory.mkdir(parents=True, exist_ok=True)
    recorded = record(directory)
    picture(directory)
    RECORDED.write_text(json.dumps(recorded, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), recorded), encoding="utf-8")


if __name__ == "__main__":
    main()

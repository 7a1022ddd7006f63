"""Commands of the command line, run in this process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_llama import make_tokenizer

from attnedit.cli import main

Captured = pytest.CaptureFixture[str]


def answer(capsys: Captured, *arguments: object) -> dict[str, Any]:
    """Run a command that must succeed with ``--json`` and nothing on stderr."""
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    value = json.loads(captured.out)
    assert isinstance(value, dict)
    return value


def refusal(capsys: Captured, *arguments: object, code: int = 2) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout."""
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("attnedit: ")
    assert captured.err.count("\n") == 1
    return captured.err


def refusal_as_json(capsys: Captured, *arguments: object, code: int = 2) -> str:
    """The same with ``--json``: the line is on stderr, and in the one object on stdout."""
    assert main([*map(str, arguments), "--json"]) == code
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    value = json.loads(captured.out)
    assert (value["exit_code"], f"attnedit: {value['error']}\n") == (code, captured.err)
    return captured.err


def save(model: Any, directory: Path) -> Path:
    """A model with the tiny tokenizer in a directory."""
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory

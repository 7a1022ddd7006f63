"""The worked examples of docs/writing-a-rewrite.md as modules, and models that they rewrote."""

from __future__ import annotations

import atexit
import functools
import importlib
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

from compiled import _remembered, tokens
from families import build
from project import ROOT
from transformers import PreTrainedModel

import attnedit

PAGE = ROOT / "docs" / "writing-a-rewrite.md"
FILE = re.compile(r"^```python\n(# (\w+\.py)\n.*?)^```", re.MULTILINE | re.DOTALL)
MODULE: Any = importlib.import_module("attnedit._rewrite")


@functools.cache
def directory() -> Path:
    """A directory on the path with the example files."""
    place = Path(tempfile.mkdtemp(prefix="examples"))
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    for code, name in FILE.findall(PAGE.read_text(encoding="utf-8")):
        (place / name).write_text(code, encoding="utf-8")
    sys.path.insert(0, str(place))
    return place


def example(module: str, name: str) -> Any:
    """A class of an example file."""
    directory()
    return getattr(importlib.import_module(module), name)


EXAMPLES = {
    "HeadGate": functools.partial(example, "head_gate", "HeadGate"),
    "MultiQuery": functools.partial(example, "multi_query", "MultiQuery"),
    "Int8Cache": functools.partial(example, "int8_cache", "Int8Cache"),
}


def rewrite(model: PreTrainedModel, rewrites: Any, **options: Any) -> attnedit.CompileResult:
    """`attnedit.rewrite` on random tokens, each kind of model captured once."""
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.rewrite(model, rewrites, **{"calibration": tokens(4, 32), **options})


@functools.cache
def source(family: str) -> PreTrainedModel:
    return build(family)


@functools.cache
def rewritten(family: str, name: str) -> attnedit.CompileResult:
    """A tiny model after one example; tests leave it as it is."""
    return rewrite(source(family), EXAMPLES[name]()())

"""Graphs as text, compared with files: whoever changes capture or rewrite sees what changed.

``pytest tests/graph/test_golden.py --update-golden`` rewrites the files.
"""

from __future__ import annotations

import difflib
import functools
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from compiled import MODULE, tokens
from families import build
from torch import fx, nn

import attnedit
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.compatibility.caches import cache_parameter
from attnedit.compiler.graph.graph_text import as_text

GOLDEN = Path(__file__).with_name("golden")
# One whose keys are normalised before rope, and one whose keys are linear in the hidden states, and so folded.
FAMILIES = ["qwen3", "llama"]


def compare(text: str, file: Path, *, update: bool) -> None:
    """Fail with a unified diff where the text is not the file's."""
    if update:
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return
    expected = file.read_text(encoding="utf-8") if file.exists() else ""
    names = {"fromfile": file.name, "tofile": "now", "lineterm": ""}
    if difference := "\n".join(difflib.unified_diff(expected.splitlines(), text.splitlines(), **names)):
        pytest.fail(f"{difference}\nif that is right: pytest tests/graph/test_golden.py --update-golden", pytrace=False)


@functools.cache
def graphs(family: str) -> dict[str, nn.Module]:
    """The attention of the first layer before and after."""
    model = build(family)
    sites = capture(model)
    with mock.patch.object(MODULE, "capture", return_value=sites):  # tracing is what takes time here
        result = attnedit.compile(model, kv_budget=0.5, calibration=tokens(4, 32), alternations=0, verify=False)
    return {"captured": graph_module(model, sites[0]), "mla": result.model.get_submodule(sites[0].name)}


@pytest.mark.parametrize("stage", ["captured", "mla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_graph_is_the_golden_one(family: str, stage: str, pytestconfig: pytest.Config) -> None:
    graph = graphs(family)[stage]
    assert isinstance(graph, fx.GraphModule)
    update = bool(pytestconfig.getoption("--update-golden"))
    # Files say "cache", whatever the installed transformers calls it.
    text = re.sub(rf"\b{cache_parameter(graph)}\b", "cache", as_text(graph))
    compare(text, GOLDEN / f"{family}-{stage}.txt", update=update)


def test_a_mismatch_is_a_diff_and_an_update_mends_it(tmp_path: Path) -> None:
    file = tmp_path / "golden" / "graph.txt"
    compare("a\nb\n", file, update=True)
    compare("a\nb\n", file, update=False)
    with pytest.raises(pytest.fail.Exception, match=r"(?s)-b\n\+c\n.*--update-golden"):
        compare("a\nc\n", file, update=False)
    with pytest.raises(pytest.fail.Exception, match=r"\+a"):
        compare("a\n", tmp_path / "not-there.txt", update=False)


def test_the_text_shows_what_a_graph_does() -> None:
    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat((self.inner(x).transpose(0, 1), x), dim=-1)

    text = as_text(fx.symbolic_trace(Toy()))
    assert "%inner = call_module inner(%x)" in text
    assert "%transpose = call_method transpose(%inner, 0, 1)" in text
    assert "%cat = call_function torch.cat([%transpose, %x], dim=-1)" in text
    assert "inner.weight [3, 2] float32" in text

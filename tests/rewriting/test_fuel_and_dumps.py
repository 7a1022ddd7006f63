"""Tools that find a rewrite which breaks a model: fuel, dumps of graphs."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
from commands import answer, refusal
from compiled import compile_tiny, deviation, logits, tokens
from examples import EXAMPLES, rewrite, source

import attnedit
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.graph.graph_text import as_text
from attnedit.compiler.reporting.graph_svg import graph_svg


def kinds(result: attnedit.CompileResult) -> list[str]:
    return [row.kind for row in result.report.layers]


@pytest.mark.parametrize("fuel", [0, 1, 2, 3])
def test_fuel_stops_after_so_many_rewrites(fuel: int) -> None:
    both = [EXAMPLES["HeadGate"]()(), EXAMPLES["Int8Cache"]()()]
    result = rewrite(source("llama"), both, fuel=fuel)
    done = [rule.rewritten for rule in result.report.rules]
    assert done == [min(fuel, 2), max(0, fuel - 2)]
    assert kinds(result)[1] == ("HeadGate" if fuel > 1 else "source")
    assert f"stopped by fuel: {4 - fuel} rewrites were not done" in result.report.notes
    untouched = result.model.get_submodule("model.layers.1.self_attn")
    if fuel < 2:
        assert type(untouched) is type(source("llama").get_submodule("model.layers.1.self_attn"))


def test_fuel_bisects_our_own_passes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = compile_tiny(source("llama"), 0.5)
    monkeypatch.setenv("ATTNEDIT_FUEL", "1")
    result = compile_tiny(source("llama"), 0.5)
    assert kinds(result) == ["mla", "source"]
    assert result.report.sites_rewritten == 1
    assert [(rule.name, rule.matched, rule.rewritten) for rule in result.report.rules] == [("mla", 2, 1)]
    assert result.report.notes == ["stopped by fuel: 1 rewrites were not done"]
    assert whole.report.rules[0].rewritten == 2
    ours, theirs = (r.model.get_submodule("model.layers.0.self_attn").state_dict() for r in (result, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)  # what is done is done as without the limit
    monkeypatch.setenv("ATTNEDIT_FUEL", "0")
    none = compile_tiny(source("llama"), 0.5)
    ids = tokens(2, 9)
    assert deviation(logits(none.model, ids), logits(source("llama"), ids)) == 0.0
    monkeypatch.setenv("ATTNEDIT_FUEL", "many")
    with pytest.raises(attnedit.UsageError, match="ATTNEDIT_FUEL=many: give a number"):
        compile_tiny(source("llama"), 0.5)


def test_graphs_are_dumped_before_and_after_each_pass_once_for_equal_layers(tmp_path: Path) -> None:
    both = [EXAMPLES["HeadGate"]()(), EXAMPLES["Int8Cache"]()()]
    rewrite(source("llama"), both, dump_graphs=tmp_path / "graphs")
    files = sorted(file.name for file in (tmp_path / "graphs").iterdir())
    place = "model.layers.0.self_attn"
    stems = [f"01-HeadGate.{place}", f"02-Int8Cache.{place}"]
    assert files == [
        f"{stem}.{when}.{form}" for stem in stems for when in ("after", "before") for form in ("svg", "txt")
    ]
    texts = {name: (tmp_path / "graphs" / name).read_text(encoding="utf-8") for name in files}
    assert "head_gate" not in texts[f"{stems[0]}.before.txt"]
    assert "call_module head_gate(%hidden_states)" in texts[f"{stems[0]}.after.txt"]
    assert texts[f"{stems[1]}.before.txt"] == texts[f"{stems[0]}.after.txt"]
    assert "attnedit.cache.default" in texts[f"{stems[1]}.after.txt"]
    for name in files:
        if name.endswith("svg"):
            drawing = ElementTree.fromstring(texts[name])
            lines = [element.text or "" for element in drawing.iter("{http://www.w3.org/2000/svg}tspan")]
            words = {line.split(" ")[0] for line in lines}
            assert {"q_proj", "attnedit.attention"} <= words
            assert ("head_gate" in words) is (name != f"{stems[0]}.before.svg")


def test_a_drawing_has_every_node_inside_and_apart() -> None:
    model = source("qwen3")
    graph = graph_module(model, capture(model)[0]).graph
    drawing = ElementTree.fromstring(graph_svg(graph, "a & b"))
    boxes = [
        tuple(float(box.attrib[key]) for key in ("x", "y", "width", "height"))
        for box in drawing.iter("{http://www.w3.org/2000/svg}rect")
    ]
    assert len(boxes) == len([n for n in graph.nodes if "sym_size" not in n.name and (n.users or n.op == "output")])
    width, height = float(drawing.attrib["width"]), float(drawing.attrib["height"])
    assert all(x >= 0 and x + w <= width and y >= 0 and y + h <= height for x, y, w, h in boxes)
    apart = [
        any(
            low + size <= other[i] or other[i] + other[i + 2] <= low
            for i, (low, size) in enumerate(zip(one[:2], one[2:], strict=True))
        )
        for index, one in enumerate(boxes)
        for other in boxes[:index]
    ]
    assert all(apart)
    assert as_text(graph_module(model, capture(model)[0])).startswith("signature of")


def test_the_command_line_has_both(saved_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--kv-budget", "1.0", "--fuel", "1", "--dump-graphs", tmp_path / "graphs"]
    found = answer(capsys, "compile", saved_llama, *options, "-o", tmp_path / "out")
    assert [row["kind"] for row in found["layers"]] == ["mla", "source"]
    assert found["rules"][0]["rewritten"] == 1
    assert len(list((tmp_path / "graphs").glob("01-mla.*"))) == 4
    blocked = tmp_path / "file"
    blocked.write_text("")
    where = ["--dump-graphs", blocked / "graphs", "-o", tmp_path / "other"]
    assert "graphs cannot be written to" in refusal(capsys, "compile", saved_llama, "--kv-budget", "1.0", *where)

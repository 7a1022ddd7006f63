"""The report as HTML: complete, by itself, and as a browser shows it."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import MODULE, _remembered, compile_tiny, half, logits, source, tokens
from families import build
from PIL import Image

import attnedit
from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.compiler.reporting.graph_svg import graph_svg
from attnedit.compiler.reporting.report import Report, used_memory

VOID = {"meta", "br", "path", "rect", "use", "img"}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LOOK = """<script>
const boxes = [...document.querySelectorAll("svg, .tile")].map(e => e.getBoundingClientRect());
document.title = JSON.stringify({
  drawn: document.querySelectorAll("svg").length,
  smallest: Math.min(...boxes.map(b => Math.min(b.width, b.height))),
  overflow: document.documentElement.scrollWidth - window.innerWidth,
  text: [...document.querySelectorAll("#memory text")].map(e => e.textContent),
});
</script>"""


class Page(HTMLParser):
    """Tags that are open, ids, and what the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.fetched: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        if tag not in VOID:
            self.open.append(tag)
        self.ids.update([found["id"]] if found.get("id") else [])
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href") and value]
        self.fetched += [tag] if tag in ("script", "link") else []

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        self.text += data


def composed() -> attnedit.CompileResult:
    with mock.patch.object(MODULE, "capture", _remembered):
        form = {"window": 6, "sinks": "keep:2", "full_layers": 1}
        return attnedit.compile(source("llama"), "gateswa+mla", calibration=tokens(4, 32), **form)


@pytest.mark.parametrize("make", [lambda: half("qwen3"), composed], ids=["mla", "gateswa+mla"])
def test_the_page_is_complete_and_needs_nothing_else(make: Any) -> None:
    report = make().report
    html = report.to_html()
    page = Page(html)
    assert page.open == []
    assert not [name for name, count in page.ids.items() if count > 1 and name in ("memory", "layers", "figures")]
    assert all(link.startswith("#") for link in page.fetched)  # parts of drawings refer to each other
    assert "url(http" not in html
    assert "@import" not in html
    for row in report.layers:
        assert row.name in page.text
    assert f"{report.kv_bytes_after:,.0f}" in page.text
    assert html.count("<svg") == 3 + 2 * len(report.graphs)
    assert {graphs.kind for graphs in report.graphs} == {row.kind for row in report.layers}
    assert report.to_html() == html


def test_the_page_of_an_older_report_leaves_out_what_it_lacks() -> None:
    values = {**half("llama").report.to_dict(), "kv_curve": None}
    page = Page(Report.model_validate(values).to_html())
    assert page.open == []
    assert "Memory of the" not in page.text


def test_names_from_outside_are_text() -> None:
    report = half("llama").report.model_copy(update={"source": "<script>alert(1)</script>", "notes": ["a < b & c"]})
    page = Page(report.to_html())
    assert not any(tag in page.fetched for tag in ("script", "link"))
    assert "a < b & c" in page.text


def test_training_is_shown() -> None:
    stages = {"fit_steps": 4, "distill_steps": 4, "batch_size": 4, "seq_len": 16}
    report = compile_tiny(build("llama"), 0.5, calibration=tokens(16, 16), **stages).report
    text = Page(report.to_html()).text
    assert "distill" in text
    assert f"{report.perplexity['source']:.2f}" in text


@pytest.mark.parametrize("make", [lambda: half("gemma2"), composed], ids=["source windows", "gateswa+mla"])
def test_memory_is_what_a_live_cache_holds(make: Any) -> None:
    result = make()
    curve = result.report.kv_curve
    assert curve is not None
    assert curve.lengths[-1] == result.report.context_length
    measured = kv_usage(result.model, length=curve.lengths[-1])
    assert curve.after[-1] == pytest.approx(measured.bytes_per_token * measured.length, rel=0.02)
    assert curve.before[-1] == pytest.approx(result.report.kv_bytes_before * measured.length, rel=0.02)
    per_token = [held / length for held, length in zip(curve.after, curve.lengths, strict=True)]
    assert per_token[0] > per_token[-1]  # windows are full


def test_a_saved_result_has_the_page(tmp_path: Path) -> None:
    half("llama").save(tmp_path / "saved")
    html = (tmp_path / "saved" / "report.html").read_text()
    again = attnedit.load(tmp_path / "saved").report
    assert again.graphs == half("llama").report.graphs
    assert again.to_html() == html


def boxes(svg: str) -> list[tuple[float, float, float, float]]:
    root = ElementTree.fromstring(svg)
    found = root.iter("{http://www.w3.org/2000/svg}rect")
    return [tuple(float(box.get(name, "")) for name in ("x", "y", "width", "height")) for box in found]  # type: ignore[misc]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "phi3"])
def test_a_drawing_has_every_node_once_and_none_over_another(family: str) -> None:
    model = source(family)
    graph = graph_module(model, _remembered(model)[0]).graph
    svg = graph_svg(graph, "a < b")
    drawn = boxes(svg)
    used = [
        node for node in graph.nodes if (node.users or node.op != "placeholder") and "sym_size" not in str(node.target)
    ]
    assert len(drawn) == len(used)
    for (x, y, width, height), (x2, y2, width2, height2) in itertools.combinations(drawn, 2):
        assert x + width < x2 or x2 + width2 < x or y + height < y2 or y2 + height2 < y
    edges = sum(len([other for other in node.all_input_nodes if other in used]) for node in used)
    assert svg.count("<path") == edges
    size = ElementTree.fromstring(svg)
    assert all(x >= 0 and x + width <= float(size.get("width", "")) for x, _, width, _ in drawn)


@pytest.mark.long
@pytest.mark.parametrize("width", [1200, 500])
def test_a_browser_shows_it(width: int, tmp_path: Path) -> None:
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    assert browser is not None, f"no browser ({', '.join(BROWSERS)}); install one: apt-get install chromium"
    html = composed().report.to_html()
    page = tmp_path / "report.html"
    page.write_text(html.replace("</body>", LOOK + "</body>"), encoding="utf-8")
    shot = tmp_path / "shot.png"
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--hide-scrollbars", f"--window-size={width},2400", "--host-resolver-rules=MAP * ~NOTFOUND"]
    done = subprocess.run(
        [browser, *options, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True
    )
    assert done.returncode == 0
    colours = Image.open(shot).convert("RGB").getcolors(1 << 24)
    assert colours is not None
    found = {colour for _, colour in colours}
    assert {(0x0F, 0x76, 0x6E), (0xD9, 0x77, 0x06), (0x8C, 0x95, 0x9F)} <= found  # latent, rotary, source
    seen = subprocess.run(
        [browser, *options, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True
    ).stdout
    title = re.search(r"<title>(\{.*?\})</title>", seen)
    assert title is not None
    looked = json.loads(title[1])
    assert looked["drawn"] == html.count("<svg")
    assert looked["smallest"] > 40
    assert looked["overflow"] <= 0
    assert any(text.startswith("result, ") for text in looked["text"])


def test_the_loss_over_position_is_that_of_the_windows_it_names() -> None:
    """Of a fit with alternations, and again after training; a quick job does not measure it."""
    model, ids = source("llama"), tokens(6, 120, seed=3)
    fitted = attnedit.compile(model, kv_budget=0.5, calibration=ids, alternations=2)
    curve = fitted.report.loss_curve
    assert curve is not None
    assert curve.ends == [64, 120]
    with torch.no_grad():
        for found, measured in ((model, curve.source), (fitted.model, curve.result)):
            each = torch.nn.functional.cross_entropy(logits(found, ids[:1])[0, :-1], ids[0, 1:], reduction="none")
            for (start, end), mean in zip(itertools.pairwise([0, 63, 119]), measured, strict=True):
                assert mean == pytest.approx(float(each[start:end].mean()), abs=1e-4)
    assert curve.source != curve.result
    page = fitted.report.to_html()
    assert 'id="losses"' in page
    assert "calibration windows, on which it was fitted" in page
    trained = attnedit.calibrate(fitted, model, calibration=ids, distill_steps=1, batch_size=2, seq_len=100)
    again = trained.report.loss_curve
    assert again is not None
    assert again.ends == [64, 100]
    assert "has not seen" in again.data
    assert compile_tiny(model, 0.5, alternations=1).report.loss_curve is None


def test_memory_names_what_a_gpu_held(monkeypatch: pytest.MonkeyPatch) -> None:
    assert used_memory()["gpu_memory_bytes"] is None or torch.cuda.is_available()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda gpu: (gpu + 1) * 2**30)
    used = used_memory()
    assert used["gpu_memory_bytes"] == 3 * 2**30
    report = half("llama").report.model_copy(update={**used, "peak_memory_bytes": 2**30})
    assert report.memory == "1.00 GiB at most, 3.00 GiB on GPUs"
    assert "memory     1.00 GiB at most, 3.00 GiB on GPUs" in str(report)
    assert report.model_copy(update={"gpu_memory_bytes": None}).memory == "1.00 GiB at most"

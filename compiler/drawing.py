"""Graphs as SVG, and dumps of graphs before and after a pass.

Layers of nodes by their longest way from an argument; within a layer nodes stand below what they read (barycentres,
Sugiyama, Tagawa and Toda 1981). No program outside Python is needed.
"""

from __future__ import annotations

import re
from html import escape
from os import PathLike
from pathlib import Path
from typing import Any

from torch import fx

from attnedit.compiler import provenance
from attnedit.compiler.dataflow import is_size
from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph_text import as_text, node_names, target_text

_WIDTH, _HEIGHT, _GAP_X, _GAP_Y = 190, 34, 16, 34
_COLOURS = {"placeholder": "#dbe9f6", "call_module": "#d8efd3", "get_attr": "#f3e6c4", "output": "#dddddd"}
_NEW, _PLAIN, _ANCHOR = "#f8c9c0", "#ffffff", "#e5d5f2"


def to_svg(graph: fx.Graph, title: str = "") -> str:
    """Draw a graph: arguments on top, nodes that a rewrite made in red, attention in violet.

    Nodes that only read sizes are left out.
    """
    shown = [node for node in graph.nodes if not is_size(node) and (node.users or node.op != "placeholder")]
    places, width, height = _layout(shown)
    names = node_names(graph)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + 30}" '
        'font-family="monospace" font-size="11">',
        f'<text x="8" y="18" font-size="13">{escape(title)}</text>',
        '<g transform="translate(0 30)">',
    ]
    for node in shown:
        for source in dict.fromkeys(n for n in node.all_input_nodes if n in places):
            parts.append(_edge(places[source], places[node]))
    parts += [_box(node, names[node], *places[node]) for node in shown]
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _layout(nodes: list[fx.Node]) -> tuple[dict[fx.Node, tuple[float, float]], float, float]:
    """Top left corner of every node, and the size of the drawing."""
    inside = set(nodes)
    depth: dict[fx.Node, int] = {}
    for node in nodes:  # sources come first
        depth[node] = 1 + max((depth[n] for n in node.all_input_nodes if n in inside), default=-1)
    for node in reversed(nodes):  # arguments and weights stand just above what first reads them
        if node.op in ("placeholder", "get_attr"):
            depth[node] = max(0, min((depth[user] for user in node.users if user in inside), default=1) - 1)
    layers: list[list[fx.Node]] = [[] for _ in range(1 + max(depth.values(), default=0))]
    for node in nodes:
        layers[depth[node]].append(node)
    rank: dict[fx.Node, float] = {}
    for layer in layers:
        for index, node in enumerate(layer):
            above = [rank[n] for n in node.all_input_nodes if n in rank]
            rank[node] = sum(above) / len(above) if above else index / max(len(layer), 1)
        layer.sort(key=rank.__getitem__)
        for index, node in enumerate(layer):
            rank[node] = (index + 0.5) / len(layer)
    width = max((len(layer) for layer in layers), default=1) * (_WIDTH + _GAP_X) + _GAP_X
    places: dict[fx.Node, tuple[float, float]] = {}
    for row, layer in enumerate(layers):
        for node in layer:
            places[node] = (rank[node] * (width - _GAP_X) + (_GAP_X - _WIDTH) / 2, row * (_HEIGHT + _GAP_Y))
    return places, width, len(layers) * (_HEIGHT + _GAP_Y)


def _edge(source: tuple[float, float], node: tuple[float, float]) -> str:
    x, y = source[0] + _WIDTH / 2, source[1] + _HEIGHT
    to_x, to_y = node[0] + _WIDTH / 2, node[1]
    middle = (y + to_y) / 2
    path = f"M{x:.0f} {y:.0f} C{x:.0f} {middle:.0f} {to_x:.0f} {middle:.0f} {to_x:.0f} {to_y:.0f}"
    return f'<path d="{path}" fill="none" stroke="#888"/>'


def _box(node: fx.Node, name: str, x: float, y: float) -> str:
    value: Any = node.meta.get("val")
    shape = f" {[str(size) for size in value.shape]}".replace("'", "") if hasattr(value, "shape") else ""
    target = "" if node.op in ("placeholder", "output") else target_text(node.target)
    made = [rule for rule in provenance.rules(node) if ":" in rule or rule.startswith("attnedit.")]
    colour = _NEW if made else _ANCHOR if "attnedit" in target else _COLOURS.get(node.op, _PLAIN)
    hint = escape(f"{node.op} {target}{shape}{' by ' + ', '.join(made) if made else ''}")
    lines = [name.removeprefix("%"), target.removeprefix("aten.") or node.op]
    text = "".join(
        f'<text x="{x + 6:.0f}" y="{y + 14 + 14 * i:.0f}">{escape(line[:26])}</text>' for i, line in enumerate(lines)
    )
    return (
        f'<g><title>{hint}</title><rect x="{x:.0f}" y="{y:.0f}" width="{_WIDTH}" height="{_HEIGHT}" rx="4" '
        f'fill="{colour}" stroke="#555"/>{text}</g>'
    )


class Dump:
    """Writes graphs before and after each pass into a directory, as text and SVG; equal pairs once.

    Args:
        directory: where to; made if it is missing. None writes nothing.

    Raises:
        UsageError: it cannot be made.
    """

    def __init__(self, directory: str | PathLike[str] | None) -> None:
        self._directory = None if directory is None else Path(directory).expanduser()
        self._seen: set[tuple[str, str, str]] = set()
        self._passes: list[str] = []
        try:
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"graphs cannot be written to {self._directory}: {error.strerror or error}") from error

    def __call__(self, rule: str, site: str, before: fx.GraphModule, after: fx.GraphModule) -> None:
        """Write ``NN-RULE.SITE.before`` and ``.after``, unless an earlier site of the pass gave the same."""
        if self._directory is None:
            return
        if rule not in self._passes:
            self._passes.append(rule)
        texts = [_without_layer(as_text(graph)) for graph in (before, after)]
        if (rule, *texts) in self._seen:
            return
        self._seen.add((rule, texts[0], texts[1]))
        stem = f"{1 + self._passes.index(rule):02}-{re.sub(r'[^A-Za-z0-9_.-]', '_', f'{rule}.{site}')}"
        for when, graph in (("before", before), ("after", after)):
            (self._directory / f"{stem}.{when}.txt").write_text(as_text(graph), encoding="utf-8")
            drawing = to_svg(graph.graph, f"{site} {when} {rule}")
            (self._directory / f"{stem}.{when}.svg").write_text(drawing, encoding="utf-8")


def _without_layer(text: str) -> str:
    return re.sub(r"(attnedit\.\w+\.default\(.*), -?\d+\)", r"\1)", text)

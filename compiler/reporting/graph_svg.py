"""Drawings of FX graphs: one box per node, values flow downwards; plain SVG that any browser shows.

Layout in layers: longest paths give the rows, long edges get a point in every row they cross, barycentres give the
order in a row (Sugiyama et al. 1981, IEEE SMC-11).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable
from html import escape
from statistics import fmean
from typing import Any

import networkx as nx
from pydantic import BaseModel, ConfigDict
from torch import fx

from attnedit.compiler.graph.dataflow import is_size

CHARACTER, LINE, PADDING, GAP, ROW_GAP = 6.6, 15, 8, 14, 26
SWEEPS = 12
COLOURS = {
    "placeholder": "#e8eef7",
    "get_attr": "#f3f0e6",
    "call_module": "#dcefe3",
    "call_function": "#ffffff",
    "call_method": "#ffffff",
    "output": "#e8eef7",
}
NEW = "#ffe3b8"

Row = list[Any]


class NodeSketch(BaseModel):
    """One node of a graph as it is drawn.

    Attributes:
        name: of the node.
        op: "placeholder", "call_module", ..., as `torch.fx` names it.
        label: what it does.
        shape: of its value; empty if not known.
        inputs: names of the nodes that it reads.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    op: str
    label: str
    shape: str = ""
    inputs: list[str]


class GraphSketch(BaseModel):
    """What a drawing shows of a graph; JSON values only."""

    model_config = ConfigDict(frozen=True)

    nodes: list[NodeSketch]


def sketch(graph: fx.Graph) -> GraphSketch:
    """Reduce a graph to what is drawn: without inputs that nothing reads, and without sizes read off tensors."""
    nodes = [node for node in graph.nodes if (node.users or node.op != "placeholder") and not is_size(node)]
    symbols = _symbols(nodes)
    return GraphSketch(
        nodes=[
            NodeSketch(
                name=node.name,
                op=node.op,
                label=_label(node),
                shape=_shape(node, symbols),
                inputs=[other.name for other in node.all_input_nodes if other in nodes],
            )
            for node in nodes
        ]
    )


def graph_svg(graph: fx.Graph, title: str) -> str:
    """Draw a graph as SVG.

    Args:
        graph: any FX graph, such as ``result.graph.graph`` or that of an attention site.
        title: above the drawing.

    Returns:
        One SVG document.
    """
    return sketch_svg(sketch(graph), title)


def sketch_svg(drawn: GraphSketch, title: str, new: Collection[str] = ()) -> str:
    """Draw a sketch as SVG, nodes of `new` names in another colour."""
    nodes = {node.name: node for node in drawn.nodes}
    rows, paths = _rows(drawn)
    sizes = {place: _width(nodes[place]) if isinstance(place, str) else 2.0 for row in rows for place in row}
    x = _positions(rows, paths, sizes)
    title_height = 2 * LINE
    height = {name: LINE * (2 if node.shape else 1) + PADDING for name, node in nodes.items()}
    tops, bottoms, y = [], [], float(title_height)
    for row in rows:
        tops.append(y)
        bottoms.append(y + max((height[place] for place in row if isinstance(place, str)), default=LINE))
        y = bottoms[-1] + ROW_GAP
    row_of = {place: index for index, row in enumerate(rows) for place in row}
    width = max([x[place] + sizes[place] / 2 for place in x] + [CHARACTER * len(title)]) + PADDING
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y:.0f}" width="{width:.0f}" '
        f'height="{y:.0f}" role="img" style="background:#fff" font-size="11" '
        'font-family="ui-monospace, Menlo, Consolas, monospace">',
        f"<title>{escape(title)}</title>",
        f'<text x="{PADDING}" y="{LINE}" font-weight="bold" fill="#24292f">{escape(title)}</text>',
    ]
    for path in paths:
        first, *passed, last = path
        points = [(x[first], tops[row_of[first]] + height[first])]
        points += [(x[place], edge[row_of[place]]) for place in passed for edge in (tops, bottoms)]
        parts.append(_curve([*points, (x[last], tops[row_of[last]])]))
    for name, node in nodes.items():
        colour = NEW if name in new else COLOURS.get(node.op, "#ffffff")
        parts.append(_box(node, x[name], tops[row_of[name]], sizes[name], height[name], colour))
    return "\n".join([*parts, "</svg>"])


def _label(node: fx.Node) -> str:
    if node.op == "call_module":
        owner = node.graph.owning_module
        found = dict(owner.named_modules()).get(str(node.target)) if owner is not None else None
        return f"{node.target}" + (f" ({type(found).__name__})" if found is not None else "")
    if node.op == "call_function":
        target = str(node.target)
        if "." in target and "<" not in target:
            return target.rpartition(".")[0]  # "aten.mul.Tensor": the overload says nothing here
        return str(getattr(node.target, "__name__", target))
    if node.op == "call_method":
        return f".{node.target}"
    return str(node.target)


def _symbols(nodes: list[fx.Node]) -> dict[str, str]:
    """Batch and length, as the first value with three dimensions has them, by the names that tracing gave them."""
    for node in nodes:
        shape = getattr(node.meta.get("val"), "shape", ())
        if len(shape) == 3:
            return {str(size): letter for size, letter in zip(shape, "BT", strict=False) if not isinstance(size, int)}
    return {}


def _shape(node: fx.Node, symbols: dict[str, str]) -> str:
    shape = getattr(node.meta.get("val"), "shape", None)
    return "" if shape is None else f"[{', '.join(symbols.get(str(size), str(size)) for size in shape)}]"


def _width(node: NodeSketch) -> float:
    return CHARACTER * max(len(node.label), len(node.shape)) + 2 * PADDING


def _rows(drawn: GraphSketch) -> tuple[list[Row], list[Row]]:
    """Rows of places (names; (name, row) where an edge only passes), and each edge as the places it goes through."""
    graph = nx.DiGraph()
    graph.add_nodes_from(node.name for node in drawn.nodes)
    graph.add_edges_from((source, node.name) for node in drawn.nodes for source in node.inputs if source in graph)
    depth = {name: row for row, names in enumerate(nx.topological_generations(graph)) for name in names}
    for name in reversed(list(nx.topological_sort(graph))):
        users = list(graph.successors(name))
        if users and not graph.in_degree(name):
            depth[name] = min(depth[user] for user in users) - 1  # an input stands where it is used first
    rows: list[Row] = [[] for _ in range(max(depth.values(), default=0) + 1)]
    for name in graph:
        rows[depth[name]].append(name)
    paths = []
    for node in drawn.nodes:
        for user in graph.successors(node.name):
            passed = [(node.name, row) for row in range(depth[node.name] + 1, depth[user])]
            for place in passed:
                if place not in rows[place[1]]:  # edges of one value run together
                    rows[place[1]].append(place)
            paths.append([node.name, *passed, user])
    return rows, paths


def _positions(rows: list[Row], paths: list[Row], sizes: dict[Any, float]) -> dict[Any, float]:
    """Middle of every place on the x axis, neighbours apart and the drawing starting at 0."""
    above: dict[Any, set[Any]] = {place: set() for row in rows for place in row}
    below: dict[Any, set[Any]] = {place: set() for row in rows for place in row}
    for path in paths:
        for upper, lower in itertools.pairwise(path):
            above[lower].add(upper)
            below[upper].add(lower)
    x: dict[Any, float] = {}
    for row in rows:
        _spread(row, {place: float(index) for index, place in enumerate(row)}, sizes, x)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        neighbours = above if down else below
        for row in rows if down else reversed(rows):
            wanted = {place: fmean(x[n] for n in neighbours[place]) if neighbours[place] else x[place] for place in row}
            row.sort(key=wanted.__getitem__)
            _spread(row, wanted, sizes, x)
    for row in rows:  # both sides at the end, the order as it is
        both: Callable[[Any], Iterable[float]] = lambda place: (x[n] for n in (*above[place], *below[place]))  # noqa: E731
        wanted = {place: fmean(both(place)) if above[place] or below[place] else x[place] for place in row}
        _spread(row, wanted, sizes, x)
    left = min((x[place] - sizes[place] / 2 for place in x), default=0.0)
    return {place: middle - left + PADDING for place, middle in x.items()}


def _spread(row: Row, wanted: dict[Any, float], sizes: dict[Any, float], x: dict[Any, float]) -> None:
    """Place a row in its order as close to what is wanted as sizes allow."""
    end = float("-inf")
    for place in row:
        x[place] = max(wanted[place], end + sizes[place] / 2 + GAP)
        end = x[place] + sizes[place] / 2
    shift = fmean(wanted[place] - x[place] for place in row) if row else 0.0
    for place in row:
        x[place] += shift


def _curve(points: list[tuple[float, float]]) -> str:
    (x, y), *rest = points
    path = [f"M{x:.1f},{y:.1f}"]
    for next_x, next_y in rest:
        middle = (y + next_y) / 2
        path.append(f"C{x:.1f},{middle:.1f} {next_x:.1f},{middle:.1f} {next_x:.1f},{next_y:.1f}")
        x, y = next_x, next_y
    return f'<path d="{" ".join(path)}" fill="none" stroke="#8c959f" stroke-width="1.1"/>'


def _box(node: NodeSketch, x: float, y: float, width: float, height: float, colour: str) -> str:
    text = f'<tspan x="{x:.1f}" y="{y + LINE - 1:.1f}">{escape(node.label)}</tspan>'
    if node.shape:
        text += f'<tspan x="{x:.1f}" dy="{LINE}" fill="#57606a">{escape(node.shape)}</tspan>'
    return (
        f'<g><title>{escape(node.name)}</title><rect x="{x - width / 2:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height}" rx="4" fill="{colour}" stroke="#8c959f"/>'
        f'<text text-anchor="middle" fill="#24292f">{text}</text></g>'
    )

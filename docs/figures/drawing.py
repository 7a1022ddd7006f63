"""Boxes, arrows, lines and charts as SVG text, in the colours of attnedit's own drawings of graphs.

Everything stands on white, so that a drawing reads alike on a light and on a dark page. Lengths are in pixels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

BLUE, GREEN, ORANGE, SAND, WHITE, GREY = "#e8eef7", "#dcefe3", "#ffe3b8", "#f3f0e6", "#ffffff", "#eaeef2"
EDGE, TEXT, FAINT = "#8c959f", "#24292f", "#57606a"
LINES = ["#24292f", "#0969da", "#1a7f37", "#bc4c00", "#8250df", "#bf3989", "#9a6700", "#57606a"]
"""Colours of curves and bars, dark enough on white."""
FONT = "ui-monospace, Menlo, Consolas, monospace"
CHARACTER = 0.6
"""Width of a character over the size of the font."""


class Drawing:
    """Parts of one drawing, in the order in which they are painted."""

    def __init__(self, title: str, width: float, height: float, *, size: float = 12) -> None:
        self.title, self.width, self.height, self.size = title, width, height, size
        self._parts: list[str] = []

    def svg(self) -> str:
        """All of it."""
        head = (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width:g} {self.height:g}" '
            f'width="{self.width:g}" height="{self.height:g}" role="img" style="background:#fff" '
            f'font-size="{self.size:g}" font-family="{FONT}">'
        )
        # A rectangle too: some viewers paint no background that a style asks for.
        ground = f'<rect width="{self.width:g}" height="{self.height:g}" rx="6" fill="#fff"/>'
        return "\n".join([head, f"<title>{escape(self.title)}</title>", ground, *self._parts, "</svg>"])

    def text(
        self,
        x: float,
        y: float,
        lines: str | Sequence[str],
        *,
        anchor: str = "start",
        fill: str = TEXT,
        bold: bool = False,
        size: float | None = None,
    ) -> None:
        """Write lines, the first with its baseline at y."""
        lines = [lines] if isinstance(lines, str) else lines
        weight = ' font-weight="bold"' if bold else ""
        points = f' font-size="{size:g}"' if size else ""
        for index, line in enumerate(lines):
            place = y + index * (size or self.size) * 1.35
            style = f'text-anchor="{anchor}" fill="{fill}"{weight}{points}'
            self._parts.append(f'<text x="{x:g}" y="{place:g}" {style}>{escape(line)}</text>')

    def box(
        self,
        x: float,
        y: float,
        width: float,
        height: float,
        lines: str | Sequence[str] = (),
        *,
        fill: str = WHITE,
        edge: str = EDGE,
        dashed: bool = False,
        radius: float = 4,
        bold: bool = False,
    ) -> None:
        """Draw a box with lines of text in its middle."""
        lines = [lines] if isinstance(lines, str) else lines
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        self._parts.append(
            f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" fill="{fill}" '
            f'stroke="{edge}"{dash}/>'
        )
        step = self.size * 1.35
        top = y + height / 2 - (len(lines) - 1) * step / 2 + self.size * 0.35
        for index, line in enumerate(lines):
            self.text(x + width / 2, top + index * step, line, anchor="middle", bold=bold and not index)

    def line(
        self,
        points: Sequence[tuple[float, float]],
        *,
        colour: str = EDGE,
        width: float = 1.3,
        dashed: bool = False,
        arrow: bool = False,
    ) -> None:
        """Draw a line through points, with a head at its end if it is an arrow."""
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        path = " L".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self._parts.append(f'<path d="M{path}" fill="none" stroke="{colour}" stroke-width="{width:g}"{dash}/>')
        if arrow:
            (x0, y0), (x1, y1) = points[-2:]
            angle, length = math.atan2(y1 - y0, x1 - x0), 7.0
            ends = [(x1 - length * math.cos(angle + s), y1 - length * math.sin(angle + s)) for s in (0.45, -0.45)]
            corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in [(x1, y1), *ends])
            self._parts.append(f'<polygon points="{corners}" fill="{colour}"/>')

    def dot(self, x: float, y: float, colour: str, radius: float = 3) -> None:
        """Draw a filled circle."""
        self._parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}" fill="{colour}"/>')


def curves(
    title: str,
    x_labels: Sequence[str],
    series: Sequence[tuple[str, Sequence[float], bool]],
    ticks: Sequence[float],
    *,
    logarithmic: bool = False,
    x_title: str = "",
) -> Drawing:
    """Curves over a few named places, each with its name at its right end.

    Args:
        title: above the curves.
        x_labels: the places.
        series: name, a value for each place, and whether the line is dashed.
        ticks: of the vertical axis, the lowest and the highest included.
        logarithmic: the vertical axis.
        x_title: below the places.
    """
    scale = math.log if logarithmic else float
    low, high = scale(ticks[0]), scale(ticks[-1])
    left, top, wide, tall = 52.0, 44.0, 330.0, 230.0
    names = 12 + CHARACTER * 11 * max(len(name) for name, *_ in series)
    drawing = Drawing(title, left + wide + names + 12, top + tall + 52, size=11)
    drawing.text(10, 22, title, bold=True, size=12)

    def place(index: int, value: float) -> tuple[float, float]:
        share = (scale(value) - low) / (high - low)
        return left + wide * (index + 0.5) / len(x_labels), top + tall * (1 - share)

    for tick in ticks:
        y = place(0, tick)[1]
        drawing.line([(left, y), (left + wide, y)], colour=GREY, width=1)
        drawing.text(left - 6, y + 4, f"{tick:g}", anchor="end", fill=FAINT)
    for index, label in enumerate(x_labels):
        drawing.text(place(index, ticks[0])[0], top + tall + 18, label, anchor="middle", fill=FAINT)
    drawing.text(left + wide / 2, top + tall + 38, x_title, anchor="middle", fill=FAINT)
    ends = []
    for number, (name, values, dashed) in enumerate(series):
        points = [place(index, value) for index, value in enumerate(values)]
        colour = LINES[number % len(LINES)]
        drawing.line(points, colour=colour, width=1.8, dashed=dashed)
        for x, y in points:
            drawing.dot(x, y, colour)
        ends.append((points[-1][1], name, colour))
    _names(drawing, left + wide + 8, sorted(ends), top + tall)
    return drawing


def _names(drawing: Drawing, x: float, ends: Sequence[tuple[float, str, str]], bottom: float) -> None:
    """Write names at the heights where curves end, apart from each other."""
    heights = [y for y, _, _ in ends]
    for index in range(1, len(heights)):
        heights[index] = max(heights[index], heights[index - 1] + 14)
    over = heights[-1] - bottom
    if over > 0:
        heights[-1] = bottom
        for index in range(len(heights) - 2, -1, -1):
            heights[index] = min(heights[index], heights[index + 1] - 14)
    for y, (_, name, colour) in zip(heights, ends, strict=True):
        drawing.text(x, y + 4, name, fill=colour)


def bars(
    title: str,
    groups: Sequence[tuple[str, Sequence[tuple[str, float, str]]]],
    *,
    note: str = "",
    apart: bool = False,
) -> Drawing:
    """Horizontal bars in groups.

    Args:
        title: above them.
        groups: a heading, and for each bar its name, its value and what is written at its end.
        note: a line below.
        apart: whether each group has a scale of its own, as one of another unit must.
    """
    most = max(value for _, rows in groups for _, value, _ in rows)
    names = 12 + CHARACTER * 11 * max(len(name) for _, rows in groups for name, *_ in rows)
    ends = CHARACTER * 11 * max(len(end) for _, rows in groups for *_, end in rows)
    wide, left = 270.0, names + 12
    height = 40 + sum(24 + 22 * len(rows) for _, rows in groups) + (24 if note else 4)
    width = max(left + wide + ends, CHARACTER * 11 * len(note)) + 20
    drawing = Drawing(title, width, height, size=11)
    drawing.text(10, 22, title, bold=True, size=12)
    y = 40.0
    for heading, rows in groups:
        most = max(value for _, value, _ in rows) if apart else most
        drawing.text(10, y + 12, heading, fill=FAINT)
        y += 20
        for index, (name, value, end) in enumerate(rows):
            drawing.text(left - 8, y + 13, name, anchor="end")
            fill = [SAND, GREEN, BLUE, ORANGE, GREY][index % 5]
            drawing.box(left, y + 2, max(wide * value / most, 1.5), 16, fill=fill, radius=2)
            drawing.text(left + wide * value / most + 6, y + 14, end)
            y += 22
        y += 4
    drawing.text(10, y + 12, note, fill=FAINT)
    return drawing

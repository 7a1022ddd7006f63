"""The report as one HTML file that needs nothing else: no script, no font, no other file."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from attnedit.compiler.capture.sites import by_reason
from attnedit.compiler.reporting.graph_svg import sketch_svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from attnedit.compiler.reporting.report import Report

TEMPLATE = Path(__file__).with_name("report.html.j2")
SOURCE, RESULT, ROTARY, SOFT = "#8c959f", "#0f766e", "#d97706", "#57606a"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e9ed",
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text
}
SIZES = ("B", "KiB", "MiB", "GiB", "TiB")


class Tile(NamedTuple):
    """One figure at the head of the report."""

    name: str
    value: str
    more: str


def report_html(report: Report) -> str:
    """Write a report as HTML."""
    cells = report.columns()
    return _template().render(
        title=f"{report.source} to {report.target}",
        report=report,
        tiles=_tiles(report),
        memory=_memory(report),
        losses=_losses(report),
        layers=_layers(report),
        left=by_reason(report.left.items()),
        columns=["layer", "attention", "becomes", *cells],
        rows=[
            [str(row.layer), row.name, row.kind, *(column[index] for column in cells.values())]
            for index, row in enumerate(report.layers)
        ],
        graphs=_graphs(report),
        checks=_checks(report),
        recipe=json.dumps(report.recipe, indent=2) if report.recipe else "",
    )


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8"))


def _tiles(report: Report) -> list[Tile]:
    asked = "" if report.kv_budget_asked is None else f"; asked for {report.kv_budget_asked:.4g}"
    less = report.kv_bytes_before / report.kv_bytes_after
    tiles = [
        Tile("Key/value cache", f"{less:.3g}× smaller", f"at {report.context_length:,} tokens of context"),
        Tile(
            "Bytes per token",
            f"{report.kv_bytes_after:,.0f}",
            f"from {report.kv_bytes_before:,.0f}; {report.kv_budget_achieved:.4g} of the values{asked}",
        ),
    ]
    errors = sorted(row.output_error for row in report.layers if row.output_error is not None)
    if errors:
        middle = errors[len(errors) // 2]
        tiles.append(Tile("Output error per layer", f"{middle:.2g}", f"median before training; worst {errors[-1]:.2g}"))
    if "source" in report.perplexity:
        last = list(report.perplexity)[-1]
        tiles.append(
            Tile(
                "Perplexity, held out",
                f"{report.perplexity[last]:.2f}",
                f"after {last}; source {report.perplexity['source']:.2f}",
            )
        )
    return tiles


def _checks(report: Report) -> list[str]:
    lines = [f"verified: {check}" for check in report.verification]
    if report.calibration:
        lines.append(f"calibrated on {report.calibration_tokens:,} tokens of {report.calibration}")
    if report.seconds:
        stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items())
        lines.append(f"{stages}; memory: {report.memory}")
    if report.license:
        lines.append(f"licence of the source: {report.license}")
    return lines


def _graphs(report: Report) -> list[dict[str, Any]]:
    drawn = []
    for graphs in report.graphs:
        old = {(node.name, node.label) for node in graphs.before.nodes}
        new = [node.name for node in graphs.after.nodes if (node.name, node.label) not in old]
        gone = {node.name for node in graphs.after.nodes}
        lost = [node.name for node in graphs.before.nodes if node.name not in gone]
        layers = f"layer {graphs.layers[0]}" + (f", and {len(graphs.layers) - 1} alike" if graphs.layers[1:] else "")
        drawn.append(
            {
                "title": layers,
                "before": Markup(sketch_svg(graphs.before, "source", lost)),
                "after": Markup(sketch_svg(graphs.after, graphs.kind, new)),
            }
        )
    return drawn


def _memory(report: Report) -> Markup | None:
    """Memory against context length, of source and result."""
    curve = report.kv_curve
    if curve is None:
        return None
    top = max(max(curve.before), 1)
    unit = min(len(SIZES) - 1, (int(top).bit_length() - 1) // 10)
    figure, axes = _figure(3.2)
    for name, values, colour in (("source", curve.before, SOURCE), ("result", curve.after, RESULT)):
        scaled = [value / 1024**unit for value in values]
        axes.plot(curve.lengths, scaled, color=colour, linewidth=2.2)
        text = f"{name}, {scaled[-1]:.3g} {SIZES[unit]}"
        axes.annotate(text, (curve.lengths[-1], scaled[-1]), (6, -3), textcoords="offset points", color=colour)
    axes.set_xlabel("tokens of context")
    axes.set_ylabel(SIZES[unit])
    axes.set_xlim(0, curve.lengths[-1])
    axes.set_ylim(0, None)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    return _svg(figure, "memory")


def _losses(report: Report) -> Markup | None:
    """Loss against position, of source and result."""
    curve = report.loss_curve
    if curve is None:
        return None
    figure, axes = _figure(3.2)
    for name, values, colour in (("source", curve.source, SOURCE), ("result", curve.result, RESULT)):
        axes.plot(
            curve.ends, values, "o-", color=colour, linewidth=2.2, markersize=4, label=f"{name}, {values[-1]:.3f}"
        )
    axes.set_xlabel("tokens before, up to")
    axes.set_ylabel("loss, nats per token")
    axes.set_xscale("log", base=2)
    axes.set_xticks(curve.ends, [f"{end:,}" for end in curve.ends])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return _svg(figure, "losses")


def _layers(report: Report) -> Markup:
    """Cached values, energy and error, layer by layer, below one another."""
    from matplotlib.ticker import LogFormatter

    rows = report.layers
    layers = [row.layer for row in rows]
    panels: list[tuple[str, Sequence[float | None]]] = [
        ("energy lost", [None if row.energy_kept is None else max(1 - row.energy_kept, 1e-12) for row in rows]),
        ("output error", [row.output_error for row in rows]),
        ("loss of this layer alone", [row.loss_increase for row in rows]),
    ]
    panels = [(name, values) for name, values in panels if any(value is not None for value in values)]
    figure, first = _figure(2.4 + 1.5 * len(panels), 1 + len(panels))
    axes = [first] if not panels else list(first)
    _values(axes[0], report, layers)
    for panel, (name, values) in zip(axes[1:], panels, strict=True):
        known = [(layer, value) for layer, value in zip(layers, values, strict=True) if value is not None]
        panel.plot(*zip(*known, strict=True), "o-", color=RESULT, markersize=4, linewidth=1.2)
        panel.set_ylabel(name)
        if all(value > 0 for _, value in known):
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(LogFormatter())  # plain text, which is quicker and stays text
            panel.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.4)))
    axes[-1].set_xlabel("layer")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    for panel in axes:
        panel.set_xlim(min(layers) - 0.6, max(layers) + 0.6)
    return _svg(figure, "layers")


def _values(axes: Any, report: Report, layers: list[int]) -> None:
    rows = report.layers
    axes.bar(layers, [row.values_before for row in rows], color="#e3e7eb", width=0.8, label="source")
    # A layer with a window has values for few tokens: its height is the average over the context.
    latent = [row.kv_lora_rank or 0 for row in rows]
    rotary = [row.qk_rope_head_dim or 0 for row in rows]
    other = [0 if row.kv_lora_rank else row.values_after for row in rows]
    bottom = [0.0] * len(rows)
    for name, heights, colour in (
        ("latent", latent, RESULT),
        ("rotary", rotary, ROTARY),
        ("window or source, mean over the context", other, "#7aa7d9"),
    ):
        if any(heights):
            axes.bar(layers, heights, bottom=bottom, color=colour, width=0.5, label=name)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    axes.set_ylabel("cached values\nper token")
    axes.legend(ncols=4, frameon=False, loc="lower right", bbox_to_anchor=(1, 1.0), borderaxespad=0.2)


def _figure(height: float, panels: int = 1) -> tuple[Figure, Any]:
    # A figure of its own: pyplot keeps state, and its backend is not ours to choose.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(9.0, height))
        return figure, figure.subplots(panels, sharex=True, gridspec_kw={"hspace": 0.18})


def _svg(figure: Figure, salt: str) -> Markup:
    """Inline SVG, the same for the same report; names inside differ between figures of a page."""
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = buffer.getvalue()
    return Markup(text[text.index("<svg") :])

"""What ``attnedit eval`` shows: figures as ``--json`` prints them, and tables of them.

Lists of losses or answers hold those of the model first, then those of the model compared with if there is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from torch import Tensor

from attnedit.compiler.evaluation.evaluate import mean_perplexity
from attnedit.compiler.evaluation.intervals import Interval, exponential, interval_of_exponential
from attnedit.compiler.evaluation.positions import losses_by_position
from attnedit.compiler.evaluation.retrieval import OPTIONS, Answer, scores, scores_by_length
from attnedit.compiler.reporting.records import KVUsage

Figures = dict[str, Any]


def perplexity_figures(losses: Sequence[Tensor], usage: KVUsage) -> Figures:
    """Quality and cost of one model; with a second one, what it has and the ratio to it."""
    figures = {
        **asdict(mean_perplexity(losses[0])),
        "seq_len": losses[0].shape[1] + 1,
        "kv_values_per_token_layer": usage.values_per_token_layer,
        "kv_bytes_per_token": usage.bytes_per_token,
    }
    if len(losses) > 1:
        rise = (losses[0].double() - losses[1].double()).mean(1)
        figures |= {
            "against_perplexity": mean_perplexity(losses[1]).perplexity,
            "ratio": exponential(float(rise.mean())),
            "ratio_interval": interval_of_exponential(rise),
        }
    return figures


def perplexity_table(names: Mapping[str, str], figures: Figures) -> RenderableType:
    """Lines for `perplexity_figures`."""
    lines = [
        f"perplexity {figures['perplexity']:.3f}{between(figures['interval'], '.3f')} on {figures['tokens']:,} tokens "
        f"({figures['windows']} windows of {figures['seq_len']})",
        f"KV cache   {figures['kv_values_per_token_layer']:g} values per token and layer, "
        f"{figures['kv_bytes_per_token']:,.0f} bytes per token",
    ]
    if "ratio" in figures:
        lines.insert(
            1,
            f"ratio      {figures['ratio']:.4f}{between(figures['ratio_interval'], '.4f')} to {names['against']}, "
            f"which has {figures['against_perplexity']:.3f}",
        )
    return Group(*lines)


def position_figures(losses: Sequence[Tensor]) -> Figures:
    """Perplexity by position of one model; with a second one, the ratios to it, and its own."""
    figures: Figures = {"seq_len": losses[0].shape[1] + 1, "windows": len(losses[0])}
    figures["by_position"] = [asdict(row) for row in losses_by_position(*losses)]
    if len(losses) > 1:
        figures["against_by_position"] = [asdict(row) for row in losses_by_position(losses[1])]
    return figures


def position_table(names: Mapping[str, str], figures: Figures) -> RenderableType:
    """A row per range of positions."""
    table = Table(title=f"{names['model']}: {figures['windows']} windows of {figures['seq_len']:,} tokens (95 %)")
    headings = ["tokens", "perplexity", *([names["against"], "ratio"] if "against" in names else [])]
    for heading in headings:
        table.add_column(heading, justify="right")
    for index, row in enumerate(figures["by_position"]):
        cells = [f"{row['start']:,}-{row['end']:,}", f"{row['perplexity']:.2f}{between(row['interval'], '.2f')}"]
        if "against" in names:
            other = figures["against_by_position"][index]
            cells.append(f"{other['perplexity']:.2f}{between(other['interval'], '.2f')}")
            cells.append(f"{row['ratio']:.4f}{between(row['ratio_interval'], '.4f')}")
        table.add_row(*cells)
    return table


def retrieval_figures(found: Sequence[Sequence[Answer]]) -> Figures:
    """Facts that one model found; with a second one, the differences to it, and its own."""
    figures: Figures = {}
    for prefix, mine, others in zip(("", "against_"), found, ([*found[1:]], []), strict=False):
        figures[f"{prefix}retrieval"] = [asdict(score) for score in scores(mine)]
        figures[f"{prefix}lengths"] = [asdict(score) for score in scores_by_length(mine, *others)]
    return figures


def retrieval_table(names: Mapping[str, str], figures: Figures) -> RenderableType:
    """A row per length: by depth, over all depths, and beside the model compared with."""
    rows = figures["retrieval"]
    depths = sorted({row["depth"] for row in rows})
    title = "facts found, by length of the text and depth of the fact"
    table = Table(title=f"{names['model']}: {title} (chance {1 / OPTIONS:.0%}, 95 %)")
    headings = [*(f"{depth:.0%}" for depth in depths), "all", "probability"]
    for heading in ["tokens", *headings, *([names["against"], "difference"] if "against" in names else [])]:
        table.add_column(heading, justify="right")
    for index, total in enumerate(figures["lengths"]):
        by_depth = {row["depth"]: row for row in rows if row["length"] == total["length"]}
        cells = [f"{by_depth[depth]['accuracy']:.0%}" for depth in depths]
        cells.append(f"{total['accuracy']:.1%}{between(total['interval'], '.0%')}")
        cells.append(f"{sum(row['probability'] for row in by_depth.values()) / len(by_depth):.2f}")
        if "against" in names:
            cells.append(f"{figures['against_lengths'][index]['accuracy']:.1%}")
            cells.append(f"{total['difference']:+.1%}{between(total['difference_interval'], '+.1%')}")
        table.add_row(f"{total['length']:,}", *cells)
    return table


def between(interval: Interval, form: str) -> str:
    """An interval in brackets after its figure; nothing where there is none.

    >>> between((1.0, 1.25), ".2f")
    ' (1.00 to 1.25)'
    """
    return "" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})"

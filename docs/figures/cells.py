"""Figures of ``docs/data``, and Markdown tables of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnedit.compiler.evaluation.intervals import interval_of_share

DOCS = Path(__file__).resolve().parents[1]
PROMPTS = 40
NUMBER = re.compile(r"[-+]?[\d,.]+( \(.*\))?$|not run$")


def data(name: str) -> Any:
    """One file of figures."""
    return json.loads((DOCS / "data" / f"{name}.json").read_text(encoding="utf-8"))


def with_interval(share: float | None, count: int = PROMPTS) -> str | None:
    """A share of prompts with its interval, in percent; None where it was not measured."""
    if share is None:
        return None
    low, high = (round(100 * end) for end in interval_of_share(share, count))
    return f"{100 * share:.0f} ({low}–{high})"


def measured(cell: list[float] | None, form: str = "g") -> str | None:
    """A figure with its interval, both written in a format."""
    return None if cell is None else f"{cell[0]:{form}} ({cell[1]:{form}}–{cell[2]:{form}})"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Markdown."""
    lines = [list(map(str, head)), *(list(map(_cell, row)) for row in rows)]
    columns = zip(*lines[1:], strict=True)
    lines.insert(1, ["---:" if all(NUMBER.match(cell) for cell in column) else "---" for column in columns])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _cell(value: object) -> str:
    if value is None:
        return "not run"
    return f"{value:,}" if isinstance(value, (int, float)) and value >= 1000 else str(value)

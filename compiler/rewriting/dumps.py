"""Dumps of graphs before and after each pass: text, and SVG with new nodes in another colour."""

from __future__ import annotations

import re
from os import PathLike
from pathlib import Path

from torch import fx

from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph import provenance
from attnedit.compiler.graph.graph_text import as_text
from attnedit.compiler.reporting.graph_svg import sketch, sketch_svg


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
            made = [node.name for node in graph.graph.nodes if provenance.made_by(node)]
            drawing = sketch_svg(sketch(graph.graph), f"{site} {when} {rule}", made)
            (self._directory / f"{stem}.{when}.svg").write_text(drawing, encoding="utf-8")


def _without_layer(text: str) -> str:
    return re.sub(r"(attnedit\.\w+\.default\(.*), -?\d+\)", r"\1)", text)

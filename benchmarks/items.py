"""What the benchmarks of tasks share: items in files, scores by cell, averages over cells beside a first model's.

A cell is a task, or a task at one length; all its items have a score each. Averages are over cells, each counts alike.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.intervals import Interval, interval_of_mean, percentiles, resampled_means

Item = dict[str, Any]
Cells = Mapping[str, Tensor]
"""Scores [N] of the items of each cell."""


def run_program(
    description: str, add_options: Callable[[argparse.ArgumentParser], None], run: Callable[[argparse.Namespace], None]
) -> None:
    """Read a command line with models, results and tables, and do what it says; `add_options` adds what is its own."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="as for attnedit eval; the first one is the source")
    add_options(parser)
    parser.add_argument("--results", type=Path, metavar="FILE", help="JSON with all answers and scores")
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="only show what these --results hold")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    try:
        run(options)
    except UsageError as error:
        parser.error(" ".join(str(error).split()))


def write_items(path: Path, items: Iterable[Item]) -> None:
    """One JSON object on each line; compressed if the name ends in .gz, and then always to the same bytes."""
    data = "".join(json.dumps(item) + "\n" for item in items).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def read_items(path: Path, fields: Sequence[str]) -> list[Item]:
    """What `write_items` wrote.

    Raises:
        UsageError: it cannot be read, holds nothing, or a line lacks one of the fields.
    """
    try:
        data = path.read_bytes()
        lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()
        items = [json.loads(line) for line in lines]
    except (OSError, ValueError, EOFError) as error:
        raise UsageError(f"cannot read {path}: {error}") from error
    for number, item in enumerate(items, start=1):
        missing = [field for field in fields if not isinstance(item, dict) or field not in item]
        if missing:
            raise UsageError(f"{path}, line {number}: there is no {missing[0]!r}; write the file with this program")
    if not items:
        raise UsageError(f"{path} holds no items")
    return items


def digest(items: Iterable[Item]) -> str:
    """Tells sets of items apart."""
    return hashlib.sha256(json.dumps(list(items)).encode()).hexdigest()[:16]


class Results:
    """Answers of models to items, kept in a file, so that what is done is not done again.

    Args:
        path: of the JSON file; None keeps nothing.
        items: that are answered.

    Raises:
        UsageError: the file holds answers to other items, or something else.
    """

    def __init__(self, path: Path | None, items: Sequence[Item]) -> None:
        self._path, self._digest = path, digest(items)
        self.models: dict[str, dict[str, list[Item]]] = {}
        if path is None or not path.exists():
            return
        found = read_results(path)
        if found["items"] != self._digest:
            raise UsageError(f"{path} holds results for other items; give another file, or delete it")
        self.models = found["models"]

    def answered(self, model: str, cell: str) -> bool:
        """Whether a model has answered the items of a cell."""
        return cell in self.models.get(model, {})

    def add(self, model: str, cell: str, answers: list[Item]) -> None:
        """Keep the answers of a model to the items of a cell; each has a score."""
        self.models.setdefault(model, {})[cell] = answers
        if self._path is not None:
            partial = self._path.with_name(self._path.name + ".partial")
            partial.write_text(json.dumps({"items": self._digest, "models": self.models}), encoding="utf-8")
            partial.replace(self._path)


def read_results(path: Path) -> dict[str, Any]:
    """The file that `Results` keeps.

    Raises:
        UsageError: it is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not {"items", "models"} <= found.keys():
            raise ValueError("it holds no results")
    except (OSError, ValueError, AttributeError) as error:
        raise UsageError(f"cannot read results from {path}: {error}") from error
    return dict(found)


def merged(paths: Sequence[Path]) -> dict[str, dict[str, list[Item]]]:
    """Results of several runs on the same items, by model.

    Raises:
        UsageError: they are of other items than those of the first file, or a file is none of results.
    """
    models: dict[str, dict[str, list[Item]]] = {}
    files = [(path, read_results(path)) for path in paths]
    for path, found in files:
        if found["items"] != files[0][1]["items"]:
            raise UsageError(f"{path} has results for other items than {paths[0]}; they cannot be compared")
        for model, cells in found["models"].items():
            models.setdefault(model, {}).update(cells)
    return models


def of_tables(options: argparse.Namespace) -> dict[str, dict[str, list[Item]]]:
    """Results that --table names, by model; none without it.

    Raises:
        UsageError: there are models beside it, or as of `merged`.
    """
    if options.table and options.models:
        raise UsageError("--table shows what was answered; give no MODEL with it")
    return merged(options.table or ())


def scores_of(cells: Mapping[str, list[Item]]) -> dict[str, Tensor]:
    """Scores of all answers, by cell."""
    return {cell: torch.tensor([answer["score"] for answer in answers]) for cell, answers in cells.items()}


def average(cells: Cells) -> tuple[float, Interval]:
    """Mean over cells of their means, with its interval over items drawn anew within each cell."""
    if len(cells) == 1:
        (values,) = cells.values()
        return float(values.double().mean()), interval_of_mean(values)
    return _mean(cells), None if _too_few(cells) else percentiles(_resampled(cells))


def ratio(cells: Cells, reference: Cells) -> tuple[float, Interval]:
    """Ratio of two models' averages, with its interval, paired: both on the same items drawn."""
    whole = _mean(reference)
    if not whole:
        return float("nan"), None
    below = _resampled(reference)
    paired = None if _too_few(cells) or not bool(below.all()) else percentiles(_resampled(cells) / below)
    return _mean(cells) / whole, paired


def figure(value: float, interval: Interval, form: str) -> str:
    """A value and its interval, for a table.

    >>> figure(0.5, (0.25, 0.75), ".2f")
    '0.50 (0.25-0.75)'
    """
    between = "" if interval is None else f" ({interval[0]:{form}}-{interval[1]:{form}})"
    return f"{value:{form}}{between}"


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean(cells: Cells) -> float:
    return sum(float(values.double().mean()) for values in cells.values()) / len(cells)


def _resampled(cells: Cells) -> Tensor:
    """Averages over cells, items drawn anew in each: the same for every model with the same cells."""
    return torch.stack([resampled_means(values, seed) for seed, values in enumerate(cells.values())]).mean(0)


def _too_few(cells: Cells) -> bool:
    return any(len(values) < 2 for values in cells.values())

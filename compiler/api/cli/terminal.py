"""What the commands share: output, progress, options."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from attnedit import run_directory
from attnedit.compiler.data.token_windows import shares_of
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import Source
from attnedit.compiler.processes import processes
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Hub name, model directory, .gguf file, or smollm2.", show_default=False)
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
SeedOption = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Same seed, same result.")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to save the result in.")]


def debugging() -> bool:
    """Whether tracebacks are wanted."""
    return os.environ.get("ATTNEDIT_DEBUG", "") not in ("", "0")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep what libraries log, warn and draw off stderr while inside: our own errors say what matters."""
    if debugging():
        yield
        return
    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub", "datasets")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()


def fail(message: str, code: int, *, as_json: bool) -> int:
    """Say in one line on stderr what is wrong; with ``--json`` say it on stdout too, as the one object there."""
    line = " ".join(message.split())
    print(f"attnedit: {line}", file=sys.stderr)
    if as_json:
        print_json({"error": line, "exit_code": code})
    return code


def print_json(value: Mapping[str, Any]) -> None:
    """Print one JSON object on stdout; numbers that are not finite become null."""
    print(json.dumps(_finite(value)))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value


def remark(line: str | None) -> None:
    """Say in one line on stderr what the user should know; nothing for None."""
    if line is not None:
        print(f"attnedit: {line}", file=sys.stderr)


def show(renderable: RenderableType) -> None:
    """Print a table or text on stdout."""
    Console(width=None if sys.stdout.isatty() else 120).print(renderable, highlight=False)


def check_output(directory: Path, *, overwrite: bool) -> None:
    """Refuse an output directory that holds something, before anything is computed.

    Raises:
        UsageError: it is a file, or a directory with something in it and ``overwrite`` is not given.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"{directory} is a file; give a directory for the output")
    if directory.is_dir() and any(directory.iterdir()) and not overwrite:
        raise UsageError(f"{directory} is not empty; give another output directory, or --overwrite")
    existing = next(parent for parent in (directory, *directory.absolute().parents) if parent.exists())
    if not existing.is_dir():
        raise UsageError(f"{directory} cannot be made ({existing} is a file); give another output directory")
    if not os.access(existing, os.W_OK):
        raise UsageError(f"{directory} cannot be written ({existing} is read-only); give another output directory")


def open_run(output: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the output directory a run directory, or go on with the run of the same recipe that it holds.

    Raises:
        UsageError: it holds something else, or the run of another recipe, and is not to be overwritten.
    """
    output = output.expanduser()
    if not processes().main:  # it comes here second
        return
    if overwrite or not (output / RUN_FILE).exists():
        check_output(output, overwrite=overwrite)
    run_directory.open_run(output, recipe, overwrite=overwrite)


def check_readable(path: str, what: str) -> None:
    """Refuse a file that is plainly missing, before anything is loaded; dataset names pass.

    Raises:
        UsageError: it is empty, or looks like a path and there is nothing.
    """
    if not path.strip():
        raise UsageError(f"no {what} is named; give a text, jsonl, json or parquet file, or a dataset's name")
    candidate = Path(path).expanduser()
    if not candidate.exists() and (candidate.suffix or path.startswith((".", "/", "~"))):
        raise UsageError(f"{what} {path} does not exist; give a text, jsonl, json or parquet file, or a dataset's name")


def calibration_source(given: list[str] | None) -> str | dict[str, float] | None:
    """What `--calibration` names: nothing, one source, or a mixture with weights.

    Raises:
        UsageError: a file that does not exist, a name given twice, or a weight that makes no sense.
    """
    if not given:
        return None
    mixture: dict[str, float] = {}
    for text in given:
        name, weight = text, 1.0
        head, equals, tail = text.rpartition("=")
        if equals and not Path(text).exists():
            try:
                name, weight = head, float(tail)
            except ValueError:
                raise UsageError(f"calibration {text!r}: {tail!r} is no weight; give NAME or NAME=WEIGHT") from None
        if name in mixture:
            raise UsageError(f"calibration {name} is given twice; give it once, with a weight")
        check_readable(name, "calibration text")
        mixture[name] = weight
    shares_of(mixture)
    return next(iter(mixture)) if len(mixture) == 1 else mixture


def check_tokenizer_there(source: Source, what: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a source whose text has to be tokenised.

    Raises:
        UsageError: it has none.
    """
    if source.tokenizer is None:
        raise UsageError(
            f"{source.name} holds no tokenizer, and {what} needs one; save the model's tokenizer in the same directory"
        )
    return source.tokenizer


class ProgressBars:
    """Draws one bar per stage on stderr while entered; draws nothing where stderr is no terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal or not processes().main,
        )
        self._stages: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressBars:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` steps of a stage are done."""
        if stage not in self._stages:
            self._stages[stage] = self._bars.add_task(stage, total=total, figures="")
        self._bars.update(self._stages[stage], completed=done, total=total)

    def describe(self, stage: str, figures: str) -> None:
        """Show figures, such as losses, beside a stage that has a bar."""
        self._bars.update(self._stages[stage], figures=figures)

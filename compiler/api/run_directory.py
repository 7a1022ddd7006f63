"""Output directories of runs that can be killed and gone on with."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.compiler.formats import FORMAT_KEY, check_format
from attnedit.options import CompileOptions
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE, check_free
from attnedit.targets.runtime.staging import beside

FORMAT_VERSION = 1
"""Of `RUN_FILE`."""


def check_run(output: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> bool:
    """Whether a directory holds a run of this recipe to go on with.

    Args:
        output: the directory.
        recipe: values that JSON can write; all that decides the result.
        overwrite: start again, whatever attnedit wrote there.

    Raises:
        UsageError: it holds something else, or the run of another recipe or format, and is not to be overwritten.
    """
    file = output / RUN_FILE
    if overwrite or not file.exists():
        check_free(output, overwrite)
        return False
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        there = values["recipe"]
    except (OSError, ValueError, KeyError, TypeError):
        values, there = {}, {}
    check_format(values, FORMAT_VERSION, str(file))
    defaults = {name: field.default for name, field in CompileOptions.model_fields.items()}
    for name in {**there, **recipe}:  # an option that there was none of when a run began has its default there
        before, now = there.get(name, defaults.get(name)), recipe.get(name)
        if before != now:
            raise UsageError(
                f"{output} holds an unfinished run of another recipe ({name} {before!r} there, {now!r} here); give its "
                "arguments to go on, another directory, or --overwrite"
            )
    return True


@contextmanager
def run_with_fits(output: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> Iterator[Path]:
    """Give a run directory for the block: that of an unfinished run, or one that nobody sees as long as all goes well.

    If the block fails with fits to keep, it becomes the run directory `output`. Interrupted, it leaves nothing.

    Raises:
        UsageError: see `open_run`.
    """
    if check_run(output, recipe, overwrite=overwrite):
        yield output
        return
    with beside(output) as hidden:
        try:
            yield hidden
        except Exception:
            if any(hidden.iterdir()):
                open_run(output, recipe, overwrite=overwrite)
                for part in hidden.iterdir():
                    part.rename(output / part.name)
            raise


def open_run(output: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make a directory a run directory, or go on with the run that it holds; see `check_run`.

    Raises:
        UsageError: it is not free, or cannot be written.
    """
    if check_run(output, recipe, overwrite=overwrite):
        return
    try:
        if output.exists():
            shutil.rmtree(output)
        output.mkdir(parents=True)
        values = {FORMAT_KEY: FORMAT_VERSION, "recipe": dict(recipe)}
        (output / RUN_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write to {output}: {error.strerror or error}") from error

"""Formats of what is written: every file names its version, and one that is not known is refused where it is read."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from attnedit.compiler.errors import UsageError

FORMAT_KEY = "format_version"


def check_format(values: Mapping[str, Any], known: int, name: str) -> None:
    """Refuse what another version of attnedit wrote in a form that this one does not read.

    Args:
        values: what was read; without a version it is from before there were any, which is the first.
        known: the version that this code reads.
        name: of the file, for the message.

    Raises:
        UsageError: it has another format.

    >>> check_format({"format_version": 2}, known=1, name="attnedit-run.json")
    Traceback (most recent call last):
    attnedit.compiler.errors.UsageError: attnedit-run.json has format 2, this version of attnedit reads 1; use the
    version that wrote it
    """
    found = values.get(FORMAT_KEY, 1)
    if found != known:
        raise UsageError(
            f"{name} has format {found}, this version of attnedit reads {known}; use the version that wrote it"
        )


def own_version() -> str:
    """Version of this attnedit, such as "0.2.0"."""
    return version("attnedit")

"""Files that appear whole or not at all, and where those are kept that can be made again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(file: Path, *, shared: bool = False) -> Iterator[Path]:
    """Give a path beside a file to write to, which takes its place where the block ends well.

    Args:
        file: in a directory that is there.
        shared: whether other processes may write it at the same time.

    Raises:
        OSError: it cannot be put in place.
    """
    part = file.with_name(f"{file.name}.{os.getpid()}.part" if shared else f"{file.name}.part")
    yield part
    os.replace(part, file)


def cache_directory(name: str) -> Path:
    """Where files of one sort are kept, if it is there: in ``ATTNEDIT_CACHE``, ``XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("ATTNEDIT_CACHE") or os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "attnedit" / name

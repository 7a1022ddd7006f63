"""Files that appear whole or not at all."""

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

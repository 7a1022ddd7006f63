"""What exports of every runtime have in common: a directory that appears complete or not at all, checked options."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from attnedit.compiler.errors import AttneditError, UsageError


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a directory beside `target` to write into, which takes its place if the block ends well.

    Raises:
        UsageError: nothing can be written there.
    """
    made = [folder for folder in target.parents if not folder.exists()]  # innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        staging.chmod(0o755)
        yield staging
        staging.rename(target)  # takes the place of an empty directory too
    except OSError as error:
        raise AttneditError(f"could not write {target}: {error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not target.exists():
            for folder in made:
                folder.rmdir()


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        UsageError: the message lists them.
    """
    known = tuple(choices)
    if value not in known:
        raise UsageError(f"{option} {value!r} is not known; give {' or '.join(known)}")

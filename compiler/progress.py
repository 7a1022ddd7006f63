"""How long work tells what it is doing: one callback, ``progress(stage, done, total)``.

The command line draws bars from it; library code calls it and knows no terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias, TypeVar

T = TypeVar("T")

#: Called with the stage's name, the steps done so far and their total; first with 0, last with the total.
Progress: TypeAlias = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """Show nothing: the default."""


@contextmanager
def stage(name: str, progress: Progress | None) -> Iterator[None]:
    """Report work of one step, so that whoever waits sees what for.

    >>> seen = []
    >>> with stage("load model", lambda *step: seen.append(step)):
    ...     pass
    >>> seen
    [('load model', 0, 1), ('load model', 1, 1)]
    """
    report = progress or silent
    report(name, 0, 1)
    yield
    report(name, 1, 1)


def track(items: Sequence[T], stage: str, progress: Progress | None) -> Iterator[T]:
    """Iterate over items, reporting each when it is done.

    >>> seen = []
    >>> list(track("ab", "letters", lambda *step: seen.append(step)))
    ['a', 'b']
    >>> seen
    [('letters', 0, 2), ('letters', 1, 2), ('letters', 2, 2)]
    """
    report = progress or silent
    report(stage, 0, len(items))
    for done, item in enumerate(items, start=1):
        yield item
        report(stage, done, len(items))

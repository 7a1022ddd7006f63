"""What other packages add: targets, passes and runtimes, registered as entry points in their own pyproject.toml.

::

    [project.entry-points."attnedit.targets"]
    gated = "their_package:GATED"
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from attnedit.compiler.errors import UsageError

TARGETS, PASSES, RUNTIMES = "attnedit.targets", "attnedit.passes", "attnedit.runtimes"


def registered(group: str, own: Mapping[str, str] | None = None) -> dict[str, EntryPoint]:
    """Entry points of a group by name.

    Args:
        group: its name.
        own: what attnedit has itself, ``module:attribute`` by name: known without its entry points, which an
            installation older than the sources does not list. An empty place reserves a name.

    Raises:
        UsageError: two packages register one name, or one of them a name of ours.
    """
    known: dict[str, EntryPoint] = {name: EntryPoint(name, place, group) for name, place in (own or {}).items()}
    for point in entry_points(group=group):
        other = known.setdefault(point.name, point)
        if other.value != point.value:
            raise UsageError(
                f"{group}: {_package(point)} registers {point.name!r} ({point.value}), which {_package(other)} has "
                f"already{f' ({other.value})' if other.value else ''}; remove one of them, or rename its entry point"
            )
    return {name: point for name, point in known.items() if point.value}


def load(point: EntryPoint, what: str) -> Any:
    """Import what an entry point names.

    Raises:
        UsageError: it cannot be imported.
    """
    try:
        return point.load()
    except ModuleNotFoundError as error:
        raise UsageError(
            f"{what} {point.name} needs the package {error.name}; install it: pip install "
            + (f"'attnedit[{point.name}]'" if point.value.startswith("attnedit.") else str(error.name))
        ) from error
    except (ImportError, AttributeError) as error:
        raise UsageError(
            f"{what} {point.name} ({point.value}, of {_package(point)}) cannot be imported: {error}"
        ) from error


def _package(point: EntryPoint) -> str:
    distribution = getattr(point, "dist", None)
    return distribution.name if distribution is not None else "attnedit"

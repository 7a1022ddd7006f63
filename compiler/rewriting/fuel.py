"""Fuel: stop after so many rewrites, so that the one that breaks a model is found by bisecting."""

from __future__ import annotations

import os
from typing import Any, TypeVar

from attnedit.compiler.errors import UsageError

VARIABLE = "ATTNEDIT_FUEL"
T = TypeVar("T")


class Fuel:
    """How many more rewrites may be done.

    Args:
        units: at most so many; None for what the environment variable `ATTNEDIT_FUEL` says, else any number.

    Attributes:
        refused: rewrites that were not done for want of fuel.

    Raises:
        UsageError: it is no number from 0.

    >>> fuel = Fuel(1)
    >>> fuel.take(), fuel.take(), fuel.refused
    (True, False, 1)
    """

    def __init__(self, units: int | None = None) -> None:
        given: Any = os.environ.get(VARIABLE) or None if units is None else units
        try:
            self._left = None if given is None else int(given)
        except ValueError:
            raise UsageError(f"{VARIABLE}={given}: give a number of rewrites, 0 or more") from None
        if self._left is not None and self._left < 0:
            raise UsageError(f"fuel {self._left}: give a number of rewrites, 0 or more")
        self.refused = 0

    def take(self) -> bool:
        """Use fuel for one rewrite; False where there is none left."""
        if self._left is None:
            return True
        if self._left == 0:
            self.refused += 1
            return False
        self._left -= 1
        return True

    def limit(self, values: dict[str, T], order: list[str]) -> dict[str, T]:
        """Those rewrites, by the site's name, that there is fuel for, in the given order of the sites."""
        return {name: values[name] for name in order if name in values and self.take()}

    def note(self) -> list[str]:
        """What the user should know."""
        return [f"stopped by fuel: {self.refused} rewrites were not done"] if self.refused else []

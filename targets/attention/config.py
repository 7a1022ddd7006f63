"""What the shapes of all kinds of attention have in common."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from importlib import import_module
from typing import Any, Self

from attnedit.compiler.errors import UsageError


class SiteConfig:
    """What the configurations of all kinds have in common: frozen dataclasses of plain JSON values.

    Attributes:
        layer_idx: the layer of the cache that the attention writes.
    """

    layer_idx: int

    @property
    def edges(self) -> tuple[int, ...]:
        """Lengths at which what a query sees begins to change, such as a field `window`; checks go around them."""
        window: int | None = getattr(self, "window", None)
        return () if window is None else (window,)

    @property
    def cached(self) -> tuple[int, int, int] | None:
        """Heads, key size and value size of what a layer caches; None where only its first forward tells."""
        return None

    @property
    def made_by(self) -> list[str]:
        """Rewrites that made the attention's graph, which nobody without them can make again."""
        return []

    def _check_sizes(self, *names: str) -> None:
        """Refuse fields of these names that are below 1.

        Raises:
            UsageError: one is; the message names the class, the layer and the field.
        """
        for name in names:
            if (size := getattr(self, name)) < 1:
                where = f"{type(self).__name__} of layer {self.layer_idx}"
                raise UsageError(f"{where}: {name} must be at least 1, got {size}")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: what a saved result's ``config.json`` has for an attention.

        Returns:
            Values by field.
        """
        values = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Args:
            values: by field.

        Returns:
            The configuration.

        Raises:
            UsageError: a field is missing, or there is one that this version does not know.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise UsageError(
                f"{cls.__name__} has no field {', '.join(unknown)}: the file was written by another version of attnedit"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"{cls.__name__} cannot be read: {error}") from error


def __getattr__(name: str) -> Any:
    """Where 0.1 documented names that stand in the folders of their kinds now."""
    if name in {"GateSWAConfig", "MLAConfig"}:
        return getattr(import_module(str(__package__)), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

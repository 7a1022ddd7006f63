"""Closed-form fits on disk, so that what fails after them need not make them again."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch
from torch import Tensor

from attnedit.compiler.files import replaced

Fitted = TypeVar("Fitted")


@dataclasses.dataclass(frozen=True)
class KeptFits:
    """Fits by site, each with what it was made from: another question gets no answer.

    Attributes:
        directory: where they are; made with the first.
    """

    directory: Path

    def find(self, kind: type[Fitted], site: str, made_from: str) -> Fitted | None:
        """The fit of a site, or None.

        Args:
            kind: a dataclass of tensors, numbers and such dataclasses.
            site: its name.
            made_from: `digest` of all that decides it.
        """
        file = self._file(kind, site)
        if not file.is_file():
            return None
        try:
            values = torch.load(file, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError):  # cut off by what stopped the run
            return None
        return _build(kind, values["fit"]) if values["made_from"] == made_from else None

    def get(self, kind: type[Fitted], site: str, made_from: str, make: Callable[[], Fitted]) -> Fitted:
        """The fit of a site; made and kept where there is none. The arguments are those of `find`."""
        found = self.find(kind, site, made_from)
        if found is None:
            found = make()
            self.keep(found, site, made_from)
        return found

    def keep(self, fit: Any, site: str, made_from: str) -> None:
        """Write a fit; it appears whole or not at all."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._file(type(fit), site)
        with replaced(file) as part:
            torch.save({"made_from": made_from, "fit": dataclasses.asdict(fit)}, part)

    def _file(self, kind: type, site: str) -> Path:
        return self.directory / f"{kind.__name__.lower()}-{site}.pt"


def digest(*parts: Any) -> str:
    """Of what a fit is made from: tensors by their values, all else by its text."""
    found = hashlib.sha256()
    for part in parts:
        text = part.cpu().contiguous().numpy().tobytes() if isinstance(part, Tensor) else repr(part).encode()
        found.update(hashlib.sha256(text).digest())
    return found.hexdigest()


def _build(kind: Any, values: dict[str, Any]) -> Any:
    """A dataclass from its values, those within it too."""
    types = get_type_hints(kind)
    inner = {name: value for name, value in values.items() if dataclasses.is_dataclass(types[name])}
    return kind(**{**values, **{name: _build(types[name], value) for name, value in inner.items()}})

"""Recipes: everything that one compilation was asked for, as YAML to keep, read and run again."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from attnedit.compiler.errors import UsageError
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.mla.fit import FitOptions

RECIPE_FILE = "attnedit-recipe.yaml"


class Recipe(BaseModel):
    """Arguments of one compilation; see `attnedit.compile` and `attnedit compile`.

    Attributes:
        format: of this file.
        model, revision, dtype: the source, as the command line takes it; Python code has it already.
        target, kv_budget, window, full_layers, gate, sinks: what attention becomes.
        allocation: how layers share the latent cache.
        profile, kernel_dims, engine: the checkpoint that the result is to become.
        calibration, calibration_tokens: text: a path, a dataset, or a mapping from such to weights.
        calibration_length: tokens of its longest windows.
        alternations, seed: of the closed-form fits.
        training: fields of `CalibrationOptions`; empty for none.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    model: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    target: str = "mla"
    kv_budget: float | None = None
    window: int | None = None
    full_layers: int | str | list[int] | None = None
    gate: str | None = None
    sinks: str | None = None
    profile: str | None = None
    kernel_dims: bool = False
    engine: str | None = None
    allocation: str = "even"
    calibration: str | dict[str, float] | None = None
    calibration_tokens: int | None = None
    calibration_length: int | None = None
    alternations: int = FitOptions.alternations
    seed: int = 0
    training: dict[str, int | float | bool | str | None] = Field(default_factory=dict)

    @field_validator("training")
    @classmethod
    def _known(cls, training: dict[str, Any]) -> dict[str, Any]:
        try:
            options = CalibrationOptions.of(**training)
        except UsageError as error:
            raise ValueError(str(error)) from error
        defaults = dataclasses.asdict(CalibrationOptions())
        return {name: value for name, value in dataclasses.asdict(options).items() if value != defaults[name]}

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recipe:
        """Read a file.

        Raises:
            UsageError: it cannot be read or is no recipe; the message names the line.
        """
        try:
            text = Path(path).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "no text"
            raise UsageError(f"recipe {path} cannot be read: {reason}") from error
        return cls.from_yaml(text, str(path))

    @classmethod
    def from_yaml(cls, text: str, name: str = "recipe") -> Recipe:
        """Read YAML text; `name` is what messages call it.

        Raises:
            UsageError: it is no recipe; the message names the line.
        """
        try:
            tree = yaml.compose(text, Loader=yaml.SafeLoader)
            values = yaml.safe_load(text)
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = f", line {mark.line + 1}" if mark else ""
            raise UsageError(f"{name}{where}: {getattr(error, 'problem', None) or 'not YAML'}") from error
        if not isinstance(values, dict):
            raise UsageError(f"{name}: a recipe is a mapping such as 'target: mla', got {type(values).__name__}")
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"] if not _is_type(part))
            known = f"; there is {', '.join(cls.model_fields)}" if first["type"] == "extra_forbidden" else ""
            message = first["msg"].removeprefix("Value error, ")
            # Training options are checked together: the one at fault is named in the message alone.
            inner = [
                key for key in values.get("training") or () if place == "training" and str(key) in message.split(";")[0]
            ]
            line = _line(tree, (*first["loc"], *inner[:1]))
            raise UsageError(f"{name}, line {line}: {place}: {message}{known}") from error

    @classmethod
    def of(
        cls, arguments: Mapping[str, Any], full_layers: list[int] | None, training: Mapping[str, Any] | None = None
    ) -> Recipe:
        """What `attnedit.compile` was asked for, with the layers that stayed full, so that they need not be measured.

        Args:
            arguments: of the compilation; those that no recipe has are left out.
            full_layers: as the report has them.
            training: fields of `CalibrationOptions`.
        """
        values = {name: value for name, value in arguments.items() if name in cls.model_fields}
        if isinstance(values["full_layers"], Sequence) and not isinstance(values["full_layers"], str):
            values["full_layers"] = list(values["full_layers"])
        if not isinstance(values["calibration"], str | Mapping):
            path = values["calibration"]
            values["calibration"] = os.fspath(path) if isinstance(path, os.PathLike) else None
        if full_layers is not None:
            values["full_layers"] = full_layers
            if arguments["target"] == "gateswa":
                values["kv_budget"] = None  # it said how many
        return cls(**values, training=dict(training or {}))

    def to_yaml(self) -> str:
        """Everything that is not a default."""
        values = {"format": self.format, **self.model_dump(exclude_defaults=True)}
        # allow_unicode would write U+0085, which YAML reads as an end of line, as it is: escape all but ASCII.
        text: str = yaml.safe_dump(values, sort_keys=False)
        return text

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `attnedit.compile`: all but the source."""
        values = self.model_dump(exclude={"format", "model", "revision", "dtype", "training"})
        return {**values, **self.training}


def _is_type(part: object) -> bool:
    """Whether a part of pydantic's location names an alternative of a union, not a key."""
    return part in ("int", "str", "float", "bool", "list[int]", "dict[str,float]")


def _line(tree: yaml.Node | None, location: tuple[int | str, ...]) -> int:
    """The line of a value, 1 for the first; of the innermost part of its location that the text has."""
    line = 1
    for part in location:
        if not isinstance(tree, yaml.MappingNode):
            break
        found = next(((key, value) for key, value in tree.value if key.value == part), None)
        if found is None:
            break
        line, tree = found[0].start_mark.line + 1, found[1]
    return line

"""Recipes: everything that one compilation was asked for, as YAML to keep, read and run again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator

from attnedit.compiler.errors import UsageError
from attnedit.compiler.options import Number
from attnedit.compiler.reporting.report import Report
from attnedit.options import AttentionOptions, CompileOptions
from attnedit.passes.calibration.options import CalibrationOptions

RECIPE_FILE = "attnedit-recipe.yaml"


class Recipe(AttentionOptions):
    """What decides one compilation, with its source: the fields of `AttentionOptions` and `CalibrationOptions`.

    Attributes:
        format: of this file.
        model, revision, dtype: the source, as the command line takes it; Python code has it already.
        target: by its name.
        calibration: a path, a dataset, or a mapping from such to weights.
        training: fields of `CalibrationOptions`; empty for none.
    """

    called = "key"
    format: Literal[1] = 1
    model: str | None = None
    revision: str | None = None
    dtype: str = "float32"
    target: str = "mla"
    calibration: str | dict[str, Number] | None = None
    training: dict[str, int | float | bool | str | None] = Field(default_factory=dict)

    @field_validator("training")
    @classmethod
    def _known(cls, training: dict[str, Any]) -> dict[str, Any]:
        try:
            return _changed(CalibrationOptions.of(**training))
        except UsageError as error:
            raise ValueError(str(error)) from error

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Recipe:
        """Read a file.

        Args:
            path: of a YAML file.

        Returns:
            The recipe, its values checked.

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
        """Read YAML text.

        Args:
            text: a mapping from keys to values.
            name: what messages call it.

        Returns:
            The recipe, its values checked.

        Raises:
            UsageError: it is no recipe; the message names the line.

        >>> Recipe.from_yaml("{target: mla, kv_budget: 0.25, training: {fit_steps: 100}}").arguments()["fit_steps"]
        100
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
            message = cls.refusal(error)
            # Training options are checked together: the one at fault is named in the message alone.
            inner = [key for key in values.get("training") or () if str(key) in message.split(";")[0]]
            line = _line(tree, (*first["loc"], *(inner[:1] if first["loc"][0] == "training" else ())))
            raise UsageError(f"{name}, line {line}: {message}") from error

    @classmethod
    def from_options(
        cls,
        options: CompileOptions,
        full_layers: list[int] | None = None,
        calibration_length: int | None = None,
        model: str | None = None,
    ) -> Recipe:
        """What was asked for, with what was measured or chosen, so that it need not be again.

        Args:
            options: of the compilation; those that no recipe has are left out.
            full_layers: as the report has them.
            calibration_length: the same.
            model: the source, where it has a name.

        Returns:
            The recipe; given to a compilation, it gives the same result.
        """
        values = {name: getattr(options, name) for name in cls.model_fields if name in CompileOptions.model_fields}
        values |= {"model": model, "target": options.target_name, "training": _changed(options)}
        if not isinstance(options.calibration, str | Mapping):
            path = options.calibration
            values["calibration"] = os.fspath(path) if isinstance(path, os.PathLike) else None
        if calibration_length is not None:
            values["calibration_length"] = calibration_length
        if full_layers is not None:
            values["full_layers"] = full_layers
            if options.leaves:
                values["kv_budget"] = None  # it said how many
        return cls(**values)

    def to_yaml(self) -> str:
        """Everything that is not a default, as YAML.

        Returns:
            Text that `from_yaml` reads; ASCII.
        """
        values: dict[str, Any] = self.model_dump(exclude_defaults=True)
        source: dict[str, Any] = {name: values.pop(name) for name in ("model", "revision", "dtype") if name in values}
        # allow_unicode would write U+0085, which YAML reads as an end of line, as it is: escape all but ASCII.
        text: str = yaml.safe_dump({"format": self.format} | source | values, sort_keys=False)
        return text

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `attnedit.compile`: all but the source.

        Returns:
            Values by the names of `attnedit.options.CompileOptions`.
        """
        values = self.model_dump(exclude={"format", "model", "revision", "dtype", "training"})
        values.update(self.training)
        return values


def with_recipe(report: Report, options: CompileOptions, model: str | None) -> Report:
    """The report with what was asked for; `model` names the source, where it has a name."""
    recipe = Recipe.from_options(options, report.full_layers, report.calibration_length, model)
    return report.model_copy(update={"recipe": recipe.model_dump(exclude_defaults=True)})


def _changed(options: CalibrationOptions) -> dict[str, Any]:
    """Training options that are not the default, without the others that the object may have."""
    fields = CalibrationOptions.model_fields
    return {name: getattr(options, name) for name in fields if getattr(options, name) != fields[name].default}


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

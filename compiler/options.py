"""Options as typed, validated objects: each has its name, type, bounds, default and help text in one place, its field.

The docstring of a field is its help: the first paragraph on the command line, all of it in the API reference.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Annotated, Any, ClassVar, Literal, Self, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Strict, ValidationError
from pydantic.fields import FieldInfo

from attnedit.compiler.errors import UsageError


def _whole(value: Any) -> Any:
    if isinstance(value, Integral) and not isinstance(value, bool):
        return int(value)
    raise ValueError(f"must be a whole number, got {value!r}")


def _number(value: Any) -> Any:
    if isinstance(value, Real) and not isinstance(value, bool):
        return float(value)
    raise ValueError(f"must be a number, got {value!r}")


Whole = Annotated[int, BeforeValidator(_whole)]
"""A whole number of any library; no text, and no truth value."""
Number = Annotated[float, BeforeValidator(_number)]
"""A real number of any library; no text, and no truth value."""
Switch = Annotated[bool, Strict()]
"""A truth value and nothing that could stand for one."""


@dataclass(frozen=True)
class Flag:
    """How the command line takes a field; without one, as its type, under its name.

    Attributes:
        type: of the flag, where the field's own is more than a flag can say; None for an option of Python alone.
    """

    type: Any


class Options(BaseModel):
    """Base of options: unknown names are refused, values do not change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        arbitrary_types_allowed=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )
    called: ClassVar[str] = "option"

    @classmethod
    def of(cls, **values: object) -> Self:
        """Options by name.

        Args:
            **values: of the fields; None leaves the default.

        Returns:
            The options, checked; they do not change.

        Raises:
            UsageError: an unknown name, or a value that makes no sense: one line that names it.
        """
        given = {name: value for name, value in values.items() if value is not None or name not in cls.model_fields}
        try:
            return cls(**given)
        except ValidationError as error:
            raise UsageError(cls.refusal(error)) from error

    @classmethod
    def refusal(cls, error: ValidationError) -> str:
        """One line for the first thing that is wrong."""
        first = error.errors()[0]
        message = first["msg"].removeprefix("Value error, ")
        if not first["loc"]:
            return message
        name = str(first["loc"][0])
        if first["type"] == "extra_forbidden":
            return f"no {cls.called} {name!r}; there is {', '.join(cls.model_fields)}"
        if first["type"] == "value_error" and len(first["loc"]) == 1:
            return f"{name} {message}" if message.startswith("must ") else f"{name}: {message}"
        field, value = cls.model_fields[name], first["input"]
        wanted = _wanted(field)
        return f"{name} must be {wanted}, got {value!r}" if wanted else f"{name} cannot be {value!r}: {help_of(field)}"


def help_of(field: FieldInfo) -> str:
    """The first paragraph of a field's docstring in one line."""
    return " ".join((field.description or "").partition("\n\n")[0].split())


def base_type(annotation: Any) -> Any:
    """The type of a field without what is noted on it; None in place of a value does not count."""
    if get_origin(annotation) is Annotated:
        return base_type(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        return base_type(inner[0]) if len(inner) == 1 else annotation
    return annotation


def bound(field: FieldInfo, kind: type[Ge] | type[Gt] | type[Le] | type[Lt]) -> Any:
    """A bound of a field's values; None where there is none."""
    return next((getattr(one, kind.__name__.lower()) for one in field.metadata if isinstance(one, kind)), None)


def _wanted(field: FieldInfo) -> str:
    """What the values of a field must be; empty where only its help can say."""
    kind = base_type(field.annotation)
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    words = {
        "from": bound(field, Ge),
        "above": bound(field, Gt),
        "below": bound(field, Lt),
        "at most": bound(field, Le),
    }
    given = {word: value for word, value in words.items() if value is not None}
    if given:
        if list(given) == ["from"]:
            return f"at least {given['from']:g}"
        if list(given) == ["from", "at most"]:
            return f"from {given['from']:g} to {given['at most']:g}"
        return " and ".join(f"{word} {value:g}" for word, value in given.items())
    return {bool: "true or false", str: "text"}.get(kind, "")

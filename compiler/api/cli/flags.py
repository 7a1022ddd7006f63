"""Command-line flags made from the fields of options: name, type, bounds, default and help text stand there alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from typing import Annotated, Any

import typer
from annotated_types import Ge, Le
from pydantic.fields import FieldInfo

from attnedit.cli.terminal import calibration_source
from attnedit.compiler.options import Flag, Options, base_type, bound, help_of

Command = Callable[..., None]


def takes(kind: type[Options], without: Collection[str] = ()) -> Callable[[Command], Command]:
    """Give a command a flag for each field in place of its ``**given``, which gets those that were given.

    Args:
        kind: the options.
        without: fields that this command does not have.
    """
    fields = {name: field for name, field in kind.model_fields.items() if name not in without and _type(field)}

    def decorate(command: Command) -> Command:
        own = inspect.signature(command, eval_str=True).parameters.values()
        wanted = [parameter for parameter in own if parameter.kind is not parameter.VAR_KEYWORD]
        flags = [_parameter(name, field) for name, field in fields.items()]
        front = [parameter for parameter in wanted if parameter.kind is not parameter.KEYWORD_ONLY]
        shown = [*front, *flags, *(parameter for parameter in wanted if parameter not in front)]

        def run(context: typer.Context, **values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            sources = {name: context.get_parameter_source(name) for name in fields}
            told = {name: given[name] for name, source in sources.items() if source and source.name != "DEFAULT"}
            if told.get("calibration"):
                told["calibration"] = calibration_source(told["calibration"])
            command(**values, **told)

        context = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in shown]
        run.__signature__ = inspect.Signature([context, *keywords])  # type: ignore[attr-defined]
        run.__annotations__, run.__doc__, run.__name__ = {}, command.__doc__, command.__name__
        return run

    return decorate


def _type(field: FieldInfo) -> Any:
    """What the command line reads; None for what it cannot say."""
    given = next((one for one in field.metadata if isinstance(one, Flag)), None)
    if given is not None:
        return given.type
    kind = base_type(field.annotation)
    return kind if kind in (int, float, bool) else str


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _type(field)
    flag = f"--{name.replace('_', '-')}"
    bounds = {"min": bound(field, Ge), "max": bound(field, Le)} if kind is int else {}
    names = [flag]
    if kind is bool and field.default is not False:
        names = [f"{flag}/--no-{flag[2:]}"]
    option = typer.Option(*names, help=help_of(field), **bounds)
    shown: Any = kind if field.default is not None else kind | None
    annotation: Any = Annotated[shown, option]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation)

"""Writes docs/commands.md: every command and flag, as the command line itself describes them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from attnedit.cli import app
from attnedit.compiler.options import base_type, help_of
from attnedit.options import AttentionOptions, CompileOptions, DataOptions, JobOptions, SourceOptions
from attnedit.passes.calibration.options import CalibrationOptions

PAGE = Path(__file__).parent / "commands.md"
HEAD = """# Commands

<!-- Written by docs/make_commands.py (make commands). -->

What each command takes. `attnedit COMMAND --help` says the same; the [user guide](user-guide.md) shows them at work.

- Every command that takes `--json` prints one JSON object on stdout; progress and remarks go to stderr.
- Exit codes: 0 for success, 2 for wrong usage or bad input, 1 where the job itself failed, 130 when interrupted. A
  failure is one line on stderr that says what is wrong and what to do; with `--json` it is in the object, too.
- `attnedit --version` shows the version.

| environment variable | what it does |
|---|---|
| `ATTNEDIT_DEBUG=1` | adds the traceback to a failure |
| `ATTNEDIT_FUEL=N` | stops after so many rewrites, as `--fuel` |
| `ATTNEDIT_CACHE=DIR` | where own samples and traces are kept, in place of `~/.cache` (or `XDG_CACHE_HOME`) |
"""
GROUPS = {
    "Data": DataOptions,
    "What attention becomes": AttentionOptions,
    "Training": CalibrationOptions,
    "Reading the model": SourceOptions,
    "The job": JobOptions,
}
WORDS = {int: "whole number", float: "number", bool: "", Path: "path"}
OWN = "This command"
FEW = 16
"""Options that need no headings."""


def page() -> str:
    """The page as it should stand."""
    group: Any = typer.main.get_command(app)
    parts = [HEAD]
    for registered in app.registered_commands:
        assert registered.callback is not None
        command = group.commands[registered.name]
        flags = [one for one in command.params if not one.hidden and one.name != "help"]
        usage = " ".join(
            [
                "attnedit",
                str(registered.name),
                *sorted(filter(None, map(_usage, flags)), key=lambda part: part[0] == "-"),
                "[OPTIONS]",
            ]
        )
        parts.append(f"\n## attnedit {registered.name}\n\n{command.help.strip()}\n\n```console\n{usage}\n```\n")
        types = {
            name: one.annotation
            for name, one in inspect.signature(registered.callback, eval_str=True).parameters.items()
        }
        parts += _tables(flags, types)
    return "".join(parts)


def _usage(flag: Any) -> str | None:
    if flag.param_type_name == "argument":
        return _argument(flag) if flag.required else f"[{_argument(flag)}]"
    return f"{flag.opts[0]} {flag.name.upper()}" if flag.required else None


def _argument(flag: Any) -> str:
    return str(flag.metavar or flag.name.upper())


def _tables(flags: list[Any], types: dict[str, Any]) -> Iterator[str]:
    grouped: dict[str, list[Any]] = {OWN: [], **{heading: [] for heading in GROUPS}}
    for flag in flags:
        grouped[_heading(flag) if len(flags) > FEW else OWN].append(flag)
    for heading, rows in grouped.items():
        if not rows:
            continue
        if len(flags) > FEW:
            yield f"\n### {heading}\n"
        yield "\n| option | value | unless given | what it does |\n|---|---|---|---|\n"
        yield from (_row(flag, types[flag.name]) for flag in rows)


def _field(flag: Any) -> FieldInfo | None:
    """The option of a compilation that a flag is; another command's own may have the same name."""
    field = CompileOptions.model_fields.get(flag.name)
    return field if field is not None and help_of(field) == flag.help else None


def _heading(flag: Any) -> str:
    groups = {} if _field(flag) is None else GROUPS
    return next((heading for heading, kind in groups.items() if flag.name in kind.model_fields), OWN)


def _row(flag: Any, annotation: Any) -> str:
    if flag.param_type_name == "argument":
        return f"| `{_argument(flag)}` | | | {_cell(flag.help)} |\n"
    names = ", ".join(f"`{name}`" for name in (*flag.opts, *flag.secondary_opts))
    value = _choices(_field(flag)) or _words(annotation)
    default = "" if flag.default is None or flag.default is False else f"`{flag.default}`"
    if flag.secondary_opts and flag.default is not None:
        default = f"`{(flag.opts if flag.default else flag.secondary_opts)[0]}`"
    if flag.required:
        default = "must be given"
    return f"| {names} | {value} | {default} | {_cell(flag.help)} |\n"


def _choices(field: FieldInfo | None) -> str:
    """Of an option that knows them; empty for any other."""
    kind = None if field is None else base_type(field.annotation)
    return " or ".join(map(str, get_args(kind))) if get_origin(kind) is Literal else ""


def _words(annotation: Any) -> str:
    kind = base_type(annotation)
    words = WORDS.get(kind, "text")
    if get_origin(kind) is list:
        words = f"{WORDS.get(get_args(kind)[0], 'text')}; may be given again"
    info = next((one for one in getattr(annotation, "__metadata__", ()) if hasattr(one, "min")), None)
    if info is not None and info.min is not None:
        high = "" if info.max is None or info.max >= 2**63 - 1 else f" to {info.max}"
        words += f" from {info.min:g}{high}"
    return words


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

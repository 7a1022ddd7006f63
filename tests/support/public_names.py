"""What docs/api.md names: the public functions, classes and their members."""

from __future__ import annotations

import inspect
import pkgutil
import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml
from project import ROOT

ENTRY = re.compile(r"^::: ([\w.]+)\n((?:    .*\n)*)", re.MULTILINE)


def entries() -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each name of the reference, what it is, and how it is shown."""
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for name, options in ENTRY.findall(text):
        given = yaml.safe_load(options) if options else {}
        yield name, pkgutil.resolve_name(name), given.get("options", {})


def public() -> Iterator[tuple[str, Any]]:
    """Every name that the reference shows: of a module, what is defined there."""
    for name, found, options in entries():
        if not inspect.ismodule(found):
            yield name, found
            continue
        hidden = [pattern[1:] for pattern in options.get("filters", []) if pattern.startswith("!")]
        for member, value in vars(found).items():
            own = getattr(value, "__module__", None) == found.__name__ and not member.startswith("_")
            listed = member in options.get("members", [member])
            if own and listed and not any(re.search(pattern, member) for pattern in hidden):
                yield f"{name}.{member}", value


def described() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The public functions, and the public methods of the public classes."""
    shown = {name: options for name, _, options in entries()}
    hidden = {name: [one[1:] for one in options.get("filters", ["!^_"])] for name, options in shown.items()}
    for name, found in public():
        if not inspect.isclass(found):
            if inspect.isroutine(found):
                yield name, found
            continue
        for member, value in vars(found).items():
            listed = member in shown.get(name, {}).get("members", [member])
            listed = listed and not any(
                re.search(pattern, member) for pattern in hidden.get(name, hidden.get(name.rpartition(".")[0], ["^_"]))
            )
            function = value.__func__ if isinstance(value, classmethod) else value
            if listed and inspect.isfunction(function):
                yield f"{name}.{member}", function

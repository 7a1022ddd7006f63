"""Modelling code that comes with a checkpoint: it runs only for who asked for it.

transformers names such code in ``auto_map`` of a ``config.json`` and imports it where ``trust_remote_code`` is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers.dynamic_module_utils import custom_object_save, get_class_from_dynamic_module

from attnedit.compiler.errors import UsageError

AUTO_CLASSES = ("AutoConfig", "AutoModelForCausalLM")
"""Of the classes that an ``auto_map`` may name, those that a language model is made of."""

_TRUSTED: ContextVar[str | None] = ContextVar("trusted", default=None)


@contextmanager
def trusting(model: str | None) -> Iterator[None]:
    """Let `own_class` import the code of one directory or hub name while inside; of none, given None."""
    token = _TRUSTED.set(model)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def needs_own_code(name: str) -> UsageError:
    """The refusal of a model whose modelling code comes with its weights."""
    return UsageError(
        f"{name} needs modelling code of its own, which runs only with --trust-remote-code (trust_remote_code=True); "
        f"read that code before, or give a model whose architecture transformers has"
    )


def auto_map_of(config: Any) -> dict[str, str]:
    """What a configuration names as code of its own, by auto class; empty for anything that is no such table."""
    found = getattr(config, "auto_map", None)
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, Mapping) else {}


def is_own_class(kind: type) -> bool:
    """Whether a class was imported from a checkpoint."""
    return kind.__module__.startswith("transformers_modules.")


def own_class(reference: str) -> Any:
    """Import a class, ``file.Class``, that comes with the model which `trusting` names.

    Raises:
        UsageError: no such model is trusted, or its code cannot be imported.
    """
    model = _TRUSTED.get()
    if model is None:
        raise needs_own_code("this result")
    try:
        return get_class_from_dynamic_module(reference, model)
    except Exception as error:  # whatever that code raises
        raise UsageError(f"{reference} cannot be imported from {model}: {type(error).__name__}: {error}") from error


def class_references(kinds: Mapping[str, type]) -> dict[str, str]:
    """Name the classes that were imported from a checkpoint, by auto class, as an ``auto_map`` does."""
    own = {auto: kind for auto, kind in kinds.items() if is_own_class(kind)}
    return {auto: f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}" for auto, kind in own.items()}


def copy_code(kinds: Mapping[str, type], directory: Path) -> None:
    """Copy the files of the classes that were imported from a checkpoint, and what they import from beside them."""
    for kind in kinds.values():
        if is_own_class(kind):
            custom_object_save(kind, directory)

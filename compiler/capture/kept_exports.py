"""Exports of attention modules that were made before, found by everything that an export reads.

Tracing is nearly all that a capture costs, and depends on no weights. Facts are read, and graphs held to the module's
own attention, in every capture: what is kept here saves time and decides nothing.
"""

from __future__ import annotations

import copy
import enum
import functools
import hashlib
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache

from attnedit.compiler.capture.export import Exported
from attnedit.compiler.capture.probe import AttentionCall
from attnedit.compiler.compatibility.torch_names import pytree

KEPT = 64
"""Kinds of attention modules."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None), enum.Enum, torch.dtype, torch.device, torch.Size, range)
# Names, and what a copy for tracing sets anew.
_UNREAD = {"_name_or_path", "_parameters", "_buffers", "_modules", "training"}


@dataclass(frozen=True)
class Key:
    """Equal only for calls whose exports are equal; `held` is what it knows by identity, which must not go."""

    digest: str
    held: tuple[Any, ...] = field(compare=False)


_KEEPING: ContextVar[bool] = ContextVar("_KEEPING", default=True)


@contextmanager
def keeping(wanted: bool) -> Iterator[None]:
    """Inside the block captures keep what they trace, and take what was kept before; or trace all anew."""
    token = _KEEPING.set(wanted)
    try:
        yield
    finally:
        _KEEPING.reset(token)


_EXPORTS: OrderedDict[Key, Exported] = OrderedDict()


def recall(key: Key | None) -> Exported | None:
    """The export that was kept under a key, a copy that can be edited."""
    if key is None or key not in _EXPORTS:
        return None
    _EXPORTS.move_to_end(key)
    return _copied(_EXPORTS[key])


def keep(key: Key | None, exported: Exported) -> None:
    """Keep a copy of an export; the oldest go."""
    if key is None:
        return
    _EXPORTS[key] = _copied(exported)
    while len(_EXPORTS) > KEPT:
        _EXPORTS.popitem(last=False)


def forget(key: Key | None = None) -> None:
    """Forget one export, or all."""
    if key is None:
        _EXPORTS.clear()
    else:
        _EXPORTS.pop(key, None)


def _copied(exported: Exported) -> Exported:
    constants = {name: tensor.clone() for name, tensor in exported.constants.items()}
    return Exported(copy.deepcopy(exported.graph), constants)


def key_of(call: AttentionCall) -> Key | None:
    """What an export of a call would be kept under; None where nothing is kept, or an attribute cannot be read.

    Of the module and all in it: classes with their code, that of the functions beside them, attributes,
    configuration, hooks, shapes and dtypes of weights, values of other tensors. Of its call in the probe: arguments,
    mask, and the ops that ran (`AttentionCall.signature`).
    """
    if not _KEEPING.get():
        return None
    try:
        contents = _Contents(call)
    except _UnknownError:
        return None
    return Key(contents.digest.hexdigest(), tuple(contents.held))


class _UnknownError(Exception):
    """An attribute whose contents cannot be read."""


class _Contents:
    """Digest of all that the export of a call reads."""

    def __init__(self, call: AttentionCall) -> None:
        self.digest = hashlib.sha256()
        self.held: list[Any] = []
        self._alive: list[Any] = []  # or another object could get the id of one that was seen
        self._classes: set[type] = set()
        self._modules = {id(module): name for name, module in call.module.named_modules()}
        self._seen: dict[int, int] = {}
        self._strict = True
        self._add("call", call.signature, torch.get_default_dtype(), torch.is_autocast_enabled("cpu"))
        leaves, spec = pytree.tree_flatten(call.arguments)
        self._add("arguments", repr(spec))
        for leaf in leaves:
            self._shape(leaf) if isinstance(leaf, torch.Tensor) else self._value(leaf)
        if call.cached is not None:
            self._add("cached", call.cached.implementation, call.cached.layer)
            self._shape(call.cached.keys)
            self._shape(call.cached.values)
        for name, module in call.module.named_modules():
            self._add("module", name)
            for cls in type(module).__mro__:
                if cls not in (object, torch.nn.Module):
                    self._class(cls)
            self._value({key: value for key, value in vars(module).items() if key not in _UNREAD})
        for name, parameter in call.module.named_parameters():
            self._add("parameter", name)
            self._shape(parameter)
        for name, buffer in call.module.named_buffers():
            self._add("buffer", name)
            self._value(buffer)

    def _add(self, *parts: Any) -> None:
        self.digest.update(repr(parts).encode())

    def _shape(self, tensor: torch.Tensor) -> None:
        self._add(type(tensor), tuple(tensor.shape), tensor.dtype, tensor.is_meta)

    def _value(self, value: Any) -> None:
        if isinstance(value, _PLAIN):
            self._add(type(value), value)
        elif isinstance(value, torch.Tensor):
            self._shape(value)
            if not value.is_meta:
                try:
                    contents = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                    self.digest.update(contents.numpy().tobytes())
                except (RuntimeError, TypeError) as error:  # quantised or sparse ones
                    raise _UnknownError from error
        elif isinstance(value, torch.nn.Module):
            if id(value) not in self._modules:
                raise _UnknownError
            self._add("module", self._modules[id(value)])
        elif isinstance(value, Cache):
            self._add("cache")  # an export puts a stand-in in its place
        elif id(value) in self._seen:
            self._add("again", self._seen[id(value)])
        else:
            self._seen[id(value)] = len(self._seen)
            self._alive.append(value)
            self._object(value)

    def _object(self, value: Any) -> None:
        if isinstance(value, Mapping):
            self._add("mapping", type(value), len(value))
            for key, item in value.items():
                self._value(key)
                self._value(item)
        elif isinstance(value, list | tuple):
            self._add("sequence", type(value), len(value))
            for item in value:
                self._value(item)
        elif isinstance(value, set | frozenset):
            self._add("set", sorted(map(repr, value)))
        elif isinstance(value, types.FunctionType):
            self._function(value)
        elif isinstance(value, types.MethodType):
            self._value(value.__func__)
            self._value(value.__self__)
        elif isinstance(value, functools.partial):
            self._value((value.func, value.args, value.keywords))
        elif isinstance(value, type | types.BuiltinFunctionType | types.ModuleType):
            self._add(getattr(value, "__module__", None), getattr(value, "__qualname__", value.__name__))
        elif not self._strict:
            self._add("identity", id(value))
            self.held.append(value)
        elif hasattr(value, "__dict__") and type(value).__module__ != "builtins":
            self._class(type(value))
            self._value({key: item for key, item in vars(value).items() if key not in _UNREAD})
        else:
            raise _UnknownError

    def _class(self, cls: type) -> None:
        """A class of a module: its code, and the functions and constants of the file that it is in."""
        self._add("class", cls.__module__, cls.__qualname__)
        if cls in self._classes:
            return
        self._classes.add(cls)
        beside = {} if cls.__module__.startswith("torch.") else vars(sys.modules.get(cls.__module__, types))
        strict, self._strict = self._strict, False
        for names in (vars(cls), beside):
            for name, value in names.items():
                code = getattr(value, "__func__", value)
                if isinstance(code, types.FunctionType | property | int | float | str) and not name.startswith("__"):
                    self._add(name)
                    self._value(code.fget if isinstance(code, property) else code)
        self._strict = strict

    def _function(self, function: types.FunctionType) -> None:
        self._add("function", function.__qualname__)
        self._code(function.__code__)
        cells = [cell.cell_contents for cell in function.__closure__ or () if cell != types.CellType()]
        self._value([function.__defaults__, function.__kwdefaults__, cells])

    def _code(self, code: types.CodeType) -> None:
        self._add(
            code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags, code.co_exceptiontable
        )
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant)
            else:  # the order of a set is another in every process
                self._add(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)

"""Traces of attention modules on disk, so that another process need not make them again.

A file is found by everything that the trace reads (`kept_exports.Key`), by the versions of Python, torch and
transformers, and by the code that traces. It holds torch's own form of an exported program, without weights. Only files
in a cache directory of this user's own are read; what comes with a result or a model never is.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from attnedit.compiler.capture.export import Trace
from attnedit.compiler.capture.kept_exports import Key
from attnedit.compiler.capture.normalise import ChildCall
from attnedit.compiler.compatibility.torch_names import pytree
from attnedit.compiler.files import cache_directory, replaced

SUFFIX = ".pt2"
MOST = 256
"""Files; the oldest go."""
_EXTRA = "attnedit.json"
_TENSOR = {"tensor": True}
_log = logging.getLogger(__name__)


def read(key: Key | None) -> Trace | None:
    """The trace that is stored under a key; None where there is none, or none that can be read."""
    file = _file(key)
    if file is None or not _own(file):
        return None
    extra: dict[str, Any] = {_EXTRA: ""}
    try:
        program = torch.export.load(file, extra_files=extra)
        values = json.loads(extra[_EXTRA])
        leaves, spec = values["output"]
        children = [
            ChildCall(name, number, [ChildCall.TENSOR if leaf == _TENSOR else leaf for leaf in args], _spec(text))
            for name, number, args, text in values["children"]
        ]
        return Trace(program, children, (leaves, _spec(spec)))
    except Exception as error:  # whatever a file that was cut off, or another build of torch, has it raise
        _log.debug("%s cannot be read (%s: %s); tracing anew", file, type(error).__name__, error)
        return None


def write(key: Key | None, trace: Trace) -> None:
    """Store a trace; one that cannot be stored costs time, nothing else."""
    file = _file(key)
    if file is None:
        return
    try:
        leaves, spec = trace.output
        children = [
            [call.name, call.number, [_mark(leaf) for leaf in call.leaves], pytree.treespec_dumps(call.spec)]
            for call in trace.children
        ]
        values = {"children": children, "output": [[_plain(leaf) for leaf in leaves], pytree.treespec_dumps(spec)]}
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replaced(file, shared=True) as part, part.open("wb") as opened:
            torch.export.save(trace.program, opened, extra_files={_EXTRA: json.dumps(values)})
        for old in sorted(file.parent.glob(f"*{SUFFIX}"), key=lambda one: one.stat().st_mtime)[:-MOST]:
            old.unlink()
    except Exception as error:  # torch cannot write every program
        _log.debug("%s cannot be written (%s: %s)", file, type(error).__name__, error)


def drop(key: Key | None) -> None:
    """Delete what does not fit after all."""
    file = _file(key)
    if file is not None:
        with suppress(OSError):
            file.unlink(missing_ok=True)


def _file(key: Key | None) -> Path | None:
    # What is known by identity means nothing in another process.
    if key is None or key.held:
        return None
    with suppress(RuntimeError):  # nobody's home is known
        return cache_directory("captures") / f"{key.digest[:40]}-{_code()[:16]}{SUFFIX}"
    return None


def _own(file: Path) -> bool:
    """Whether a file is there and nobody else could have put it there."""
    try:
        found, folder = file.stat(), file.parent.stat()
    except OSError:
        return False
    user = getattr(os, "getuid", lambda: None)()
    return user is None or (found.st_uid == folder.st_uid == user and not folder.st_mode & 0o022)


@functools.cache
def _code() -> str:
    """Digest of versions, and of the code that traces."""
    found = hashlib.sha256(repr((platform.python_version(), torch.__version__, transformers.__version__)).encode())
    here = Path(__file__).parent
    for folder in (here, here.parent / "graph", here.parent / "compatibility"):
        for file in sorted(folder.glob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()


def _mark(leaf: Any) -> Any:
    return _TENSOR if leaf is ChildCall.TENSOR else _plain(leaf)


def _plain(leaf: Any) -> Any:
    if leaf is None or type(leaf) in (bool, int, float, str):
        return leaf
    raise TypeError(f"{type(leaf).__name__} among the arguments of a module")


def _spec(text: str) -> pytree.TreeSpec:
    found: pytree.TreeSpec = pytree.treespec_loads(text)
    return found

"""attnedit: rewrites the attention of a trained language model into one that is cheaper to serve.

>>> import attnedit
>>> sorted(attnedit.__all__)
['AttneditError', 'CaptureError', 'CompileResult', 'Report', 'UsageError', 'VerificationError', 'compile', 'load']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if __name__ != "attnedit":
    raise ImportError(f"this package is installed as attnedit; write 'import attnedit', not {__name__!r}")

# Registers model_type "attnedit" with transformers' auto classes, so that a saved result loads like any model.
import attnedit.targets.runtime.eager  # noqa: F401
from attnedit.compiler.errors import AttneditError, CaptureError, UsageError, VerificationError
from attnedit.compiler.report import Report

if TYPE_CHECKING:
    from attnedit.compile import compile
    from attnedit.result import CompileResult, load

__all__ = [
    "AttneditError",
    "CaptureError",
    "CompileResult",
    "Report",
    "UsageError",
    "VerificationError",
    "compile",
    "load",
]


def __getattr__(name: str) -> Any:
    if name == "compile":
        from attnedit.compile import compile as value
    elif name in ("CompileResult", "load"):
        import attnedit.result

        value = getattr(attnedit.result, name)
    else:
        raise AttributeError(f"module 'attnedit' has no attribute {name!r}")
    globals()[name] = value  # importing the module attnedit.compile has put the module itself under this name
    return value

"""attnedit: rewrites the attention of a trained language model into one that is cheaper to serve.

>>> import attnedit
>>> sorted(attnedit.__all__)
['AttentionKind', 'AttentionTarget', 'AttneditError', 'CaptureError', 'CompileResult', 'Match', 'Reject', 'Report',
 'Rewrite', 'RewriteError', 'Target', 'UsageError', 'VerificationError', 'attention', 'cache', 'calibrate', 'close',
 'compile', 'compile_checkpoint', 'exact', 'learned', 'least_squares', 'load', 'rewrite']
"""

from __future__ import annotations

if __name__ != "attnedit":
    raise ImportError(f"this package is installed as attnedit; write 'import attnedit', not {__name__!r}")

from contextlib import suppress

from attnedit.compiler.interrupts import quiet_while_importing

with suppress(ValueError):  # only the main thread may
    quiet_while_importing()

# Registers model_type "attnedit" with transformers' auto classes, so that a saved result loads like any model.
import attnedit.targets.runtime.eager  # noqa: F401
from attnedit._calibrate import calibrate
from attnedit._checkpoint import compile_checkpoint
from attnedit._compile import compile
from attnedit._rewrite import rewrite
from attnedit.compiler.errors import AttneditError, CaptureError, RewriteError, UsageError, VerificationError
from attnedit.compiler.reporting.report import Report
from attnedit.compiler.rewriting.language import attention, cache
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.compiler.rewriting.rewrite import Match, Reject, Rewrite, close, exact, learned, least_squares
from attnedit.passes.target import AttentionTarget
from attnedit.result import CompileResult, load
from attnedit.targets.attention.kind import AttentionKind

__all__ = [
    "AttentionKind",
    "AttentionTarget",
    "AttneditError",
    "CaptureError",
    "CompileResult",
    "Match",
    "Reject",
    "Report",
    "Rewrite",
    "RewriteError",
    "Target",
    "UsageError",
    "VerificationError",
    "attention",
    "cache",
    "calibrate",
    "close",
    "compile",
    "compile_checkpoint",
    "exact",
    "learned",
    "least_squares",
    "load",
    "rewrite",
]

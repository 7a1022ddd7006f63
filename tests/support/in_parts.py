"""Checkpoints on disk, compiled layer by layer and as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compiled import tokens
from transformers import PreTrainedModel

import attnedit
from attnedit.compiler.model_io.models import load_source

TOLERANCE = 1e-5
"""Of the weights, as a fraction of the largest of each: the same sums, perhaps in another order."""
TARGETS: dict[str, dict[str, Any]] = {
    "mla": {"target": "mla", "kv_budget": 0.5, "alternations": 1},
    "gateswa": {"target": "gateswa", "window": 4, "full_layers": "1,", "sinks": "value,keep:2", "gate": "head"},
    "both": {"target": "gateswa+mla", "window": 4, "full_layers": "every:2"},
    "exact": {"target": "mla", "kv_budget": 1.0},
}


def whole(directory: Path, dtype: str = "auto", **options: Any) -> attnedit.CompileResult:
    """The ordinary way."""
    return attnedit.compile(
        load_source(str(directory), dtype=dtype).model, **{"calibration": tokens(4, 32), **options}, in_place=True
    )


def in_parts(directory: Path, output: Path, **options: Any) -> attnedit.Report:
    return attnedit.compile_checkpoint(directory, output, **{"calibration": tokens(4, 32), **options})


def assert_same(found: PreTrainedModel, expected: PreTrainedModel, tolerance: float = TOLERANCE) -> None:
    theirs, ours = expected.state_dict(), found.state_dict()
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        wrong = float((ours[name].double() - value.double()).abs().max())
        assert wrong <= tolerance * float(value.double().abs().max()), name

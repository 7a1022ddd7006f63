"""What transformers' own suites check of every model class, as checks of a source and of what was made of it.

Each check stands under the name of their test: `transformers_loading`, `transformers_classes` and
`transformers_modelling` for `tests/test_modeling_common.py` of transformers 5.23 and the mixins beside it,
`transformers_generation` and `transformers_continuing` for `tests/generation/test_utils.py`. As in their suite, inputs
are a few short rows padded on the right, and a source's windows are longer than they are; sizes and code are our own.
`transformers_page` runs all of it.
"""

from __future__ import annotations

import copy
import functools
import importlib
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from families import build
from torch import Tensor

import attnedit

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma3_text": {"sliding_window": 64},
    "qwen3_moe": {},
    "gpt_oss": {"sliding_window": 64},
}
TARGETS: dict[str, dict[str, Any]] = {
    "mla": {"kv_budget": 0.5},
    "gateswa": {"window": 6, "sinks": "keep:2", "full_layers": 0},
}
VOCABULARY = 64
ROWS, LENGTH = 4, 7
NEW_TOKENS = 3

PASSES, FAILS, NONE = "passes", "fails", "does not apply"


class DoesNotApply(Exception):
    """Raised by a check that has nothing to check on this model; its text says why."""


@dataclass(frozen=True)
class Subject:
    """A model that is checked; a check takes copies of it.

    Attributes:
        family: of `FAMILIES`.
        target: of `TARGETS`, or "source".
        made: the model, in evaluation mode.
    """

    family: str
    target: str
    made: Any

    @property
    def kind(self) -> Any:
        return type(self.made)

    @property
    def tolerance(self) -> dict[str, float]:
        """Theirs: experts are chosen by numbers that rounding moves."""
        size = 1e-3 if getattr(self.config, "_experts_implementation", None) is not None else 1e-5
        return {"atol": size, "rtol": size}

    @property
    def config(self) -> Any:
        return copy.deepcopy(self.made.config)

    def model(self, attention: str | None = None) -> Any:
        """A copy that may be changed, without a token that ends generation."""
        model = copy.deepcopy(self.made)
        if attention is not None:
            model.set_attn_implementation(attention)
        model.generation_config.eos_token_id = None
        return model

    def new(self, config: Any = None) -> Any:
        """A model with random weights, built from a configuration."""
        torch.manual_seed(0)
        return self.kind(self.config if config is None else config).eval()


def ids(rows: int = ROWS, length: int = LENGTH, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def inputs(rows: int = ROWS) -> dict[str, Tensor]:
    """Rows of 1, 2, .. tokens, padded on the right."""
    return {"input_ids": ids(rows), "attention_mask": torch.ones(rows, LENGTH, dtype=torch.long).tril()}


Check = Callable[[Subject], None]
CHECKS: dict[str, Check] = {}
SLOW: set[str] = set()
"""Checks that compile a whole model: run on the first family alone."""


def check(function: Check) -> Check:
    """Take a function into the table under its name, which is that of their test."""
    CHECKS[function.__name__] = function
    return function


def slow(function: Check) -> Check:
    SLOW.add(function.__name__)
    return function


def checks_of(family: str) -> list[str]:
    """Names of the checks that are run on a family."""
    return [name for name in CHECKS if name not in SLOW or family == next(iter(FAMILIES))]


@functools.cache
def subject(family: str, target: str) -> Subject:
    source = build(family, **FAMILIES[family])
    if target == "source":
        return Subject(family, target, source)
    result = attnedit.compile(source, target, calibration=ids(4, 32), **TARGETS[target])
    return Subject(family, target, result.model)


def outcome(name: str, checked: Subject) -> tuple[str, str]:
    """Run a check: `PASSES`, `FAILS` or `NONE`, and why."""
    torch.manual_seed(0)
    before = checked.made.config.to_json_string(use_diff=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CHECKS[name](checked)
    except DoesNotApply as reason:
        return NONE, str(reason)
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = " ".join(str(error).split())[:300]
        return FAILS, f"{type(error).__name__}: {text} ({Path(where.filename).name}:{where.lineno})"
    if checked.made.config.to_json_string(use_diff=False) != before:
        raise AssertionError(f"{name} changed the model that it was given")
    return PASSES, ""


for module in ("loading", "classes", "modelling", "generation", "continuing"):
    importlib.import_module(f"transformers_{module}")

"""What can be asked of calibration."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from typing import Any, Literal, get_args

from attnedit.compiler.errors import UsageError

Train = Literal["attention", "norms", "all"]
Rule = Literal["adamw", "muon"]

_EXPONENTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_LEAST = {
    "fit_steps": 0,
    "distill_steps": 0,
    "batch_size": 1,
    "seq_len": 2,
    "accumulation": 1,
    "feature_layers": 0,
    "checkpoint_every": 1,
    "evaluate_every": 0,
    "patience": 0,
}


@dataclass(frozen=True)
class CalibrationOptions:
    """Of layer-wise fitting and of distillation.

    Attributes:
        fit_steps: optimiser steps in which every rewritten attention learns the source attention's output on the
            source's own hidden states.
        distill_steps: steps in which the whole model learns the source's next-token distributions.
        batch_size: windows per step.
        seq_len: tokens per window; the model's positions if those are fewer.
        accumulation: parts that a batch is computed in, one after the other; less memory, same result.
        fit_learning_rate: highest rate of fitting, as a fraction of each weight's root mean square; linear warm-up,
            then half a cosine to nothing. None for `fitting_rate`, by how far each layer's start is off.
        distill_learning_rate: the same of distillation; None for `distillation_rate`, by how far the model's is.
        distill_optimizer: "adamw", or "muon" for matrices and AdamW for the rest: better at equal tokens, with more
            arithmetic per step, the more the wider the matrices and the fewer the tokens of a step.
        train: what distillation changes: "attention", "norms" (attention and norms), or "all".
        feature_weight: of one minus the cosine between hidden states of the two models, beside the divergence.
        feature_layers: how many decoder layers that is taken at, evenly spread.
        self_generated: fraction of the training windows that the source samples itself, 0 to 1.
        repeats: fraction of the windows of the first step in which passages come again further on, 0 to 1; falls
            linearly to none in the last. What a small cache loses most on is what it has read before. With
            `memory_limit`, twice the hidden states on disk.
        checkpoint_every: steps between two checkpoints, where there is a directory for them.
        evaluate_every: steps between two looks at held-out windows; a twelfth of a stage if 0.
        patience: looks without a better one after which a stage ends; 0 for none. Where the start is good, the loss
            rises until the rate has fallen, so a patient run ends better than an impatient one.
        memory_limit: bytes that fitting may take for weights and optimiser; layers are then fitted a few at a time,
            with hidden states on disk. None for no limit.
        activation_checkpointing: compute the layers' activations again in the backward pass instead of keeping them.
        torch_compile: run decoder layers through `torch.compile`; None for GPUs and runs that are long enough.
    """

    fit_steps: int = 0
    distill_steps: int = 0
    batch_size: int = 8
    seq_len: int = 1024
    accumulation: int = 1
    fit_learning_rate: float | None = None
    distill_learning_rate: float | None = None
    distill_optimizer: Rule = "adamw"
    train: Train = "attention"
    feature_weight: float = 0.0
    feature_layers: int = 4
    self_generated: float = 0.0
    repeats: float = 0.0
    checkpoint_every: int = 100
    evaluate_every: int = 0
    patience: int = 0
    memory_limit: int | None = None
    activation_checkpointing: bool = False
    torch_compile: bool | None = None

    def __post_init__(self) -> None:
        """Refuse what no model could be trained with."""
        for name, least in _LEAST.items():
            self._demand(name, isinstance(getattr(self, name), int), "a whole number")
            self._demand(name, getattr(self, name) >= least, f"at least {least}")
        self._demand("accumulation", self.accumulation <= self.batch_size, f"at most batch_size ({self.batch_size})")
        for name in ("fit_learning_rate", "distill_learning_rate"):
            rate = getattr(self, name)
            self._demand(name, rate is None or isinstance(rate, int | float), "a number")
            self._demand(name, rate is None or 0 < rate < 1, "above 0 and below 1")
        for name in ("feature_weight", "self_generated", "repeats"):
            self._demand(name, isinstance(getattr(self, name), int | float), "a number")
        self._demand("feature_weight", self.feature_weight >= 0, "at least 0")
        self._demand("self_generated", 0 <= self.self_generated <= 1, "from 0 to 1")
        self._demand("repeats", 0 <= self.repeats <= 1, "from 0 to 1")
        rules = get_args(Rule)
        self._demand("distill_optimizer", self.distill_optimizer in rules, f"one of {', '.join(rules)}")
        self._demand("train", self.train in get_args(Train), f"one of {', '.join(get_args(Train))}")

    @classmethod
    def of(cls, **options: Any) -> CalibrationOptions:
        """Options by name; None leaves the default, and `memory_limit` may be text such as "20GiB".

        Raises:
            UsageError: an unknown name, or a value that makes no sense.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(options) - set(names)):
            raise UsageError(f"no calibration option {unknown[0]!r}; there is {', '.join(names)}")
        given = {name: value for name, value in options.items() if value is not None}
        if isinstance(limit := given.get("memory_limit"), str):
            given["memory_limit"] = parse_bytes(limit)
        return cls(**given)

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.fit_steps + self.distill_steps

    def _demand(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise UsageError(f"{name} must be {what}, got {getattr(self, name)!r}")


def parse_bytes(text: str) -> int:
    """Read a size such as "20GiB", "800MB" or a number of bytes; both forms of unit are powers of 1,024.

    Raises:
        UsageError: it is no size above 0.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 2 ** _EXPONENTS[found[2].upper()]) if found else 0
    if size < 1:
        raise UsageError(f"memory limit {text!r} is no size; give one such as 20GiB")
    return size

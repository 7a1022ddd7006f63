"""The stages of a compilation in order: what each does, with which options, when, and how long it took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from attnedit.compiler.progress import Progress, stage
from attnedit.compiler.reporting.records import PipelineStage, Verification
from attnedit.options import CompileOptions, SourceOptions
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.target import AnyTarget
from attnedit.passes.targets import OWN


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: in reports.
        what: it does, for people.
        options: fields of `CompileOptions` that it reads first; a field of none is of the whole job.
        runs: whether it is there, with these options, and layer by layer or not.
    """

    name: str
    what: str
    options: tuple[str, ...]
    runs: Callable[[CompileOptions, bool], bool] = lambda options, parts: True


LOADING, TRAINING = tuple(SourceOptions.model_fields), tuple(CalibrationOptions.model_fields)
PLANNING = ("target", "kv_budget", "full_layers", "profile", "kernel_dims", "engine")
CAPTURE = (*PLANNING, "capture_cache")
DATA = ("calibration", "calibration_tokens", "calibration_length", "seed")
EDITING = ("fuel", "dump_graphs")
STAGES = (
    Stage("load", "read the source, and refuse what cannot be rewritten", LOADING),
    Stage("capture", "find attention by running it, read facts off its graph, plan what each site becomes", CAPTURE),
    Stage("data", "cut calibration windows", DATA, lambda options, parts: options.planned),
    Stage("rewrite", "apply rewrites", ("partial", *EDITING, *DATA), lambda options, parts: not options.planned),
    Stage("lower", "put the new attention in place", ("in_place", *EDITING)),
    Stage("verify", "hold the result to its contract", ("verify",), lambda options, parts: options.verify),
    Stage("train", "fit by gradient steps, then distil", TRAINING, lambda options, parts: options.steps > 0),
)
FITTING = 3
"""Place of the stages that targets have of their own."""
HIDDEN = ("tokenizer", "processor", "progress")
"""Fields that are objects, not settings."""


def stages_of(options: CompileOptions, *, parts: bool = False) -> list[dict[str, Any]]:
    """The stages that a compilation will go through, before anything is done.

    Args:
        options: of the compilation.
        parts: whether it goes layer by layer.

    Returns:
        Of each the stage's name, what it does, and the options that it reads with their values; those of the whole job
        are with the first.
    """
    placed = {name for each in STAGES for name in each.options}.union(*(target.reads for target in OWN.values()))
    whole = [name for name in CompileOptions.model_fields if name not in placed and name not in HIDDEN]
    stages = [*STAGES[:FITTING], *_fitting(options, parts), *STAGES[FITTING:]]
    there = [each for each in stages if each.runs(options, parts)]
    return [
        {
            "stage": each.name,
            "does": each.what,
            "options": {name: getattr(options, name) for name in (*(whole if each is there[0] else ()), *each.options)},
        }
        for each in there
    ]


def _fitting(options: CompileOptions, parts: bool) -> list[Stage]:
    """What the targets do one after another, or all in one walk through the layers."""
    own = [(target, _own(target)) for target in options.configured]
    if parts:
        every = tuple(dict.fromkeys(name for _, names in own for name in names))
        return [Stage("fit", "read, fit and write layer by layer", every)]
    found = []
    for target, names in own:
        if "allocation" in target.reads and target.allocation != "even":
            what = "measure what each layer alone costs, where shares go by it"
            found.append(Stage("allocation", what, ("allocation",)))
        found.append(Stage(target.stage, target.does, names))
    return found


def _own(target: AnyTarget) -> tuple[str, ...]:
    """Options that a target reads as it fits."""
    others = {*PLANNING, *DATA, "allocation"}
    return tuple(name for name in CompileOptions.model_fields if name in target.reads and name not in others)


class Log:
    """What the stages of one compilation did.

    Attributes:
        entries: of those that ran, in order.
    """

    def __init__(self, progress: Progress | None) -> None:
        self.entries: list[PipelineStage] = []
        self._progress = progress

    @contextmanager
    def __call__(self, name: str, *, bar: bool = False) -> Iterator[PipelineStage]:
        """Time a stage, which may say what it did; with a bar where nothing in it tells progress."""
        entry = PipelineStage(name=name)
        start = perf_counter()
        with stage(name, self._progress if bar else None):
            yield entry
        entry.seconds = perf_counter() - start
        self.entries.append(entry)

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return {entry.name: entry.seconds for entry in self.entries}


def said(check: Verification) -> str:
    """One check in a line."""
    error = "" if check.error is None else f": off by {check.error:.1e}"
    allowed = "" if check.tolerance is None else f" where {check.tolerance:.0e} is allowed"
    return f"{check.what}{error}{allowed}"

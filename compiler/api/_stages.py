"""What a pipeline is made of: stages, the job that they share, and the log of what each did and how long it took."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from time import perf_counter

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.execution.verify import check_tokens
from attnedit.compiler.progress import Progress, stage
from attnedit.compiler.reporting.records import KVUsage, LossCurve, PipelineStage, SiteGraphs, Verification
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.options import CompileOptions
from attnedit.passes.beginnings import beginnings
from attnedit.planning import Plan, calibration_windows, plan_sites
from attnedit.result import CompileResult
from attnedit.rows import Fitted
from attnedit.targets.attention.config import SiteConfig


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
        entry.seconds = entry.seconds or perf_counter() - start
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


class Source(ABC):
    """A model to rewrite, with where its result goes: where live models and checkpoints, targets and rewrites differ.

    Attributes:
        model: live, or with its weights on meta.
        result: what the new attention is put into; the model itself or a copy that shares its tensors.
        name: in messages.
        options: of the job, with what opening the source added to them.
        device: where prompts belong; None for that of the weights.
        few_passes: every pass through the model or its result costs reading it.
        left: sites that no target has changed yet.
    """

    model: PreTrainedModel
    result: PreTrainedModel
    name: str
    options: CompileOptions
    device: torch.device | None = None
    few_passes = False
    left: list[AttentionSite]

    @abstractmethod
    def capture(self) -> list[AttentionSite]:
        """Its attention sites."""

    def plan(self, sites: list[AttentionSite], before: KVUsage) -> Plan:
        """What is to become of the sites."""
        return plan_sites(self.model, sites, before, self.options)

    @abstractmethod
    def ready(self, plan: Plan) -> None:
        """Refuse a plan that cannot be done here, before data is read."""

    def data(self) -> CalibrationWindows:
        """Windows of calibration data."""
        return calibration_windows(self.model, self.options)

    @abstractmethod
    def fit(self, job: Job, target: Target | None, entry: PipelineStage) -> None:
        """New attention for the sites that a target changes, into `Job.fitted`; of all that there is for None."""

    def measure(self, job: Job, target: Target | None, entry: PipelineStage) -> None:
        """What each layer costs alone, before a target's budget is shared by it; without this, shares are even."""
        entry.did = "shares are even, nothing was measured"

    @abstractmethod
    def lower(self, job: Job) -> None:
        """Make the graphs of `Job.fitted` those that are put into the result."""

    def reading(self, result: PreTrainedModel | None = None) -> AbstractContextManager[None]:
        """Inside, forward passes of the model work, or of its result."""
        return nullcontext()


@dataclass
class Job:
    """What the stages of one compilation share: each fills in what those after it read.

    Attributes:
        options: what was asked for.
        opens: reads the source, and refuses what cannot be rewritten.
        log: of the stages.
        closing: undone when the source is as it was: its modes, its attention, data that goes with tokens.
        source: "load".
        sites, plan, modes: "capture"; the last the source's training modes.
        data: "data"; None where nothing is lost.
        fitted: of the stages of fitting, or of rewrites.
        expected, own_error: "reference"; the source's logits, None where something may be lost, and what its own
            decoding is off by.
        result, configs, drawn: "lower"; the model, its new attention by the site's name, graphs for the report.
        checks, curve: "verify".
        done: what the job gives.
    """

    options: CompileOptions
    opens: Callable[[CompileOptions], Source]
    log: Log = field(init=False)
    closing: ExitStack = field(default_factory=ExitStack)
    source: Source = field(init=False)
    sites: list[AttentionSite] = field(init=False)
    plan: Plan = field(init=False)
    modes: dict[str, bool] = field(init=False)
    data: CalibrationWindows | None = None
    fitted: Fitted = field(default_factory=Fitted)
    expected: Tensor | None = None
    own_error: float = 0.0
    result: PreTrainedModel = field(init=False)
    configs: dict[str, SiteConfig] = field(init=False)
    drawn: list[SiteGraphs] = field(init=False)
    checks: list[Verification] = field(default_factory=list)
    curve: LossCurve | None = None
    done: CompileResult | None = None

    def __post_init__(self) -> None:
        """Start the log."""
        self.log = Log(self.options.progress)

    @cached_property
    def windows(self) -> list[Tensor] | None:
        """Token ids [N, T] of each length that fits see; where images go with windows, those are run as they are."""
        if self.data is None:
            return None
        wanted = any(target.begins for target in self.plan.targets) and not self.data.inputs.by_ids
        return [*self.data.parts, *(beginnings(self.data.parts, self.options.seed) if wanted else [])]

    @cached_property
    def ids(self) -> Tensor:
        """The prompt that the result is held to, longer than what any layer holds."""
        held = max((target.cached_tokens for target in self.plan.targets), default=0)
        parts = None if self.data is None else self.data.parts
        return check_tokens(parts, self.source.model, held, self.source.device)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: in reports.
        what: it does, for people.
        options: fields of `CompileOptions` that it reads first; a field of none is of the whole job.
        do: it, and say in the log's entry what was done and checked.
        listed: whether a compilation with these options has it.
        needed: whether there is anything to do, once the stages before it are done.
        bar: whether nothing in it tells progress.
    """

    name: str
    what: str
    options: tuple[str, ...]
    do: Callable[[Job, PipelineStage], None]
    listed: bool = True
    needed: Callable[[Job], bool] = lambda job: True
    bar: bool = False


def run(stages: Sequence[Stage], job: Job) -> None:
    """Do stages in order; whatever happens, the source is left as it was.

    Raises:
        UsageError: wrong input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract.
    """
    with job.closing:
        for each in stages:
            if each.needed(job):
                with job.log(each.name, bar=each.bar) as entry:
                    each.do(job, entry)

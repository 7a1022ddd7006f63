"""The optimiser loop that both stages share: schedule, guard against spikes, best state, checkpoints, log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from attnedit.compiler.compatibility.torch_names import foreach_mul_
from attnedit.compiler.errors import AttneditError
from attnedit.compiler.execution.processes import processes
from attnedit.compiler.execution.stream import fast_bfloat16
from attnedit.compiler.progress import Progress, silent
from attnedit.passes.calibration.journal import Journal
from attnedit.passes.calibration.optimiser import Optimiser, size_of
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.parameters import local, local_gradient, restore, snapshot

WARM_UP = 8
"""Steps at least, or half of a run that has fewer than twice as many."""
CLIP = 1.0
"""Largest norm of the gradient."""
SPIKE = 3.0
"""A loss this many times the highest of the last ones is not learned from."""
HISTORY = 32
SKIPS = 16
"""Steps in a row with a loss of `SPIKE` times the usual after which training goes back to its best state, at half the
rate. Few in a row are windows of another kind, such as repeated passages: those are learned from."""
RECOVERIES = 2
LOOKS = 12
"""Looks at held-out windows per stage, unless told."""


class DivergedError(AttneditError):
    """Training did not recover; the model has the best state that it had."""


@dataclass
class StageState:
    """Where a stage is, beside parameters and optimiser.

    Attributes:
        name: of the stage.
        step: steps done, skipped ones too.
        best, best_step: lowest held-out loss, and when.
        rate: highest learning rate, relative to the root mean square of each weight; of the part with the worst start.
        first, last: held-out loss before training, and at the last look.
        since: looks since the best.
        skipped: steps without an update.
        row: steps in a row with a loss far above the usual one.
        recoveries: times that training went back to its best state.
        seconds: spent.
        tokens: seen.
        losses: the last ones; of those not learned from what would have been.
        usual: the median of the last losses when held-out windows were best.
        done: whether it is over.
    """

    name: str
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    rate: float = math.nan
    first: float = math.nan
    last: float = math.nan
    since: int = 0
    skipped: int = 0
    row: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    usual: float = math.nan
    done: bool = False

    def spikes(self, loss: float) -> bool:
        """Take in a loss; whether it is far above all of the last ones."""
        if not math.isfinite(loss):
            self.row += 1
            return True
        if len(self.losses) < HISTORY // 4:
            self.losses.append(loss)
            return False
        if math.isnan(self.usual):
            self.usual = statistics.median(self.losses)
        self.row = self.row + 1 if loss > SPIKE * self.usual else 0
        most = SPIKE * max(self.losses)
        self.losses = [*self.losses, min(loss, most)][-HISTORY:]
        return loss > most

    def forget(self) -> None:
        """Losses so far say nothing of those to come."""
        self.row, self.losses, self.usual = 0, [], math.nan


@dataclass
class Stage:
    """What a stage trains, and on what.

    Attributes:
        name: shown and logged.
        parameters: by name.
        parts: names of parameters by the loss that they have a part in; losses of different parts are independent.
        steps: how many.
        rate: highest learning rate of a part, for its held-out loss before training.
        tokens: of a step.
        learn: accumulates this process's part of a step's gradients and returns its part of the losses by name;
            "loss" is the one watched.
        evaluate: this process's share of each part's loss on held-out windows.
        orthogonal: names of matrices that Muon changes, see `Optimiser`.
    """

    name: str
    parameters: Mapping[str, nn.Parameter]
    parts: Sequence[Sequence[str]]
    steps: int
    rate: Callable[[float], float]
    tokens: Callable[[int], int]
    learn: Callable[[int], Mapping[str, float]]
    evaluate: Callable[[], Sequence[float]]
    orthogonal: Collection[str] = ()


def run_stage(
    stage: Stage,
    options: CalibrationOptions,
    journal: Journal,
    *,
    progress: Progress | None = None,
) -> StageState:
    """Train until the last step or until held-out windows stop getting better; the best state stays.

    Args:
        stage: what and on what.
        options: see `CalibrationOptions`.
        journal: where checkpoints and log go, and what an earlier run left.
        progress: told of every step.

    Raises:
        DivergedError: losses stayed broken after going back to the best state.
    """
    run = _Run(stage, options, journal)
    report, describe = progress or silent, getattr(progress, "describe", None)
    state = run.state
    if state.done:
        return state
    report(stage.name, state.step, stage.steps)
    while state.step < stage.steps and not 0 < options.patience <= state.since:
        entry = run.step()
        journal.log(entry)
        report(stage.name, state.step, stage.steps)
        if describe is not None:
            describe(stage.name, f"loss {entry['loss']:.4g}, {entry['tokens_per_second']:,.0f} tokens/s")
        if state.step % options.checkpoint_every == 0 and state.step < stage.steps:
            run.checkpoint()
    run.finish()
    return state


class _Run:
    """A stage at work: its state, its optimiser, and the best parameters so far."""

    def __init__(self, stage: Stage, options: CalibrationOptions, journal: Journal) -> None:
        self._stage, self._journal = stage, journal
        self._every = options.evaluate_every or max(1, stage.steps // LOOKS)
        self._sizes = {name: size_of(parameter) for name, parameter in stage.parameters.items()}
        self._local = {name: local(parameter) for name, parameter in stage.parameters.items()}
        self._best: dict[str, Tensor] = {}
        self.state = StageState(stage.name)
        saved = journal.resume(stage.name)
        if saved:
            self.state, self._best, self._sizes = StageState(**saved["state"]), saved["best"], saved["sizes"]
            restore(self._local, saved["parameters"])
        else:
            losses = _evaluate(stage)
            self.state.first = self.state.last = self.state.best = statistics.fmean(losses)
            self._set_rates([stage.rate(loss) for loss in losses])
            self._best = snapshot(self._local)
        self._optimiser = Optimiser(self._local, self._sizes, stage.orthogonal)
        if saved and saved["optimiser"] is not None:
            self._optimiser.load_state_dict(saved["optimiser"])
        self._start = perf_counter() - self.state.seconds

    def _set_rates(self, rates: Sequence[float]) -> None:
        """The highest is the stage's; of other parts' parameters, sizes say how much lower theirs are."""
        self.state.rate = max(rates)
        for names, rate in zip(self._stage.parts, rates, strict=True):
            for name in names:
                self._sizes[name] *= rate / self.state.rate

    def step(self) -> dict[str, Any]:
        """Learn from one batch, unless it is broken; returns what is logged."""
        stage, state = self._stage, self.state
        if state.step and stage.tokens(state.step) != stage.tokens(state.step - 1):  # longer windows
            state.forget()
        rate = state.rate * _schedule(state.step, stage.steps) / 2**state.recoveries
        self._forget_gradients()
        losses = processes().add(stage.learn(state.step))
        processes().add_gradients(stage.parameters.values())
        for name, parameter in stage.parameters.items():
            self._local[name].grad = local_gradient(parameter)
        norms = self._clip()
        state.tokens += stage.tokens(state.step)
        state.step += 1
        broken = state.spikes(losses["loss"] if all(map(math.isfinite, norms)) else math.nan)
        if broken:
            state.skipped += 1
        else:
            self._optimiser.step(rate)
        entry = {"stage": stage.name, "step": state.step, **losses, "norm": max(norms), "rate": rate, "skipped": broken}
        if state.row >= SKIPS:
            self._recover()
        if state.step % self._every == 0 or state.step == stage.steps:
            entry["held_out"] = self._look()
        state.seconds = perf_counter() - self._start
        return {**entry, "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9), 1)}

    def checkpoint(self) -> None:
        """Save all there is, to go on from."""
        self._journal.checkpoint(asdict(self.state), self._local, self._sizes, self._optimiser.state_dict(), self._best)

    def finish(self) -> None:
        """Keep the best parameters."""
        restore(self._local, self._best)
        self._forget_gradients()
        self.state.done = True
        self._journal.checkpoint(asdict(self.state), self._local, self._sizes, None, {})

    def _forget_gradients(self) -> None:
        for parameter in (*self._stage.parameters.values(), *self._local.values()):
            parameter.grad = None

    def _clip(self) -> list[float]:
        """Bring the gradients of each of `Stage.parts` to a norm of at most `CLIP`; returns what the norms were."""
        norms = []
        for names in self._stage.parts:
            whole: list[Tensor] = []
            parts: list[Tensor] = []
            for name in names:
                gradient = self._local[name].grad
                if gradient is not None:
                    (parts if self._local[name] is not self._stage.parameters[name] else whole).append(gradient)
            squares = {"whole": _square(whole), "parts": _square(parts)}
            if processes().sharded:
                squares["parts"] = processes().add({"parts": squares["parts"]})["parts"]
            norm = math.sqrt(squares["whole"] + squares["parts"])
            if norm > CLIP:
                foreach_mul_([*whole, *parts], CLIP / norm)
            norms.append(norm)
        return norms

    def _recover(self) -> None:
        """Go back to the best parameters with half the rate, or give up there."""
        state = self.state
        restore(self._local, self._best)
        if state.recoveries == RECOVERIES:
            raise DivergedError(
                f"{state.name}: the loss broke down {RECOVERIES + 1} times, last at step {state.step}; "
                "lower the learning rate"
            )
        self._optimiser.forget()
        state.recoveries += 1
        state.forget()

    def _look(self) -> float:
        """Held-out loss now; remember parameters that are the best so far."""
        state = self.state
        state.last = statistics.fmean(_evaluate(self._stage))
        if state.last < state.best:
            state.best, state.best_step, state.since = state.last, state.step, 0
            state.usual = statistics.median(state.losses) if state.losses else math.nan
            self._best = snapshot(self._local)
        else:
            state.since += 1
        return state.last


@contextmanager
def mixed_precision(model: nn.Module) -> Iterator[None]:
    """Matrix products in bfloat16 where that is faster, or where some weights are half and the trained ones float32."""
    device = next(model.parameters()).device
    with torch.autocast(device.type, torch.bfloat16, enabled=multiplies_half(model)):
        yield


def multiplies_half(model: nn.Module) -> bool:
    """Whether `mixed_precision` makes products in bfloat16."""
    weight = next(model.parameters())
    fast = weight.device.type in ("cuda", "npu") or (weight.device.type == "cpu" and fast_bfloat16())
    return weight.dtype in (torch.bfloat16, torch.float16) or fast


def _schedule(step: int, steps: int) -> float:
    """Fraction of the highest rate: linear warm-up, then half a cosine to nothing.

    Adam's first steps are as large as the rate allows wherever the gradient points, and the closed-form start is good:
    a run too short for a warm-up would throw it away.
    """
    warm = min(max(WARM_UP, steps // 20), (steps + 1) // 2)
    if step < warm:
        return (step + 1) / warm
    angle = math.pi * (step - warm) / max(1, steps - warm)
    return (1 + math.cos(angle)) / 2


def _evaluate(stage: Stage) -> list[float]:
    """Held-out loss of each part."""
    losses = {str(index): loss for index, loss in enumerate(stage.evaluate())}
    total = processes().add(losses)
    return [total[index] for index in losses]


def _square(gradients: Sequence[Tensor]) -> float:
    """Sum of squares."""
    return float(torch.nn.utils.get_total_norm(gradients)) ** 2


def weighted_sum(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, float]:
    """Sum of weight times loss, by name, over the parts of a batch; nothing where there are none."""
    total: dict[str, float] = {}
    for weight, losses in parts:
        for name, loss in losses.items():
            total[name] = total.get(name, 0.0) + weight * float(loss)
    return total

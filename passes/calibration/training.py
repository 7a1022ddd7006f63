"""The optimiser loop that both stages share: schedule, guard against spikes, best state, checkpoints, log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from attnedit.compiler.compatibility.torch_names import foreach_mul_
from attnedit.compiler.errors import AttneditError
from attnedit.compiler.execution.stream import fast_bfloat16
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import Progress, silent
from attnedit.passes.calibration.journal import Journal
from attnedit.passes.calibration.optimiser import Optimiser, size_of
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.parameters import local, local_gradient, restore, snapshot
from attnedit.passes.calibration.state import StageState

WARM_UP = 8
"""Steps at least, or half of a run that has fewer than twice as many."""
CLIP = 1.0
"""Largest norm of the gradient."""
SKIPS = 16
"""Steps in a row with a loss of `SPIKE` times the usual after which training goes back to its best state, at half the
rate. Few in a row are windows of another kind, such as repeated passages: those are learned from."""
RECOVERIES = 2
WORSE = 1.05
"""A part of `Stage.parts` that backs off does so when its held-out loss is this many times its best."""
BACK = 0.25
"""What its learning rate is multiplied by then."""
LOOKS = 12
"""Looks at held-out windows per stage, unless told."""


class DivergedError(AttneditError):
    """Training did not recover; the model has the best state that it had."""


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
        backs_off: whether a part whose held-out loss has grown goes back to its best with a lower rate. For a loss that
            a good rate lowers from the first look on.
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
    backs_off: bool = False
    orthogonal: Collection[str] = ()


def run_stage(
    stage: Stage,
    options: CalibrationOptions,
    journal: Journal,
    *,
    progress: Progress | None = None,
) -> StageState:
    """Train until the last step or until held-out windows stop getting better; the best state of each part stays.

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
            self.state.part_best = self.state.part_best or [self.state.best] * len(stage.parts)
            restore(self._local, saved["parameters"])
        else:
            losses = _evaluate(stage)
            self.state.first = self.state.last = self.state.best = statistics.fmean(losses)
            self.state.part_best = losses
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
        """Held-out loss now; remember parts that are the best so far, and lower the rate of those that got worse."""
        state = self.state
        losses = _evaluate(self._stage)
        state.last = statistics.fmean(losses)
        better = [index for index, loss in enumerate(losses) if loss < state.part_best[index]]
        worse = [index for index, loss in enumerate(losses) if not loss <= WORSE * state.part_best[index]]
        if better:
            for index in better:
                state.part_best[index] = losses[index]
            self._best |= snapshot(self._of(better))
            state.best, state.best_step, state.since = statistics.fmean(state.part_best), state.step, 0
            state.usual = statistics.median(state.losses) if state.losses else math.nan
        else:
            state.since += 1
        if worse and self._stage.backs_off:
            self._back_off(worse)
        return state.last

    def _of(self, parts: Sequence[int]) -> dict[str, nn.Parameter]:
        """This process's share of the parameters of some parts."""
        return {name: self._local[name] for index in parts for name in self._stage.parts[index]}

    def _back_off(self, parts: Sequence[int]) -> None:
        """Parts go back to their best parameters, without moments, at a lower rate from now on."""
        chosen = self._of(parts)
        restore(chosen, {name: self._best[name] for name in chosen})
        for name in chosen:
            self._sizes[name] *= BACK
        self._optimiser = self._optimiser.with_sizes(self._sizes, chosen)
        self.state.backed_off += len(parts)


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

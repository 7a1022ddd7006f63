"""The loop that trains: what it skips, when it stops, and how it goes on after being stopped."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import source, tokens
from torch import Tensor, nn

import attnedit
from attnedit.passes.calibration import training
from attnedit.passes.calibration.journal import Journal
from attnedit.passes.calibration.optimiser import FRESH_SIZE
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.training import DivergedError, Stage, run_stage


class Quadratic:
    """A stage whose loss is the squared distance of one parameter from 3, spoilt where asked."""

    def __init__(self, broken: Mapping[int, float] | None = None, always_from: int = 10**9, steps: int = 60) -> None:
        self.parameter = nn.Parameter(torch.full((2,), -1.0))
        self.broken, self.always_from = broken or {}, always_from
        self.seen: list[int] = []
        self.stage = Stage(
            "toy",
            {"x": self.parameter},
            [["x"]],
            steps,
            lambda _: 0.3,
            lambda _: 10,
            self.learn,
            lambda: [float(self.loss().detach())],
        )

    def loss(self) -> Tensor:
        return (self.parameter - 3).square().sum()

    def learn(self, step: int) -> dict[str, float]:
        self.seen.append(step)
        factor = self.broken.get(step, math.nan if step >= self.always_from else 1.0)
        loss = self.loss() * factor
        loss.backward()
        return {"loss": float(loss.detach())}


def run(toy: Quadratic, directory: Path | None = None, **options: Any) -> Any:
    settings: dict[str, Any] = {"patience": 100, "checkpoint_every": 7, **options}
    return run_stage(toy.stage, CalibrationOptions(**settings), Journal(directory))


def test_broken_steps_are_skipped_and_counted() -> None:
    clean, spoilt = Quadratic(), Quadratic({20: math.nan, 21: math.inf, 30: 1e6})
    run(clean)
    state = run(spoilt)
    assert state.skipped == 3
    assert state.recoveries == 0
    assert state.best < 1e-2 * state.first
    assert torch.isfinite(spoilt.parameter).all()
    assert float(clean.loss().detach()) < 1e-2


def test_windows_of_another_kind_are_learned_from() -> None:
    """Every second loss is ten times the others, as with repeated passages; but what is broken is left out."""
    toy = Quadratic({step: 10.0 for step in range(1, 200, 2)} | {150: 1e9}, steps=200)
    state = run(toy)
    assert 0 < state.skipped <= 4
    assert state.recoveries == 0


@pytest.mark.parametrize("longer", [True, False])
def test_longer_windows_are_no_break_down(longer: bool) -> None:
    toy = Quadratic(steps=100)

    def learn(step: int) -> dict[str, float]:
        toy.learn(step)
        return {"loss": 1.0 if step < 50 else 40.0}

    toy.stage.learn = learn
    toy.stage.tokens = lambda step: 20 if longer and step >= 50 else 10
    state = run(toy)
    assert (state.skipped, state.recoveries) == ((0, 0) if longer else (3, 1))


def test_a_run_that_cannot_recover_ends_with_its_best_state() -> None:
    toy = Quadratic(always_from=30, steps=200)
    with pytest.raises(DivergedError, match="lower the learning rate"):
        run(toy, evaluate_every=1)
    assert float(toy.loss().detach()) < 1.0
    assert len(toy.seen) == 30 + training.SKIPS * (training.RECOVERIES + 1)


def test_steps_are_relative_to_the_size_of_a_weight() -> None:
    """Adam's first step is the rate, whatever the gradient; a weight of zeros moves too."""
    weights = {"large": torch.full((3,), 8.0), "small": torch.full((3,), -0.5), "zero": torch.zeros(3)}
    parameters = {name: nn.Parameter(value.clone()) for name, value in weights.items()}

    def learn(_: int) -> dict[str, float]:
        sum((parameter.sum() for parameter in parameters.values()), torch.zeros(())).backward()
        return {"loss": 1.0}

    looks = iter([[1.0] * len(parameters), [0.5] * len(parameters)])
    stage = Stage(
        "toy", parameters, [[name] for name in parameters], 1, lambda _: 0.01, lambda _: 10, learn, lambda: next(looks)
    )
    run_stage(stage, CalibrationOptions(), Journal(None))
    moved = {name: float((weights[name] - p.detach()).mean()) for name, p in parameters.items()}
    assert moved == pytest.approx({"large": 0.08, "small": 0.005, "zero": 0.01 * FRESH_SIZE}, rel=1e-3)


def test_the_best_state_stays_and_ends_a_run_early() -> None:
    toy = Quadratic(steps=100)
    values = iter([5.0, 4.0, 1.0, *[2.0] * 50])
    at: list[Tensor] = []

    def evaluate() -> list[float]:
        at.append(toy.parameter.detach().clone())
        return [next(values)]

    toy.stage.evaluate = evaluate
    state = run(toy, evaluate_every=5, patience=4)
    assert (state.best, state.best_step, state.step) == (1.0, 10, 30)
    assert torch.equal(toy.parameter, at[2])


def two_parts(curvature: float, backs_off: bool) -> tuple[dict[str, nn.Parameter], Stage]:
    """Two losses apart: one that any rate here lowers, and one so near its end that steps of this rate overshoot."""
    parameters = {name: nn.Parameter(torch.tensor([start])) for name, start in (("flat", -1.0), ("near", 2.99))}

    def losses() -> list[Tensor]:
        return [(parameters["flat"] - 3).square().sum(), curvature * (parameters["near"] - 3).square().sum()]

    def learn(_: int) -> dict[str, float]:
        loss = torch.stack(losses()).sum()
        loss.backward()
        return {"loss": float(loss.detach())}

    def evaluate() -> list[float]:
        return [float(loss.detach()) for loss in losses()]

    parts = [["flat"], ["near"]]
    return parameters, Stage("toy", parameters, parts, 60, lambda _: 0.05, lambda _: 10, learn, evaluate, backs_off)


def squares(parameters: Mapping[str, nn.Parameter]) -> float:
    return float((parameters["near"].detach() - 3).square().sum())


def test_a_part_that_gets_worse_goes_back_and_the_other_goes_on() -> None:
    stays, (alone, _) = {}, two_parts(1e-3, False)
    for backs_off in (False, True):
        parameters, stage = two_parts(1e-3, backs_off)
        state = run_stage(stage, CalibrationOptions(evaluate_every=5), Journal(None))
        stays[backs_off] = (parameters, state)
    (free, before), (held, after) = stays[False], stays[True]
    assert (before.backed_off, after.backed_off > 0) == (0, True)
    assert torch.equal(free["flat"], held["flat"]), "the other part sees nothing of it"
    assert squares(held) < 0.1 * squares(alone), "at a lower rate it learns"
    assert after.best == pytest.approx(sum(after.part_best) / 2)


def test_each_part_keeps_its_own_best_state() -> None:
    parameters, stage = two_parts(1e-3, False)
    looks = iter([[5.0, 5.0], [4.0, 6.0], [6.0, 2.0], [7.0, 7.0]])
    at: list[dict[str, Tensor]] = []

    def evaluate() -> list[float]:
        at.append({name: parameter.detach().clone() for name, parameter in parameters.items()})
        return next(looks)

    stage.evaluate, stage.steps = evaluate, 9
    state = run_stage(stage, CalibrationOptions(evaluate_every=3), Journal(None))
    assert (state.best, state.best_step, state.part_best) == (3.0, 6, [4.0, 2.0])
    assert torch.equal(parameters["flat"], at[1]["flat"])
    assert torch.equal(parameters["near"], at[2]["near"])


@pytest.mark.parametrize("stop", [5, 11, 23])
def test_a_run_whose_parts_went_back_can_be_stopped(stop: int, tmp_path: Path) -> None:
    options = CalibrationOptions(evaluate_every=5, checkpoint_every=7)
    whole, stage = two_parts(1e-3, True)
    expected = run_stage(stage, options, Journal(tmp_path / "whole"))
    _, stage = two_parts(1e-3, True)
    learn = stage.learn

    def interrupt(step: int) -> Mapping[str, float]:
        if step == stop:
            raise KeyboardInterrupt
        return learn(step)

    stage.learn = interrupt
    with pytest.raises(KeyboardInterrupt):
        run_stage(stage, options, Journal(tmp_path / "stopped"))
    second, stage = two_parts(1e-3, True)
    state = run_stage(stage, options, Journal(tmp_path / "stopped"))
    assert all(torch.equal(whole[name], second[name]) for name in whole)
    assert (state.part_best, state.backed_off) == (expected.part_best, expected.backed_off)


@pytest.mark.parametrize("stop", [1, 7, 8, 20, 59])
def test_a_run_stopped_anywhere_ends_as_if_it_had_not(stop: int, tmp_path: Path) -> None:
    whole = Quadratic({9: math.nan})
    expected = run(whole, tmp_path / "whole")
    first = Quadratic({9: math.nan})

    def interrupt(step: int) -> dict[str, float]:
        if step == stop:
            raise KeyboardInterrupt
        return first.learn(step)

    first.stage.learn = interrupt
    with pytest.raises(KeyboardInterrupt):
        run(first, tmp_path / "stopped")
    second = Quadratic({9: math.nan})
    state = run(second, tmp_path / "stopped")
    assert second.seen[:1] == [stop // 7 * 7]
    assert torch.equal(second.parameter, whole.parameter)
    assert (state.best, state.step, state.skipped) == (expected.best, expected.step, expected.skipped)
    entries = [Journal(tmp_path / name).entries() for name in ("whole", "stopped")]
    for entry in itertools.chain(*entries):
        entry.pop("tokens_per_second")
    assert str(entries[0]) == str(entries[1])  # as text: NaN is equal to itself there
    third = Quadratic({9: math.nan})
    run(third, tmp_path / "stopped")
    assert third.seen == []
    assert torch.equal(third.parameter, whole.parameter)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "training: out of memory; raise accum",
        ),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
            "out of memory",
        ),
        (
            RuntimeError("CUDA error: unspecified launch failure\nSearch for `cudaErrorLaunchFailure'"),
            r"the device failed \(CUDA error: unspecified launch failure\); the same command goes on from its last",
        ),
        (RuntimeError("size mismatch"), "^size mismatch$"),
    ],
    ids=["gpu", "cpu", "launch", "other"],
)
def test_a_device_that_fails_is_told_in_one_line(
    error: RuntimeError, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the run can be gone on with: the same call ends as if nothing had happened."""
    result = attnedit.compile(source("llama"), kv_budget=0.5, calibration=tokens(8, 32), alternations=0)
    step = training.Optimiser.step
    calls: list[float] = []

    def failing(self: Any, rate: float) -> None:
        calls.append(rate)
        if len(calls) == 4:
            raise error
        step(self, rate)

    settings: dict[str, Any] = {"fit_steps": 6, "batch_size": 2, "seq_len": 16, "checkpoint_every": 2}
    settings |= {"calibration": tokens(24, 16), "run_directory": tmp_path, "verify": False}
    monkeypatch.setattr(training.Optimiser, "step", failing)
    kind = attnedit.AttneditError if "mismatch" not in message else RuntimeError
    with pytest.raises(kind, match=message):
        attnedit.calibrate(result, source("llama"), **settings)
    again = attnedit.calibrate(result, source("llama"), **settings)
    assert len(calls) == 4 + 6 - 2
    assert again.report.stages[0].steps == 6

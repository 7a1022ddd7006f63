"""Which rule changes which weights, by how much, and at what rate."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

import pytest
import torch
from compiled import source, tokens
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import attnedit
from attnedit.passes.calibration import distillation, fitting, optimiser, run
from attnedit.passes.calibration.distillation import distillation_rate
from attnedit.passes.calibration.fitting import fitting_rate
from attnedit.passes.calibration.journal import Journal
from attnedit.passes.calibration.optimiser import LOWEST_RATE, Optimiser, matrices
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.training import Stage, run_stage
from attnedit.targets.runtime.eager import share_copy


@pytest.mark.parametrize("shape", [(6, 6), (4, 10), (10, 4)])
def test_muon_moves_a_matrix_alike_in_all_directions_of_its_gradient(shape: tuple[int, int]) -> None:
    """Against a singular value decomposition: the quintic iteration leaves singular values from 0.5 to 1.5."""
    torch.manual_seed(1)
    parameters = {"matrix": nn.Parameter(torch.randn(shape)), "vector": nn.Parameter(torch.randn(5))}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    left, _, right = torch.linalg.svd(torch.randn(shape, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    parameters["matrix"].grad = (left @ values.diag() @ right).float()
    parameters["vector"].grad = torch.tensor([1e-3, -1.0, 2.0, -1e-3, 1.0])
    Optimiser(parameters, {"matrix": 0.5, "vector": 2.0}, {"matrix"}).step(0.01)
    moved = (before["matrix"] - parameters["matrix"].detach()).double() / (0.01 * 0.5 * 0.2 * max(shape) ** 0.5)
    inside = left.T @ moved @ right.T
    assert ((inside.diagonal() > 0.5) & (inside.diagonal() < 1.5)).all()
    assert (inside - inside.diagonal().diag()).abs().max() < 0.1  # the iteration is in bfloat16
    steps = before["vector"] - parameters["vector"].detach()
    assert torch.allclose(steps, 0.02 * parameters["vector"].grad.sign(), rtol=1e-3)


@pytest.mark.parametrize("together", [1, 100, 1 << 26])
def test_muon_of_several_matrices_is_torchs(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and sizes mixed, one at a time, a few and all together; a matrix without a gradient stays."""
    monkeypatch.setattr(optimiser, "TOGETHER", together)
    torch.manual_seed(2)
    start = [torch.randn(shape) for shape in [(6, 9), (9, 6), (6, 9), (1, 7), (6, 9), (9, 6), (5, 5), (6, 9)]]
    sizes = [2.0 ** (index % 3) for index in range(len(start))]
    ours, theirs = ([nn.Parameter(weight.clone()) for weight in start] for _ in range(2))
    named = {str(index): weight for index, weight in enumerate(ours)}
    rule = Optimiser(named, {name: sizes[int(name)] for name in named}, set(named))
    groups = [{"params": [weight], "lr": 0.1 * size} for weight, size in zip(theirs, sizes, strict=True)]
    reference = torch.optim.Muon(groups, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for mine, other in zip(ours[:-1], theirs[:-1], strict=True):
            mine.grad = torch.randn(mine.shape)
            other.grad = mine.grad.clone()
        rule.step(0.1)
        reference.step()
    for mine, other, before in zip(ours, theirs, start, strict=True):
        # Products in bfloat16 may be added up in another order.
        assert (mine - other).norm() <= 0.02 * (other - before).norm()
    assert torch.equal(ours[-1], start[-1])


def test_both_rules_make_updates_of_one_size() -> None:
    """Over steps of noise, Muon's are a fifth of the rate, as AdamW's are there (arXiv 2502.16982, section 2.2)."""
    torch.manual_seed(0)
    moved = {}
    for muon in (False, True):
        weight = nn.Parameter(torch.zeros(32, 64))
        rule = Optimiser({"w": weight}, {"w": 1.0}, {"w"} if muon else ())
        sizes = []
        for _ in range(40):
            before = weight.detach().clone()
            weight.grad = torch.randn(32, 64)
            rule.step(1.0)
            sizes.append(float((weight.detach() - before).square().mean().sqrt()))
        moved[muon] = sum(sizes[20:]) / 20
    assert moved[True] == pytest.approx(0.2, rel=0.3)
    assert moved[False] / 2 < moved[True] < moved[False] * 2


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3", "gemma2"])
def test_matrices_are_neither_tables_nor_vectors(family: str) -> None:
    model = share_copy(source(family))
    parameters = dict(model.named_parameters())
    found = matrices(model, parameters)
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    tables.append(model.get_output_embeddings().weight)
    assert not any(parameters[name] is table for name in found for table in tables)
    others = {name for name, p in parameters.items() if p.dim() == 2 and not any(p is table for table in tables)}
    assert found == others
    assert any("mlp" in name for name in found)
    assert all(parameters[name].dim() == 2 for name in found)


@pytest.mark.parametrize("stop", [3, 8])
def test_a_stopped_run_goes_on_with_the_moments_of_both_rules(stop: int, tmp_path: Path) -> None:
    def stage(interrupted_at: int | None = None) -> tuple[Stage, dict[str, nn.Parameter]]:
        torch.manual_seed(0)
        parameters = {"matrix": nn.Parameter(torch.randn(4, 6)), "vector": nn.Parameter(torch.randn(3))}
        seen = [-1]

        def learn(step: int) -> dict[str, float]:
            if step == interrupted_at:
                raise KeyboardInterrupt
            seen.append(step)
            noise = torch.Generator().manual_seed(step)
            loss = sum(((p - torch.randn(p.shape, generator=noise)) ** 2).sum() for p in parameters.values())
            assert isinstance(loss, torch.Tensor)
            loss.backward()
            return {"loss": float(loss.detach())}

        made = Stage(
            "toy",
            parameters,
            [list(parameters)],
            12,
            lambda _: 0.1,
            lambda _: 1,
            learn,
            lambda: [-float(seen[-1])],
            {"matrix"},
        )
        return made, parameters

    options = CalibrationOptions(checkpoint_every=2)
    whole, expected = stage()
    run_stage(whole, options, Journal(tmp_path / "whole"))
    first, _ = stage(stop)
    with pytest.raises(KeyboardInterrupt):
        run_stage(first, options, Journal(tmp_path / "stopped"))
    second, found = stage()
    run_stage(second, options, Journal(tmp_path / "stopped"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_muon_is_refused_where_no_process_has_a_whole_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "processes", lambda: mock.Mock(sharded=True, count=2))
    for options in (CalibrationOptions(distill_steps=4), CalibrationOptions(fit_steps=4, distill_optimizer="muon")):
        run._check_shares(options)
    with pytest.raises(attnedit.UsageError, match="ask for distill_optimizer adamw"):
        run._check_shares(CalibrationOptions(distill_steps=4, distill_optimizer="muon"))


@given(st.floats(0, 20), st.floats(0, 20))
def test_a_better_start_is_moved_less(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert LOWEST_RATE <= distillation_rate(low) <= distillation_rate(high) <= distillation.HIGHEST_RATE
    assert LOWEST_RATE / 2**0.25 <= fitting_rate(low) <= fitting_rate(high) <= fitting.HIGHEST_RATE * 2**0.25


def test_rates_that_were_measured() -> None:
    """Starts of SmolLM2 at several budgets, and rates that were best there or ended as well as the best tried."""
    assert distillation_rate(0.1) == pytest.approx(0.0009, rel=0.2)
    assert distillation_rate(0.5) == pytest.approx(0.002, rel=0.2)
    assert distillation_rate(1.1) == pytest.approx(0.004, rel=0.2)
    assert fitting_rate(0.035) == pytest.approx(0.005, rel=0.2)
    assert fitting_rate(0.2) == pytest.approx(0.014, rel=0.2)


def test_each_layer_is_fitted_at_the_rate_of_its_own_start() -> None:
    """AdamW's first step is the rate times the weight's size."""
    torch.manual_seed(0)
    parameters = {name: nn.Parameter(torch.randn(16, 16)) for name in ("good", "bad", "worse")}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def learn(step: int) -> dict[str, float]:
        for parameter in parameters.values():
            parameter.grad = torch.ones_like(parameter)
        return {"loss": 1.0}

    looks = iter([[0.001, 0.004, 0.016], [0.0, 0.0, 0.0]])
    parts = [[name] for name in parameters]
    stage = Stage("toy", parameters, parts, 1, lambda loss: loss, lambda _: 1, learn, lambda: next(looks))
    state = run_stage(stage, CalibrationOptions(), Journal(None))
    assert (state.rate, state.first) == (0.016, pytest.approx(0.007))
    moved = {name: float((before[name] - parameters[name].detach()).mean()) for name in parameters}
    assert moved == pytest.approx({"good": 0.001, "bad": 0.004, "worse": 0.016}, rel=1e-3)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
def test_distillation_takes_its_rate_from_the_start(rule: str) -> None:
    result = attnedit.compile(
        source("llama"),
        kv_budget=0.5,
        calibration=tokens(24, 32),
        distill_steps=4,
        batch_size=4,
        seq_len=16,
        train="all",
        distill_optimizer=rule,
    )
    (stage,) = result.report.stages
    assert stage.learning_rate == pytest.approx(distillation_rate(stage.before))
    assert f"at rate {stage.learning_rate:.2g}" in str(result.report)
    assert math.isfinite(stage.best)
    assert result.report.recipe["training"].get("distill_optimizer", "adamw") == rule

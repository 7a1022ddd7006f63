"""Parts of calibration against direct computation: losses, memory, what options change."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import MODULE, _remembered, compile_tiny, logits, source, tokens
from torch import Tensor, nn

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.passes.calibration.batches import mix
from attnedit.passes.calibration.distillation import Distillation
from attnedit.passes.calibration.fitting import BYTES_PER_PARAMETER, LayerFit, groups
from attnedit.passes.calibration.options import CalibrationOptions, parse_bytes
from attnedit.passes.calibration.parameters import own_memory, share, trainable
from attnedit.passes.calibration.run import calibrate
from attnedit.passes.calibration.state import StageState
from attnedit.passes.calibration.training import Stage
from attnedit.targets.runtime.eager import share_copy

FAMILIES = ["llama", "qwen3", "gemma2", "gpt2", "gpt_oss", "qwen3_next"]


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors with fast bfloat16 too: rounding would hide what is compared."""
    monkeypatch.setattr("attnedit.passes.calibration.training.fast_bfloat16", lambda: False)


@functools.cache
def rewritten(family: str, target: str = "gateswa") -> Any:
    options: dict[str, Any] = {"gateswa": {"window": 4, "full_layers": 0}, "mla": {"kv_budget": 0.5}}[target]
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(source(family), target, calibration=tokens(4, 32), **options).model


def sites_of(family: str) -> list[AttentionSite]:
    names = rewritten(family).config.attnedit["sites"]
    return [site for site in _remembered(source(family)) if site.name in names]


def test_short_windows_are_shorter_and_not_for_layers_fitted_in_turn() -> None:
    with pytest.raises(UsageError, match=r"short_seq_len must be below seq_len \(8\), got 8"):
        CalibrationOptions.of(seq_len=8, short_seq_len=8)
    model = source("llama")
    result = compile_tiny(model, 0.5, alternations=1)
    options = {"calibration": tokens(6, 32), "seq_len": 32, "short_seq_len": 8, "batch_size": 2}
    with pytest.raises(UsageError, match="2 turns"):
        attnedit.calibrate(result, model, fit_steps=2, memory_limit=1, **options)
    trained = attnedit.calibrate(result, model, fit_steps=4, distill_steps=2, short_share=0.5, **options)
    assert [stage.tokens for stage in trained.report.stages] == [2 * (2 * 8 + 2 * 32), 2 * (8 + 32)]
    assert trained.report.training_length == 32


@pytest.mark.parametrize("target", ["gateswa", "mla"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layer_losses_and_gradients_are_those_of_each_module_alone(family: str, target: str) -> None:
    teacher, ids = source(family), tokens(3, 16, seed=7)
    student = share_copy(rewritten(family, target))
    sites = sites_of(family)
    students = {site.name: student.get_submodule(site.name) for site in sites}
    parameters = trainable(student, students, "attention")
    own_memory(parameters)
    found = LayerFit(teacher, students, sites).losses(ids, scale=0.5)
    gradients = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    assert gradients
    for site in sites:
        calls: list[Any] = []
        handle = teacher.get_submodule(site.name).register_forward_hook(
            lambda _, args, kwargs, out, calls=calls: calls.append((args, kwargs, out[0])), with_kwargs=True
        )
        logits(teacher, ids)
        handle.remove()
        ((args, kwargs, wanted),) = calls
        own = {name: p for name, p in parameters.items() if name.startswith(f"{site.name}.")}
        wrong = students[site.name](*args, **kwargs)[0] - wanted
        of_all, of_first = (
            wrong[:, :end].square().sum((1, 2)) / wanted[:, :end].square().sum((1, 2)) for end in (16, 1)
        )
        loss = (of_all + of_first).mean() / 2
        expected = torch.autograd.grad(0.5 * loss, list(own.values()), allow_unused=True)
        assert float(found[site.name]) == pytest.approx(float(loss.detach()), rel=1e-4)
        for name, gradient in zip(own, expected, strict=True):
            assert (gradient is None) == (name not in gradients), name
            if gradient is not None:
                assert torch.allclose(gradients[name], gradient, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("family", [*FAMILIES, "opt"])
def test_divergence_and_its_gradient_are_those_of_whole_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks that do not divide the positions; through whatever the model does to its logits."""
    monkeypatch.setattr("attnedit.passes.calibration.distillation.POSITIONS", 7)
    teacher, ids = source(family), tokens(2, 12, seed=8)
    student = share_copy(rewritten(family))
    chosen = trainable(student, student.config.attnedit["sites"], "attention")
    for parameter in student.parameters():
        parameter.requires_grad_(False)
    own_memory(chosen)
    names = [site.name.rsplit(".", 1)[0] for site in sites_of(family)]
    divergence, features = Distillation(student, teacher, names).losses(ids, 1.0, torch.tensor(0.3))
    found = {name: p.grad.clone() for name, p in chosen.items() if p.grad is not None}

    hidden: dict[str, list[Tensor]] = {"teacher": [], "student": []}
    for which, model in (("teacher", teacher), ("student", student)):
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda _, __, out, which=which: hidden[which].append(out[0] if isinstance(out, tuple) else out)
            )
    with torch.no_grad():
        expected = teacher(ids, use_cache=False).logits.log_softmax(-1)
    new = student(ids, use_cache=False).logits.log_softmax(-1)
    whole = (expected.exp() * (expected - new)).sum(-1).mean()
    cosine = torch.stack(
        [nn.functional.cosine_similarity(a, b, dim=-1).mean() for a, b in zip(*hidden.values(), strict=True)]
    )
    for model in (teacher, student):
        for name in names:
            model.get_submodule(name)._forward_hooks.clear()
    assert float(divergence.detach()) == pytest.approx(float(whole.detach()), rel=1e-4)
    assert float(features.detach()) == pytest.approx(float(1 - cosine.mean().detach()), rel=1e-3, abs=1e-6)
    used = [p for name, p in chosen.items() if name in found]
    gradients = torch.autograd.grad(whole + 0.3 * (1 - cosine.mean()), used)
    for (name, value), gradient in zip(found.items(), gradients, strict=True):
        assert torch.allclose(value, gradient, rtol=1e-3, atol=1e-6), name


def test_what_trains() -> None:
    student = rewritten("llama")
    sites = student.config.attnedit["sites"]
    attention, norms, everything = (set(trainable(student, sites, which)) for which in ("attention", "norms", "all"))
    assert attention < norms < everything
    assert all(".self_attn." in name for name in attention)
    assert all("norm" in name for name in norms - attention)
    assert "model.norm.weight" in norms
    assert everything == {name for name, _ in student.named_parameters()}


def test_only_what_trains_has_memory_of_its_own() -> None:
    teacher, student = source("llama"), share_copy(rewritten("llama"))
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    chosen = trainable(student, student.config.attnedit["sites"], "attention")
    own_memory(chosen)
    with torch.no_grad():
        for parameter in chosen.values():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    theirs = {p.data_ptr() for p in teacher.parameters()}
    shared = [name for name, p in student.named_parameters() if p.data_ptr() in theirs]
    assert set(shared) == {name for name, _ in student.named_parameters()} - set(chosen)


def test_a_loaded_result_takes_the_teachers_memory(tmp_path: Path) -> None:
    teacher = source("llama")
    with mock.patch.object(MODULE, "capture", _remembered):
        attnedit.compile(teacher, calibration=tokens(4, 32)).save(tmp_path / "saved")
    student = attnedit.load(tmp_path / "saved").model
    expected = logits(student, tokens(2, 9))
    assert share(student, teacher) > 0
    assert share(student, teacher) == 0
    assert torch.equal(logits(student, tokens(2, 9)), expected)
    theirs = {p.data_ptr() for p in teacher.parameters()}
    assert all(p.data_ptr() in theirs for name, p in student.named_parameters() if ".self_attn." not in name)


@pytest.mark.parametrize("limit", [None, 1])
def test_layers_fitted_in_turn_learn_the_same(limit: int | None, tmp_path: Path) -> None:
    """With hidden states on disk between the groups, as without groups."""
    results = []
    for memory in (None, limit):
        student = share_copy(rewritten("qwen3"))
        options = CalibrationOptions(
            fit_steps=6, batch_size=4, seq_len=16, memory_limit=memory, accumulation=2, fit_learning_rate=2e-3
        )
        batches = mix([tokens(24, 16, seed=4)], [1.0], steps=6, batch_size=4, seed=0)
        done = calibrate(
            student, source("qwen3"), sites_of("qwen3"), batches, options, directory=tmp_path / f"{memory}"
        )
        assert len(done.stages) == (1 if memory is None else 2)
        assert all(state.best_step == 6 for state in done.stages)
        results.append(dict(student.named_parameters()))
    one, other = results
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)
    assert not list((tmp_path / f"{limit}").rglob("*.hidden"))


def test_groups_fit_the_limit() -> None:
    sites = [mock.Mock() for _ in range(5)]
    for index, site in enumerate(sites):
        site.name = str(index)
    sizes = {str(index): size for index, size in enumerate([3, 3, 3, 9, 1])}
    made = groups(sites, sizes, 7 * BYTES_PER_PARAMETER)
    assert [[site.name for site in group] for group in made] == [["0", "1"], ["2"], ["3"], ["4"]]
    assert groups(sites, sizes, None) == [sites]


@pytest.mark.parametrize("stage", ["fit", "distill"])
def test_accumulated_parts_give_the_gradient_of_the_whole_batch(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both losses are means over windows, so parts add up exactly."""
    results: list[dict[str, Tensor]] = []

    def keep_gradients(made: Stage, *_: Any, **__: Any) -> StageState:
        made.learn(0)
        results.append({name: p.grad.clone() for name, p in made.parameters.items() if p.grad is not None})
        return StageState(stage)

    monkeypatch.setattr("attnedit.passes.calibration.run.run_stage", keep_gradients)
    for accumulation in (1, 3):
        student = share_copy(rewritten("llama"))
        steps: dict[str, Any] = {f"{stage}_steps": 2}
        options = CalibrationOptions(**steps, batch_size=5, seq_len=16, accumulation=accumulation)
        batches = mix([tokens(24, 16, seed=4)], [1.0], steps=2, batch_size=5, seed=0)
        calibrate(student, source("llama"), sites_of("llama"), batches, options)
    one, other = results
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-6) for name in one)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activations_computed_again_change_nothing(family: str) -> None:
    results = []
    for again in (False, True):
        student = share_copy(rewritten(family))
        options = CalibrationOptions(distill_steps=2, batch_size=4, seq_len=16, activation_checkpointing=again)
        batches = mix([tokens(24, 16, seed=4)], [1.0], steps=2, batch_size=4, seed=0)
        calibrate(student, source(family), sites_of(family), batches, options)
        results.append(dict(student.named_parameters()))
    one, other = results
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_learn_in_float32_and_stay_half(dtype: torch.dtype) -> None:
    teacher = share_copy(source("llama")).to(dtype)
    sites = capture(teacher)
    result = attnedit.compile(teacher, kv_budget=0.5, calibration=tokens(8, 32))
    options = CalibrationOptions(fit_steps=4, distill_steps=4, batch_size=4, seq_len=16)
    batches = mix([tokens(24, 16, seed=4)], [1.0], steps=8, batch_size=4, seed=0)
    done = calibrate(result.model, teacher, sites, batches, options)
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert all(math.isfinite(state.best) for state in done.stages)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fit_steps": -1}, "fit_steps must be at least 0"),
        ({"fit_steps": 1.5}, "fit_steps must be a whole number, got 1.5"),
        ({"batch_size": "4"}, "batch_size must be a whole number, got '4'"),
        ({"fit_learning_rate": "high"}, "fit_learning_rate must be a number, got 'high'"),
        ({"self_generated": "half"}, "self_generated must be a number, got 'half'"),
        ({"batch_size": 0}, "batch_size"),
        ({"accumulation": 17}, "at most batch_size"),
        ({"seq_len": 1}, "seq_len"),
        ({"distill_learning_rate": 0.0}, "above 0"),
        ({"self_generated": 1.5}, "from 0 to 1"),
        ({"distill_optimizer": "sgd"}, "adamw, muon"),
        ({"train": "heads"}, "attention, norms, all"),
        ({"memory_limit": "much"}, "20GiB"),
        ({"fit_step": 3}, "no calibration option 'fit_step'"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(attnedit.UsageError, match=words):
        CalibrationOptions.of(**options)


def test_sizes() -> None:
    assert [parse_bytes(text) for text in ("7", "2k", "3 MiB", "20GiB", "1TB")] == [7, 2048, 3 << 20, 20 << 30, 1 << 40]

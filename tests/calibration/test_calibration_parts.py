"""Parts of calibration against direct computation: batches, losses, memory, what options change."""

from __future__ import annotations

import functools
import itertools
import math
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import MODULE, _remembered, compile_tiny, logits, source, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.passes.calibration.batches import hold_out, mix
from attnedit.passes.calibration.distillation import Distillation
from attnedit.passes.calibration.fitting import BYTES_PER_PARAMETER, LayerFit, groups
from attnedit.passes.calibration.options import CalibrationOptions, parse_bytes
from attnedit.passes.calibration.parameters import own_memory, share, trainable
from attnedit.passes.calibration.run import calibrate
from attnedit.passes.calibration.state import StageState
from attnedit.passes.calibration.training import Stage
from attnedit.passes.repeats import MOST_REPEATS, with_repeats
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


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 70), min_size=1, max_size=3),
    steps=st.integers(1, 12),
    batch=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_batches_leave_held_out_windows_alone(sizes: list[int], steps: int, batch: int, seed: int) -> None:
    first = itertools.accumulate([0, *sizes[:-1]])
    sources = [
        torch.arange(start, start + size)[:, None].repeat(1, 4) for start, size in zip(first, sizes, strict=True)
    ]
    made = mix(sources, [1.0] * len(sizes), steps=steps, batch_size=batch, seed=seed)
    again = mix(sources, [1.0] * len(sizes), steps=steps, batch_size=batch, seed=seed)
    assert torch.equal(made.order, again.order)
    assert made.order.shape == (steps, batch)
    held, seen = set(made.held_out[:, 0].tolist()), set(made.windows[made.order.flatten(), 0].tolist())
    assert held
    lonely = {int(part[0, 0]) for part in sources if len(part) == 1}
    assert held & seen <= lonely
    if len(sizes) == 1 and sizes[0] > 1:  # every window comes up once before any comes up again
        rows = made.order.flatten().tolist()
        count = len(made.windows)
        assert all(len(set(rows[i : i + count])) == len(rows[i : i + count]) for i in range(0, len(rows), count))


def test_early_steps_see_pieces_of_the_windows_that_late_ones_see_whole() -> None:
    options = CalibrationOptions(fit_steps=4, distill_steps=10, seq_len=8, short_seq_len=3, short_share=0.5)
    assert options.lengths(8) == [3] * 2 + [8] * 2 + [3] * 5 + [8] * 5
    assert options.lengths(2) == [2] * 14  # the model's context may be shorter than both
    assert CalibrationOptions(fit_steps=1, distill_steps=2).lengths(8) == [8] * 3
    windows = torch.arange(20 * 8).view(20, 8)
    made = mix([windows], [1.0], steps=14, batch_size=3, lengths=options.lengths(8), seed=0)
    whole = mix([windows], [1.0], steps=14, batch_size=3, seed=0)
    assert torch.equal(made.order, whole.order)
    starts = set()
    for step in range(14):
        ids = made[step]
        assert ids.shape == (3, options.lengths(8)[step])
        assert made.tokens(step) == ids.numel()
        assert bool((ids.diff(dim=1) == 1).all())
        assert torch.equal(ids[:, 0] // 8, ids[:, -1] // 8)  # of one window
        starts |= {int(first) % 8 for first in ids[:, 0]} if ids.shape[1] == 3 else set()
        assert ids.shape[1] == 3 or torch.equal(ids, whole[step])
    assert starts == set(range(6))


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


def test_weights_say_how_often_a_source_is_seen() -> None:
    sources = [torch.zeros(40, 4, dtype=torch.int64), torch.ones(900, 4, dtype=torch.int64)]
    made = mix(sources, [0.7, 0.3], steps=300, batch_size=10, seed=0)
    share = made.windows[made.order.flatten(), 0].float().mean()
    assert float(share) == pytest.approx(0.3, abs=0.03)


@settings(deadline=None)
@given(length=st.integers(1, 200), rows=st.integers(1, 4), seed=st.integers(0, 5))
def test_repeats_are_passages_from_further_up(length: int, rows: int, seed: int) -> None:
    windows = torch.arange(length).repeat(rows, 1)
    found = with_repeats(windows, torch.Generator().manual_seed(seed))
    assert torch.equal(windows, torch.arange(length).repeat(rows, 1))
    assert found.shape == windows.shape
    assert bool((found <= windows).all())
    changed = (found < windows).sum(-1)
    assert int(changed.max()) <= MOST_REPEATS * max(1, length // 6)
    if length > 1:
        assert int(changed.min()) > 0
        seams = (found.diff(dim=-1) != 1).sum(-1)  # where a passage begins or ends, one of them perhaps within another
        assert int(seams.max()) <= 4 * MOST_REPEATS


def test_fewer_and_fewer_places_have_windows_with_repeats() -> None:
    sources = [torch.arange(64).repeat(50, 1)]
    plain, made = (mix(sources, [1.0], steps=200, batch_size=8, repeats=r, seed=1) for r in (0.0, 0.6))
    again = mix(sources, [1.0], steps=200, batch_size=8, repeats=0.6, seed=1)
    assert torch.equal(made.windows, again.windows)
    assert torch.equal(made.order, again.order)
    count = len(plain.windows)
    assert len(made.windows) == 2 * count
    assert torch.equal(made.order % count, plain.order)
    assert torch.equal(made.held_out, plain.held_out)
    assert torch.equal(made.windows[:count], plain.windows)
    repeated = (made.windows[made.order] != torch.arange(64)).any(-1).float().mean(-1)
    shares = [float(quarter.mean()) for quarter in repeated.chunk(4)]
    assert shares == pytest.approx([0.525, 0.375, 0.225, 0.075], abs=0.05)


def test_repeats_are_within_what_a_step_sees() -> None:
    """A passage that comes again outside the shorter window would teach nothing; and each length begins anew."""
    sources, lengths = [torch.arange(64).repeat(50, 1)], [20] * 150 + [64] * 50
    made = mix(sources, [1.0], steps=200, batch_size=8, repeats=0.6, lengths=lengths, seed=1)
    plain = mix(sources, [1.0], steps=200, batch_size=8, lengths=lengths, seed=1)
    repeated = torch.zeros(200, 8, dtype=torch.bool)
    for step, length in enumerate(lengths):
        batch = made[step]
        assert batch.shape == (8, length)
        copied = batch.diff(dim=-1) != 1
        repeated[step] = copied.any(-1)
        for row in batch[repeated[step]]:
            assert len(row.unique()) < length, "a passage is there twice"
        assert torch.equal(batch[~repeated[step]], plain[step][~repeated[step]])
    shares = repeated.float().mean(-1)
    assert [float(part.mean()) for part in shares[:150].chunk(3)] == pytest.approx([0.5, 0.3, 0.1], abs=0.06)
    assert [float(part.mean()) for part in shares[150:].chunk(2)] == pytest.approx([0.45, 0.15], abs=0.08)


def test_noise_is_of_the_text_and_anew_in_each_step() -> None:
    windows = torch.arange(1000, 1000 + 64 * 40).view(40, 64)
    made = mix([windows], [1.0], steps=50, batch_size=8, seed=2)
    changed = torch.stack([made.noisy(step, 0.2) != made[step] for step in range(50)])
    assert not bool(changed[..., 0].any()), "the first token, which others lean on, stays"
    assert float(changed[..., 1:].float().mean()) == pytest.approx(0.2, abs=0.01)
    assert len(changed.unique(dim=0)) == 50
    assert bool(torch.isin(made.noisy(3, 0.5), made.windows).all())
    assert torch.equal(made.noisy(3, 0.2), made.noisy(3, 0.2))
    assert torch.equal(made.noisy(3, 0.0), made[3])
    other = mix([windows], [1.0], steps=50, batch_size=8, seed=3)
    assert not torch.equal(made.noisy(3, 0.2) != made[3], other.noisy(3, 0.2) != other[3])


@pytest.mark.parametrize(("windows", "held"), [(1, 1), (2, 1), (63, 1), (64, 8), (95, 8), (320, 10), (5000, 32)])
def test_windows_are_held_out_evenly(windows: int, held: int) -> None:
    numbers = torch.arange(windows)[:, None]
    out, rest = hold_out(numbers)
    assert len(out) == held
    assert sorted({*out.flatten().tolist(), *rest.flatten().tolist()}) == list(range(windows))
    if held > 1:
        assert int(out.diff(dim=0).max() - out.diff(dim=0).min()) <= 1


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

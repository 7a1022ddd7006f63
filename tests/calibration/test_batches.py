"""Which windows training steps see: mixtures, lengths, what is held out, repeats and noise."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnedit.passes.calibration.batches import hold_out, mix
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.repeats import MOST_REPEATS, with_repeats


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

"""Beginnings of windows: where they come from, and who sees them."""

from typing import Any

import pytest
import torch
from compiled import source, tokens
from families import build

import attnedit
from attnedit.passes.beginnings import LENGTH, MOST, beginnings, without_beginnings
from attnedit.passes.gateswa.target import WindowTarget
from attnedit.passes.layer_loss import measured_rows
from attnedit.passes.mla.target import LatentTarget


def test_they_are_pieces_of_the_windows() -> None:
    windows = [torch.arange(64 * 100).view(100, 64), torch.arange(10_000, 10_000 + 16 * 9).view(9, 16)]
    (made,) = beginnings(windows, seed=3)
    assert made.shape == (windows[0].numel() // 32 + 4, LENGTH)
    assert (made.diff() == 1).all()
    assert len(made[:, 0].unique()) > len(made) // 2
    assert torch.equal(made, beginnings(windows, seed=3)[0])
    assert not torch.equal(made, beginnings(windows, seed=4)[0])
    assert len(beginnings([torch.arange(10**6).view(1000, 1000)], 0)[0]) == MOST


@pytest.mark.parametrize(
    "windows",
    [
        torch.cat((torch.zeros(40, 1, dtype=torch.int64), torch.arange(40 * 31).view(40, 31)), 1),  # all begin alike
        torch.arange(40 * 3).view(40, 3),  # shorter than a beginning
        torch.arange(20).view(1, 20),  # too few tokens for one
    ],
)
def test_there_are_none_where_they_tell_nothing(windows: torch.Tensor) -> None:
    assert beginnings([windows], 0) == []


def test_nothing_is_measured_on_them() -> None:
    windows = [torch.arange(640).view(10, 64), torch.arange(320).view(20, 16)]
    begun = beginnings(windows, 0)
    assert without_beginnings([*windows, *begun]) == (windows, begun)
    assert without_beginnings(begun) == (begun, [])
    plain, given = measured_rows(windows, 0, 1), measured_rows([*windows, *begun], 0, 1)
    assert [part.shape for part in given[0]] == [*(part.shape for part in plain[0]), begun[0].shape]
    assert all(torch.equal(a, b) for a, b in zip(plain[1], given[1], strict=True))


def test_windows_are_fitted_on_them_and_latents_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {}
    for target in (WindowTarget, LatentTarget):
        fit = target.fit

        def spy(self: Any, samples: Any, shape: Any, fit: Any = fit) -> Any:
            seen.setdefault(self.name, set()).update(sample.key.shape[2] for sample in samples)
            return fit(self, samples, shape)

        monkeypatch.setattr(target, "fit", spy)
    given = {"window": 8, "full_layers": [1], "kv_budget": 0.5, "calibration": tokens(16, 24), "alternations": 1}
    attnedit.compile(source("llama"), "gateswa+mla", **given)
    assert seen == {"gateswa": {24, LENGTH}, "mla": {24}}


def test_all_other_windows_may_be_long() -> None:
    """As they are for windows of attention of more than 256 tokens."""
    source = build("llama", max_position_embeddings=2048)
    given = {"window": 300, "full_layers": [1], "calibration": tokens(3, 1300)}
    assert attnedit.compile(source, "gateswa", **given).report.layers[0].output_error is not None

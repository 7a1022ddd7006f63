"""The kernel of a windowed step: on a GPU where there is one, else in triton's interpreter."""

from dataclasses import replace

import pytest
import torch
from interpreted import needs_triton, results_of

from attnedit.targets.attention import GateSWAConfig
from attnedit.targets.attention.gateswa.decode import ring_for_step, steps_fused
from attnedit.targets.attention.gateswa.ring import RingLayer


@needs_triton
def test_kernel_equals_the_module_in_float64() -> None:
    errors = results_of("ring_decode_cases.py")["errors"]
    assert len(errors) >= 7 * 8
    assert {name: error for name, error in errors.items() if not error < (1e-2 if "bfloat16" in name else 1e-3)} == {}


@needs_triton
def test_every_step_went_through_it() -> None:
    results = results_of("ring_decode_cases.py")
    assert results["used"] == results["steps"] > 200


@needs_triton
def test_what_learns_gets_its_gradient() -> None:
    assert results_of("ring_decode_cases.py")["learns"]


def test_other_steps_keep_the_plain_path(monkeypatch: pytest.MonkeyPatch) -> None:
    config = GateSWAConfig(0, 4, 2, 16, 16, 8, sliding_window=7, scale=0.2)
    query = torch.zeros((1, 4, 1, 16)).half()
    ring = RingLayer(9, 7)
    assert not steps_fused(query, ring, config, ())  # no GPU
    monkeypatch.setattr("attnedit.targets.attention.gateswa.decode.runs_on", lambda _: True)
    assert steps_fused(query, ring, config, ())
    assert not steps_fused(query.float(), ring, config, ())
    assert not steps_fused(query, ring, replace(config, softcap=5.0), ())
    ring.tensors(torch.zeros((1, 2, 1, 16)), torch.zeros((1, 2, 1, 16)))
    assert not steps_fused(query, ring, config, ())  # a ring of another dtype
    assert ring_for_step(query, torch.ones((1, 9)), None, config) is None  # padding
    assert ring_for_step(query, None, None, config) is None


@pytest.mark.parametrize("strict", [True, False])
def test_exporting_is_no_compiling(strict: bool) -> None:
    """What is left out of exported programs stays in compiled ones."""
    from attnedit.compiler.compatibility.torch_names import exporting

    class Says(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if exporting() else x + 2

    zero = torch.zeros(1)
    assert float(Says()(zero)) == float(torch.compile(Says(), backend="eager", fullgraph=True)(zero)) == 2
    assert float(torch.export.export(Says(), (zero,), strict=strict).module()(zero)) == 1

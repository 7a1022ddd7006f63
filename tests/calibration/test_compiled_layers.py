"""Layers that train through `torch.compile`: the same numbers, and one compilation for all that compute the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import tokens
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.passes.calibration.batches import mix
from attnedit.passes.calibration.compiled import worthwhile
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.run import calibrate
from attnedit.targets.attention import MLA
from attnedit.targets.runtime.eager import share_copy

# torch's own, from where it looks at what enters a graph.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

LAYERS = 6
TARGETS: dict[str, dict[str, Any]] = {"mla": {"kv_budget": 0.5}, "gateswa": {"window": 8, "full_layers": "every:2"}}


@pytest.fixture(autouse=True)
def _exact_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 on every processor, and graphs that are traced but not made into machine code."""
    monkeypatch.setattr("attnedit.passes.calibration.training.fast_bfloat16", lambda: False)
    inductor = torch.compile
    monkeypatch.setattr("torch.compile", lambda forward, **options: inductor(forward, backend="aot_eager", **options))


@pytest.mark.long
@pytest.mark.parametrize("target", TARGETS)
def test_compiled_layers_learn_the_same(target: str) -> None:
    torch.manual_seed(0)
    sizes = {
        "max_position_embeddings": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    teacher = LlamaForCausalLM(LlamaConfig(vocab_size=260, num_hidden_layers=LAYERS, **sizes)).eval()
    result = attnedit.compile(teacher, target=target, calibration=tokens(8, 32), **TARGETS[target])
    sites = [site for site in capture(teacher) if site.name in result.model.config.attnedit["sites"]]
    learned, graphs = [], []
    for wanted in (False, True):
        torch._dynamo.reset()
        counters.clear()
        student = share_copy(result.model)
        steps = {"fit_steps": 2, "distill_steps": 2}
        options = CalibrationOptions(**steps, batch_size=4, seq_len=16, train="all", torch_compile=wanted)
        calibrate(student, teacher, sites, mix([tokens(24, 16)], [1.0], steps=4, batch_size=4, seed=0), options)
        learned.append(dict(student.named_parameters()))
        graphs.append(counters["stats"]["unique_graphs"])
        assert all(module.columns is None for module in student.modules() if isinstance(module, MLA))
        assert not any("forward" in vars(layer) for layer in student.model.layers)
    one, other = learned
    assert all(torch.allclose(one[name], other[name], rtol=1e-4, atol=1e-6) for name in one)
    # Source and student, with gradients and without, for fitting in pieces; for each layer that would be five times it.
    assert graphs[0] == 0 < graphs[1] <= 20


def test_compiling_is_for_long_runs_on_a_gpu() -> None:
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert worthwhile(None, gpu, 1000)
    assert not worthwhile(None, gpu, 10)
    assert not worthwhile(None, cpu, 1000)
    assert worthwhile(True, cpu, 1)
    assert not worthwhile(False, gpu, 1000)

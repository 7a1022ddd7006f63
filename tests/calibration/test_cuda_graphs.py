"""Training steps as CUDA graphs: the bookkeeping everywhere, the graphs themselves where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import MODULE, source, tokens
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.passes.calibration import cuda_graphs
from attnedit.passes.calibration.batches import mix
from attnedit.passes.calibration.cuda_graphs import WARM_UP, Replayed, check_graphs
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.run import calibrate
from attnedit.targets.runtime.eager import share_copy


class Recording:
    """Stands for `torch.cuda.CUDAGraph`: runs what was captured again, into the same memory."""

    def __init__(self) -> None:
        self.replay: Callable[[], None] = lambda: None


@pytest.fixture
def weight(monkeypatch: pytest.MonkeyPatch) -> nn.Parameter:
    """A parameter whose losses are captured by a stand-in for CUDA."""
    weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    @contextmanager
    def capturing(graph: Recording, stream: Any) -> Iterator[None]:
        yield
        captured, ids = weight.grad, LAST["ids"]

        def replay() -> None:
            weight.grad = None
            losses_of(weight, ids)
            captured.copy_(weight.grad)

        graph.replay = replay

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, value in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: nullcontext(),
        "CUDAGraph": Recording,
        "graph": capturing,
    }.items():
        monkeypatch.setattr(cuda_graphs.torch.cuda, name, value)
    return weight


LAST: dict[str, Tensor] = {}


def losses_of(weight: nn.Parameter, ids: Tensor) -> Mapping[str, Tensor]:
    LAST["ids"] = ids
    loss = (weight * ids.float().sum()).square().sum()
    loss.backward()
    return {"loss": loss.detach()}


def test_replays_leave_the_gradients_of_what_they_are_given(weight: nn.Parameter) -> None:
    function = Replayed(lambda ids: losses_of(weight, ids), [weight])
    calls = 0
    for length in (3, 5):
        for step in range(WARM_UP + 3):
            weight.grad = None
            function(torch.full((1, length), step + 1))
            calls += 1
            expected = 2 * weight.detach() * (length * (step + 1)) ** 2
            assert weight.grad is not None
            torch.testing.assert_close(weight.grad, expected)
    assert function._graph is not None


def test_what_no_graph_holds_is_refused(weight: nn.Parameter, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def refusing(graph: Recording, stream: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("the capture failed")

    def looks(ids: Tensor) -> Mapping[str, Tensor]:
        if calls:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        return losses_of(weight, ids)

    calls: list[None] = []
    monkeypatch.setattr(cuda_graphs.torch.cuda, "graph", refusing)
    function = Replayed(looks, [weight])
    for _ in range(WARM_UP):
        weight.grad = None
        function(torch.ones(1, 3))
    calls.append(None)
    with pytest.raises(AttneditError, match=r"steps: operation not permitted .* is capturing; leave out cuda_graphs$"):
        function(torch.ones(1, 3))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({}, "are for CUDA GPUs, and the model is on cpu"),
        ({"device": "cuda", "accumulation": 2}, "leave out accumulation"),
        ({"device": "cuda", "in_turn": True}, "leave out memory_limit"),
    ],
)
def test_where_there_can_be_none_says_why(options: dict[str, Any], reason: str) -> None:
    given = {"device": "cpu", "accumulation": 1, "in_turn": False, **options}
    with pytest.raises(UsageError, match=reason):
        check_graphs(torch.device(given.pop("device")), **given)


def test_without_a_gpu_they_are_refused_before_anything_is_computed() -> None:
    options = {"calibration": tokens(4, 16), "distill_steps": 2, "seq_len": 16, "cuda_graphs": True}
    with (
        mock.patch.object(MODULE, "capture", side_effect=AssertionError("traced")),
        pytest.raises(UsageError, match="cuda_graphs are for CUDA GPUs, and the model is on cpu"),
    ):
        attnedit.compile(source("llama"), **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_learn_what_single_kernels_learn() -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = LlamaConfig(vocab_size=260, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    teacher = LlamaForCausalLM(config).eval().cuda()
    result = attnedit.compile(teacher, kv_budget=0.5, calibration=tokens(8, 32))
    sites = [site for site in capture(teacher) if site.name in result.model.config.attnedit["sites"]]
    learned = []
    for graphs in (False, True):
        student = share_copy(result.model)
        options = CalibrationOptions(
            fit_steps=10,
            distill_steps=10,
            batch_size=4,
            seq_len=32,
            short_seq_len=16,
            train="all",
            torch_compile=True,
            feature_weight=1,
            cuda_graphs=graphs,
        )
        batches = mix([tokens(24, 32)], [1.0], steps=20, batch_size=4, lengths=options.lengths(32), seed=0)
        done = calibrate(student, teacher, sites, batches, options)
        learned.append((dict(student.named_parameters()), [state.best for state in done.stages]))
    (plain, losses), (captured, others) = learned
    assert losses == pytest.approx(others, rel=0.02)
    for name, value in plain.items():
        torch.testing.assert_close(value, captured[name], rtol=0.05, atol=2e-3)

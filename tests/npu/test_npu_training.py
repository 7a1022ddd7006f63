"""Training on Ascend: the code path of attention and calibration, on the reference of ``npu_fusion_attention``."""

from __future__ import annotations

import importlib
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Captured, refusal
from compiled import compile_tiny, source, tokens
from gateswa_models import batch, rewrite
from torch import Tensor, nn
from transformers import PreTrainedModel

import attnedit
from attnedit.compiler.graph.anchor import attention_implementation
from attnedit.compiler.model_io.devices import resolve_device
from attnedit.targets.attention import MLA
from attnedit.targets.attention.kernels import kernel_for
from attnedit.targets.runtime.npu import training
from attnedit.targets.runtime.npu.training import training_attention

CALIBRATE: Any = importlib.import_module("attnedit._calibrate")


def model(kind: str) -> PreTrainedModel:
    family, _, form = kind.partition(" ")
    if form == "mla":
        found = compile_tiny(source(family), 0.5).model
        for module in found.modules():
            if isinstance(module, MLA) and module.sinks is not None:
                nn.init.normal_(module.sinks.detach())
        return found
    return rewrite(family) if form == "gateswa" else source(family)


def loss_and_gradients(given: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    real = inputs["attention_mask"].bool()
    logits = given(**inputs, use_cache=False).logits[real]
    parameters = {name: p for name, p in given.named_parameters() if p.requires_grad}
    gradients = torch.autograd.grad(logits.square().mean(), list(parameters.values()), allow_unused=True)
    found = {name: g for name, g in zip(parameters, gradients, strict=True) if g is not None}
    return logits.detach(), found


LONG = [
    pytest.param(kind, marks=pytest.mark.long) for kind in ("gpt_oss", "mistral mla", "gpt_oss mla", "llama gateswa")
]


@pytest.mark.parametrize("kind", ["llama", "gemma2", "llama mla", "gpt_oss gateswa", *LONG])
def test_logits_and_gradients_are_those_of_plain_attention(kind: str) -> None:
    given, inputs = model(kind), batch()
    with attention_implementation(given, "eager"):
        logits, gradients = loss_and_gradients(given, inputs)
    calls = mock.Mock(side_effect=training.fusion_attention)
    with mock.patch.object(training, "fusion_attention", calls), training_attention("cpu", given):
        found, others = loss_and_gradients(given, inputs)
    assert (calls.call_count >= 2) == (kind != "gemma2")  # which caps its logits
    torch.testing.assert_close(found, logits, atol=1e-4, rtol=1e-4)
    assert set(others) == set(gradients)
    for name, gradient in gradients.items():
        scale = float(gradient.abs().max()) or 1.0
        assert float((others[name] - gradient).abs().max()) < 2e-3 * scale, name


def test_kernels_are_gone_afterwards() -> None:
    given = source("llama")
    before = given.config._attn_implementation
    with training_attention("cpu", given):
        assert kernel_for(torch.zeros(1)) is not None
    assert kernel_for(torch.zeros(1)) is None
    assert given.config._attn_implementation == before != training.TRAINING


@pytest.mark.parametrize("target", ["mla", pytest.param("gateswa", marks=pytest.mark.long)])
def test_calibration_learns_the_same(target: str) -> None:
    losses = []
    for kind in ("nowhere", "cpu"):
        options: dict[str, Any] = {"window": 4, "full_layers": 0} if target == "gateswa" else {"kv_budget": 0.3}
        result = attnedit.compile(source("llama"), target, calibration=tokens(4, 32), **options)
        calls = mock.Mock(side_effect=training.fusion_attention)
        with mock.patch.object(CALIBRATE, "ASCEND", kind), mock.patch.object(training, "fusion_attention", calls):
            done = attnedit.calibrate(
                result,
                source("llama"),
                calibration=tokens(16, 32, seed=2),
                fit_steps=3,
                distill_steps=3,
                batch_size=4,
                seq_len=32,
                activation_checkpointing=True,
            )
        assert (calls.call_count > 0) == (kind == "cpu")
        losses.append([(stage.before, stage.best) for stage in done.report.stages])
    assert len(losses[0]) == 2
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=2e-2, atol=1e-4)


def test_a_device_that_is_not_there() -> None:
    with pytest.raises(attnedit.UsageError, match="needs an Ascend NPU with CANN and torch_npu"):
        resolve_device("npu:0")


def test_the_command_line_says_so(saved_llama: object, tmp_path: object, capsys: Captured) -> None:
    words = refusal(capsys, "compile", saved_llama, "--device", "npu", "-o", f"{tmp_path}/out")
    assert "docs/ascend.md" in words

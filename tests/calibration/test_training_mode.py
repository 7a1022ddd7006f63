"""What rewritten attention does in training and what it can be asked for, as its source does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, tokens
from families import build
from same_rewrite import Same
from transformers import PreTrainedModel

import attnedit

RATES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.4},
    "qwen3": {"attention_dropout": 0.4},
    "gemma2": {"attention_dropout": 0.4},
    "gpt_oss": {"attention_dropout": 0.4},
    "gpt2": {"attn_pdrop": 0.4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"attention_dropout": 0.4, "dropout": 0.0},
    "phi": {"attention_dropout": 0.4},
}


@torch.no_grad()
def still(model: PreTrainedModel) -> torch.Tensor:
    result: torch.Tensor = model.eval()(tokens(2, 12), use_cache=False).logits
    return result


@torch.no_grad()
def in_training(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)
    result: torch.Tensor = model.train()(tokens(2, 12), use_cache=False).logits
    model.eval()
    return result


@pytest.mark.parametrize("family", RATES)
def test_attention_dropout_is_the_sources(family: str) -> None:
    """Where nothing is lost, the same weights are dropped."""
    source = build(family, **RATES[family])
    source.set_attn_implementation("eager")
    expected = in_training(source)
    assert float((expected - still(source)).abs().max()) > 0.1
    for result in (compile_tiny(source, 1.0), attnedit.rewrite(source, Same())):
        torch.testing.assert_close(in_training(result.model), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(still(result.model), still(source), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_windowed_attention_drops_too(family: str) -> None:
    options: dict[str, Any] = {"window": 4, "full_layers": 0, "calibration": tokens(4, 32)}
    model = attnedit.compile(build(family, **RATES[family]), "gateswa", **options).model
    drawn = in_training(model)
    assert float((drawn - still(model)).abs().max()) > 0.1
    assert torch.equal(in_training(model), drawn)
    plain = attnedit.compile(build(family, **dict.fromkeys(RATES[family], 0.0)), "gateswa", **options).model
    torch.testing.assert_close(in_training(plain), still(plain))


def test_dropout_survives_saving_and_copies(tmp_path: Path) -> None:
    source = build("llama", attention_dropout=0.4)
    result = compile_tiny(source, 0.5)
    expected = in_training(result.model)
    result.save(tmp_path / "out")
    for model in (copy.deepcopy(result.model), attnedit.load(tmp_path / "out").model):
        torch.testing.assert_close(in_training(model), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe", "gpt_oss", "gemma3_text", "gemma2"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_weights_are_the_sources(family: str, implementation: str) -> None:
    """Where nothing is lost; whatever the model is set to, it is set to afterwards."""
    source = build(family)
    source.set_attn_implementation("eager")
    result = compile_tiny(source, 1.0).model
    if family in ("gemma2", "gpt_oss"):  # may not be set to SDPA
        implementation = "eager"
    result.set_attn_implementation(implementation)
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    asked: dict[str, Any] = {"attention_mask": mask, "output_attentions": True}
    for found, expected in zip(result(ids, **asked).attentions, source(ids, **asked).attentions, strict=True):
        torch.testing.assert_close(found[1], expected[1])
        torch.testing.assert_close(found[0, :, 3:], expected[0, :, 3:])  # what padding attends to is no one's
    assert result.config._attn_implementation == implementation
    steps = result.generate(ids, max_new_tokens=2, return_dict_in_generate=True, **asked).attentions
    assert [[weights.shape[2] for weights in step] for step in steps] == [[9, 9], [1, 1]]
    result.set_attn_implementation("eager")
    result.config.output_attentions = True
    assert len(result(ids).attentions) == 2


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_windowed_attention_gives_a_weight_for_each_token(cache: str) -> None:
    options: dict[str, Any] = {"window": 4, "full_layers": 0, "calibration": tokens(4, 32)}
    model = attnedit.compile(build("llama"), "gateswa", sinks="keep:2", gate="none", **options).model
    ids = tokens(2, 12)
    position = torch.arange(12)
    seen = (position <= position[:, None]) & ((position > position[:, None] - 4) | (position < 2))
    for weights in model(ids, output_attentions=True).attentions:
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))
        assert torch.equal(weights > 0, seen.expand_as(weights))
    made = model.generate(
        ids[:, :9],
        max_new_tokens=4,
        do_sample=False,
        output_attentions=True,
        return_dict_in_generate=True,
        cache_implementation=cache,
    )
    whole = model(made.sequences, output_attentions=True).attentions
    for step, layers in enumerate(made.attentions[1:]):
        for found, expected in zip(layers, whole, strict=True):
            length = 10 + step
            torch.testing.assert_close(found[:, :, 0, :length], expected[:, :, length - 1, :length])


def test_attention_weights_have_gradients() -> None:
    model = compile_tiny(build("llama"), 0.5).model
    out = model(tokens(1, 5), output_attentions=True)
    out.attentions[0].retain_grad()
    out.logits.sum().backward()
    assert float(out.attentions[0].grad.abs().sum()) > 0


def test_attention_weights_that_nothing_keeps_are_refused_before_the_forward() -> None:
    ids = tokens(1, 5)
    for model, what in (
        (compile_tiny(build("bloom"), 0.5).model, "BloomForCausalLM"),
        (attnedit.rewrite(build("llama"), Same()).model, "Attend"),
    ):
        for call in (
            lambda model: model(ids, output_attentions=True),
            lambda model: model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True),
        ):
            with pytest.raises(attnedit.UsageError, match=f"output_attentions: {what} keeps no attention weights"):
                call(model)
        assert len(model(ids, output_hidden_states=True).hidden_states) == 3

"""What rewritten attention does in training and what it can be asked for, as its source does."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, tokens
from families import build
from transformers import PreTrainedModel

import attnedit
from attnedit import Rewrite, attention

RATES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.4},
    "qwen3": {"attention_dropout": 0.4},
    "gemma2": {"attention_dropout": 0.4},
    "gpt_oss": {"attention_dropout": 0.4},
    "gpt2": {"attn_pdrop": 0.4, "resid_pdrop": 0.0, "embd_pdrop": 0.0},
    "opt": {"attention_dropout": 0.4, "dropout": 0.0},
    "phi": {"attention_dropout": 0.4},
}


class Same(Rewrite):
    """Attention as it was, through the cache of the rewritten layer."""

    contract = attnedit.exact

    def pattern(self, query_BHTd, key_BGTd, value_BGTv):  # type: ignore[no-untyped-def]
        return attention(query_BHTd, key_BGTd, value_BGTv)

    def replacement(self, match, query_BHTd, key_BGTd, value_BGTv):  # type: ignore[no-untyped-def]
        return attention(query_BHTd, key_BGTd, value_BGTv)


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


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_attention_weights_are_refused_before_the_forward(family: str, budget: float) -> None:
    model = compile_tiny(build(family), budget).model
    ids = tokens(1, 5)
    for call in (
        lambda: model(ids, output_attentions=True),
        lambda: model.generate(ids, max_new_tokens=1, output_attentions=True, return_dict_in_generate=True),
    ):
        with pytest.raises(attnedit.UsageError, match="output_attentions"):
            call()
    assert len(model(ids, output_hidden_states=True).hidden_states) == 3
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    with pytest.raises(attnedit.UsageError, match="set it to false"):
        model(ids)

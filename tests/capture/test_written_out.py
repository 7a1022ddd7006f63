"""Attention that modules write out: what is taken for attention, what is refused; and layers that share keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compiled import compile_tiny, deviation, in_pieces, logits, tokens
from families import build, shared
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3nTextConfig, PreTrainedModel
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoSelfAttention

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.errors import CaptureError

GLOBAL = {"attention_types": [[["global"], 2]]}
Weights = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def written(weights: Weights) -> Callable[..., tuple[Tensor, Tensor]]:
    """GPT-Neo's attention with other weights."""

    def attend(
        self: GPTNeoSelfAttention, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        given = weights(query, key, attention_mask)
        return given @ value, given

    return attend


@pytest.mark.parametrize(
    "weights",
    [
        lambda q, k, m: ((q / 3.0) @ k.mT + m).softmax(-1),
        lambda q, k, m: (0.5 * (m + q @ k.mT)).float().softmax(-1).to(q.dtype),
        lambda q, k, m: torch.where(m < -1, -1e9, q @ k.mT).softmax(-1),
        lambda q, k, m: torch.where(m > -1, q @ k.mT, -1e9).softmax(-1),
        lambda q, k, m: (q @ k.mT * 0.25).masked_fill(m < -1, -1e9).clamp(min=-1e10).softmax(-1),
        lambda q, k, m: (
            torch.baddbmm(m.expand(-1, 4, -1, -1).flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT)
            .unflatten(0, (-1, 4))
            .softmax(-1)
        ),
    ],
)
def test_scales_biases_and_masks_in_any_order(weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTNeoSelfAttention, "_attn", written(weights))
    model = build("gpt_neo", **GLOBAL)
    assert len(capture(model)) == 2  # held to the module itself
    result = attnedit.compile(model, "mla", kv_budget=1.0)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    expected = logits(model, ids, mask)
    assert deviation(logits(result.model, ids, mask), expected) < 1e-4
    assert deviation(in_pieces(result.model, ids, mask, [5, 4, 1, 1, 1])[0], expected) < 1e-4


@pytest.mark.parametrize(
    ("weights", "reason"),
    [
        (lambda q, k, m: ((q @ k.mT) ** 2 + m).softmax(-1), "what cannot be a scale, a bias or a mask"),
        (lambda q, k, m: (q @ k.mT * (q @ k.mT) + m).softmax(-1), "what cannot be a scale, a bias or a mask"),
        (lambda q, k, m: (q @ k.mT + m).softmax(-1) * 2, "changes the attention weights"),
        (lambda q, k, m: (q @ k.mT + m).softmax(-2), "is not over keys"),
        (lambda q, k, m: (q @ k.mT + m).softmax(-1).softmax(-1), "more than once"),
        (lambda q, k, m: (q @ k.mT + m + q.mean()).softmax(-1), "is computed inside the attention module"),
    ],
)
def test_what_is_no_such_attention_is_refused(weights: Weights, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GPTNeoSelfAttention, "_attn", written(weights))
    with pytest.raises(CaptureError, match=reason) as error:
        capture(build("gpt_neo", **GLOBAL))
    assert "transformer.h.0.attn" in str(error.value)


@pytest.mark.parametrize("family", ["bloom", "falcon_alibi", "mpt", "gpt_neo"])
def test_biases_and_windows_of_the_module_are_seen(family: str) -> None:
    assert any(site.bias for site in capture(shared(family)))
    assert not any(site.bias for site in capture(shared("gptj")))


@pytest.mark.parametrize("family", ["gptj", "falcon", "falcon_alibi", "gpt_neo"])
def test_tables_and_implementation_come_back(family: str, tmp_path: Path) -> None:
    result = compile_tiny(build(family), 0.5, alternations=0)
    result.save(tmp_path / "out")
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    loaded = attnedit.load(tmp_path / "out").model
    assert torch.equal(logits(loaded, ids, mask), logits(result.model, ids, mask))
    assert loaded.config._attn_implementation == result.model.config._attn_implementation


def sharing(shared_layers: int) -> PreTrainedModel:
    """Gemma 3n: the last layers attend to the keys of earlier ones."""
    config = Gemma3nTextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"] * 3,
        sliding_window=4,
        num_kv_shared_layers=shared_layers,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    return model


def test_layers_that_share_keys_stay() -> None:
    model = sharing(2)
    assert [site.layer_idx for site in capture(model)] == [0, 1]
    result = attnedit.compile(model, "mla", kv_budget=1.0)
    ids, mask = tokens(2, 12), torch.ones(2, 12, dtype=torch.long)
    expected = logits(model, ids, mask)
    assert deviation(in_pieces(result.model, ids, mask, [6, 4, 1, 1])[0], expected) < 1e-4
    assert "2 layers that keep a cache stay as they are: others read their keys too" in str(result.report)


def test_where_all_layers_share_keys_none_can_be_replaced() -> None:
    with pytest.raises(CaptureError, match="share keys and values with others, so that none can be replaced alone"):
        capture(sharing(4))

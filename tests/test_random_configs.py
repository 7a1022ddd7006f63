"""Random small decoders: compiling one gives a model that keeps its promises, or refuses with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compiled import deviation, in_pieces, logits, tokens
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import attnedit

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "phi", "phi3", "olmo2", "cohere", "stablelm", "gpt_neox")
ROPES: tuple[dict[str, Any], ...] = (
    {"rope_type": "default", "rope_theta": 10000.0},
    {"rope_type": "default", "rope_theta": 500.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
)
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[PreTrainedConfig, torch.dtype]:
    family = draw(st.sampled_from(FAMILIES))
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 8, 12, 16]))
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": heads * head_dim,
        "intermediate_size": draw(st.sampled_from([16, 24])),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "max_position_embeddings": 128,
        "head_dim": draw(st.sampled_from([head_dim, 8])) if family in ("llama", "mistral", "qwen3", "gemma2") else None,
        "sliding_window": draw(st.sampled_from([None, 5, 64])) if family in ("mistral", "phi3") else None,
        "attention_bias": draw(st.booleans()),
        "qk_layernorm": draw(st.booleans()),
        "use_qk_norm": draw(st.booleans()),
        "partial_rotary_factor": 0.5 if family in ("phi", "stablelm", "gpt_neox") else None,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": draw(st.sampled_from(ROPES)),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return CONFIG_MAPPING[family](**{name: value for name, value in fields.items() if value is not None}), draw(
        st.sampled_from(list(TOLERANCE))
    )


def random_model(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    result: PreTrainedModel = model.eval()
    return result


@pytest.mark.long
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(made=configurations(), target=st.sampled_from(["exact", "mla", "gateswa", "gateswa+mla"]), data=st.data())
def test_a_random_decoder(made: tuple[PreTrainedConfig, torch.dtype], target: str, data: st.DataObject) -> None:
    config, dtype = made
    try:
        source = random_model(config, dtype)
    except (ValueError, RuntimeError, KeyError, TypeError):
        return  # transformers itself has no such model
    options: dict[str, Any] = {"kv_budget": 1.0}
    if target == "mla":
        options = {"kv_budget": data.draw(st.sampled_from([0.25, 0.5, 0.75])), "alternations": 0}
    elif target != "exact":
        options = {"window": data.draw(st.integers(1, 9)), "full_layers": data.draw(st.integers(0, 1))}
        options |= {"sinks": data.draw(st.sampled_from(["none", "logit", "value", "keep:2"])), "alternations": 0}
    before = {name: parameter.clone() for name, parameter in source.named_parameters()}
    refused = ""
    try:
        result = attnedit.compile(source, "mla" if target == "exact" else target, calibration=tokens(4, 128), **options)
    except attnedit.UsageError as error:
        refused = str(error)
    if refused:
        assert len(refused.splitlines()) == 1
        return
    assert all(torch.equal(before[name], parameter) for name, parameter in source.named_parameters())
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    if target == "exact":
        assert deviation(logits(result.model, ids, mask), logits(source, ids, mask), mask) < TOLERANCE[dtype]
    else:
        assert result.report.kv_bytes_after <= result.report.kv_bytes_before
    whole, _ = in_pieces(result.model, ids, mask, [21])
    stepped, _ = in_pieces(result.model, ids, mask, [9, 8, 1, 1, 1, 1])
    assert deviation(stepped, whole, mask) < TOLERANCE[dtype]

"""Random small decoders: compiling one gives a model that keeps its promises, or refuses with a reason.

``ATTNEDIT_EXAMPLES=500 pytest -m long tests/api/test_random_configs.py`` tries more of them, others at each run.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
from compiled import deviation, in_pieces, logits, tokens
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import attnedit
from attnedit.compiler.model_io.models import READING_ERRORS

EXAMPLES = int(os.environ.get("ATTNEDIT_EXAMPLES", "0"))
GROUPED = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma2", "phi", "phi3", "olmo2", "cohere", "stablelm")
UNGROUPED = ("gpt_neox", "gpt2", "opt", "bloom", "gptj", "falcon")
OWN_HEAD_DIM = ("llama", "mistral", "qwen3", "qwen3_moe", "gemma2")
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
LEARNED = ("gpt2", "opt", "bloom", "gptj")
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: 0.1}


@st.composite
def configurations(draw: st.DrawFn) -> tuple[PreTrainedConfig, torch.dtype]:
    """A configuration of one to three layers in a dtype; fields that a family lacks it ignores."""
    family = draw(st.sampled_from(GROUPED + UNGROUPED))
    groups = draw(st.integers(1, 3))
    heads = groups * draw(st.integers(1, 3))
    head_dim = draw(st.sampled_from([4, 8, 12, 16]))
    hidden, layers = heads * head_dim, draw(st.integers(1, 3))
    ropes = [rope for rope in ROPES if family not in LEARNED]
    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": 128,
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family in GROUPED:
        fields |= {"num_key_value_heads": groups, "intermediate_size": draw(st.sampled_from([16, 24]))}
    if family in OWN_HEAD_DIM:
        fields["head_dim"] = draw(st.sampled_from([head_dim, 8]))
    if family in ("mistral", "phi3"):
        fields["sliding_window"] = draw(st.sampled_from([None, 5, 64]))
    if family in ("phi", "stablelm", "gpt_neox"):
        fields["partial_rotary_factor"] = draw(st.sampled_from([0.5, 1.0]))
    if family in ("phi", "stablelm", "cohere"):
        fields |= dict.fromkeys(("qk_layernorm", "use_qk_norm"), draw(st.booleans()))
    if family == "qwen3_moe":
        fields |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    if family == "gptj":
        fields["rotary_dim"] = draw(st.sampled_from([4, head_dim]))
    if family == "falcon":
        fields |= {"alibi": draw(st.booleans()), "multi_query": draw(st.booleans())}
    if family == "opt":
        fields |= {"ffn_dim": 16, "word_embed_proj_dim": hidden}
    if ropes:
        fields["rope_parameters"] = draw(st.sampled_from(ropes))
    dtype = draw(st.sampled_from(list(TOLERANCE)))
    try:
        return CONFIG_MAPPING[family](**fields), dtype
    except READING_ERRORS:
        return assume(False)  # type: ignore[return-value]  # transformers has no such model; it does not return


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
@settings(
    max_examples=EXAMPLES or 50,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(made=configurations(), target=st.sampled_from(["exact", "mla", "gateswa", "gateswa+mla"]), data=st.data())
def test_a_random_decoder(made: tuple[PreTrainedConfig, torch.dtype], target: str, data: st.DataObject) -> None:
    config, dtype = made
    try:
        source = random_model(config, dtype)
    except READING_ERRORS:
        assume(False)
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    try:
        expected = logits(source, ids, mask)
    except RuntimeError:
        assume(False)  # the source itself cannot run: no grouped products of experts in float64
    assume(bool(torch.isfinite(expected).all()))  # some give NaN for padding in float64
    options: dict[str, Any] = {"kv_budget": 1.0}
    if target == "mla":
        options = {"kv_budget": data.draw(st.sampled_from([0.25, 0.5, 0.75])), "alternations": 0}
    elif target != "exact":
        options = {"window": data.draw(st.integers(1, 9)), "full_layers": data.draw(st.integers(0, 1))}
        options |= {"sinks": data.draw(st.sampled_from(["none", "logit", "value", "keep:2"])), "alternations": 0}
    before = {name: parameter.clone() for name, parameter in source.named_parameters()}
    try:
        result = attnedit.compile(source, "mla" if target == "exact" else target, calibration=tokens(4, 64), **options)
    except attnedit.UsageError as error:
        event(f"refused: {re.sub('[0-9.]+', 'N', str(error))}")
        return
    event(f"{config.model_type} to {target}")
    assert all(torch.equal(before[name], parameter) for name, parameter in source.named_parameters())
    whole, _ = in_pieces(result.model, ids, mask, [21])
    stepped, _ = in_pieces(result.model, ids, mask, [9, 8, 1, 1, 1, 1])
    assert deviation(stepped, whole, mask) < TOLERANCE[dtype]
    if target == "exact":
        assert deviation(logits(result.model, ids, mask), expected, mask) < TOLERANCE[dtype]
    else:
        assert result.report.kv_bytes_after <= result.report.kv_bytes_before

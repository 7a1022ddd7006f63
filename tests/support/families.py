"""One table of model families: tiny two-layer configurations with random weights, and what is true of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

logging.set_verbosity_error()  # the tiny configurations trip advice meant for real ones


@dataclass(frozen=True)
class Family:
    """A model family.

    Attributes:
        model_type: transformers' name of its configuration.
        options: of the configuration, beyond the common ones.
        heads: query heads, key/value heads.
        head_dim: size of a query/key head.
        rotary_dims: how many dims of a head rotate, per layer; 0 for a layer without rope.
        windows: sliding window per attention layer.
        qk_norm: what stands between projection and key.
        bias: the key projection has one.
        interleaved: pairs are neighbours, not halves.
        fused: query, key and value come from one linear module.
        gate: the attention output is gated.
        kinds: how many distinct attention graphs the layers have.
        attention_layers: how many layers run softmax attention.
        interface: attention goes through transformers' attention interface; else it is written out.
        mla: it has latent attention already.
        unread: positions reach queries and keys in a way that is no rotary embedding.
    """

    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 8
    rotary_dims: tuple[int, ...] = (8, 8)
    windows: tuple[int | None, ...] = (None, None)
    qk_norm: str | None = None
    bias: bool = False
    interleaved: bool = False
    fused: bool = False
    gate: bool = False
    kinds: int = 1
    attention_layers: int = 2
    interface: bool = True
    mla: bool = False
    unread: bool = False


_MHA = {"heads": (4, 4)}
_MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_SLIDING = ["sliding_attention", "full_attention"]
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}

FAMILIES: dict[str, Family] = {
    "llama": Family("llama"),
    "qwen2": Family("qwen2", bias=True),
    "qwen3": Family("qwen3", {"head_dim": 16}, head_dim=16, rotary_dims=(16, 16), qk_norm="per_head"),
    "mistral": Family("mistral", {"sliding_window": 4}, windows=(4, 4)),
    "qwen3_moe": Family("qwen3_moe", {"head_dim": 8, **_MOE}, qk_norm="per_head"),
    "mixtral": Family("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "gemma2": Family(
        "gemma2",
        {"head_dim": 8, "sliding_window": 4, "layer_types": _SLIDING, "query_pre_attn_scalar": 16},
        windows=(4, None),
        kinds=2,
    ),
    "gemma3_text": Family(
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 4, "layer_types": _SLIDING, "query_pre_attn_scalar": 16},
        windows=(4, None),
        qk_norm="per_head",
        kinds=2,
    ),
    "phi3": Family("phi3", fused=True),
    "phi": Family(
        "phi", {"partial_rotary_factor": 0.5, "qk_layernorm": True}, rotary_dims=(4, 4), qk_norm="per_head", bias=True
    ),
    "olmo2": Family("olmo2", qk_norm="projection"),
    "granite": Family("granite", {"attention_multiplier": 0.3}),
    "cohere": Family("cohere", {"use_qk_norm": True}, qk_norm="per_head", interleaved=True),
    "cohere2": Family(
        "cohere2",
        {"sliding_window": 4, "layer_types": _SLIDING},
        windows=(4, None),
        rotary_dims=(8, 0),
        interleaved=True,
        kinds=2,
    ),
    "smollm3": Family("smollm3", {"no_rope_layers": [1, 0]}, rotary_dims=(8, 0), kinds=2),
    "starcoder2": Family("starcoder2", {"sliding_window": 4}, windows=(4, 4), bias=True),
    "stablelm": Family(
        "stablelm", {"partial_rotary_factor": 0.5, "qk_layernorm": True}, rotary_dims=(4, 4), qk_norm="per_head"
    ),
    "glm4": Family(
        "glm4", {"head_dim": 8, "partial_rotary_factor": 0.5}, rotary_dims=(4, 4), bias=True, interleaved=True
    ),
    "exaone4": Family(
        "exaone4",
        {"sliding_window": 4, "layer_types": _SLIDING, "sliding_window_pattern": 2},
        windows=(4, None),
        rotary_dims=(8, 0),
        qk_norm="per_head",
        kinds=2,
    ),
    # norms after the rotary embedding
    "hunyuan_v1_dense": Family("hunyuan_v1_dense", {"head_dim": 8}, rotary_dims=(0, 0), unread=True),
    # the output projection is in the module around
    "bert": Family("bert", {"is_decoder": True}, rotary_dims=(0, 0), bias=True, **_MHA),  # type: ignore[arg-type]
    "gpt2": Family("gpt2", {"n_layer": 2}, rotary_dims=(0, 0), bias=True, fused=True, **_MHA),  # type: ignore[arg-type]
    "gpt_neox": Family("gpt_neox", {"rotary_pct": 0.5}, rotary_dims=(4, 4), bias=True, fused=True, **_MHA),  # type: ignore[arg-type]
    "gptj": Family(
        "gptj",
        {"rotary_dim": 4, "n_layer": 2},
        rotary_dims=(4, 4),
        interleaved=True,
        interface=False,
        **_MHA,  # type: ignore[arg-type]
    ),
    "falcon": Family("falcon", heads=(4, 1), fused=True, interface=False),
    "falcon_alibi": Family(
        "falcon",
        {"alibi": True, "multi_query": False, "bias": True},
        rotary_dims=(0, 0),
        bias=True,
        fused=True,
        interface=False,
        **_MHA,  # type: ignore[arg-type]
    ),
    "opt": Family("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, rotary_dims=(0, 0), bias=True, **_MHA),  # type: ignore[arg-type]
    "bloom": Family(
        "bloom",
        {"n_layer": 2},
        rotary_dims=(0, 0),
        bias=True,
        fused=True,
        interface=False,
        **_MHA,  # type: ignore[arg-type]
    ),
    "mpt": Family(
        "mpt",
        {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128},
        rotary_dims=(0, 0),
        fused=True,
        interface=False,
        **_MHA,  # type: ignore[arg-type]
    ),
    "gpt_neo": Family(
        "gpt_neo",
        {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "window_size": 4},
        rotary_dims=(0, 0),
        kinds=2,
        interface=False,
        **_MHA,  # type: ignore[arg-type]
    ),
    "gpt_oss": Family(
        "gpt_oss",
        {
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "layer_types": _SLIDING,
            "rope_parameters": _YARN,
        },
        windows=(4, None),
        bias=True,
        kinds=2,
    ),
    "deepseek_v3": Family(
        "deepseek_v3",
        {
            "q_lora_rank": 12,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
        heads=(4, 4),
        head_dim=12,
        rotary_dims=(0, 0),
        mla=True,
    ),
    "qwen3_next": Family(
        "qwen3_next",
        {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
            "partial_rotary_factor": 0.5,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "shared_expert_intermediate_size": 16,
            **_MOE,
        },
        rotary_dims=(4,),
        windows=(None,),
        qk_norm="per_head",
        gate=True,
        attention_layers=1,
    ),
}

REFUSED: dict[str, Family] = {
    # no cache that could become smaller
    "openai-gpt": Family("openai-gpt", {"n_positions": 128}, **_MHA),  # type: ignore[arg-type]
    # the difference of two attentions
    "diffllama": Family("diffllama"),
}

SUPPORTED, UNSUPPORTED = list(FAMILIES), list(REFUSED)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def build(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A fresh tiny model of a family, in evaluation mode, with weights large enough that attention matters."""
    family = (FAMILIES | REFUSED)[name]
    config = CONFIG_MAPPING[family.model_type](**{**SIZES, **family.options, **options})
    # Older transformers let these take SDPA, which leaves the softcap out.
    given = {"attn_implementation": "eager"} if getattr(config, "attn_logit_softcapping", None) else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **given)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
                if not torch.isfinite(parameter).all():
                    raise ValueError(f"{name}: {parameter_name} is not initialised")
    result: PreTrainedModel = model.eval()
    return result


@cache
def shared(name: str) -> PreTrainedModel:
    """One model per family for a whole test session; tests leave it as they found it."""
    return build(name)

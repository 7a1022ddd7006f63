"""Latent attention as llama.cpp's ``deepseek2``, which has a norm on the latent where ours has none.

The norm is neutralised: its input is so small beside its epsilon that it only divides by the epsilon's root. How small
is known without data: the block's own norm bounds what a projection can give. In float32 that is all. float16 and
blocks with a float16 scale hold no such weights, so there two factors, both powers of two that round nothing, bring
them to an ordinary size: one on the norm before the projections, of each layer, which those take back; and one on the
residual stream, which all norms take back with an epsilon that is its square times larger.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import Keys
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.eager.classes import source_config
from attnedit.targets.runtime.gguf.form import (
    HEAD,
    Form,
    common_keys,
    decoder_tensors,
    largest,
    named,
    power_of_two,
    rms,
)
from attnedit.targets.runtime.hf.latent import latent_sites, latent_weights
from attnedit.targets.runtime.hf.mla import common_sizes, latent_config, layer_weights
from attnedit.targets.runtime.hf.native import outside
from attnedit.targets.runtime.hf.rope import choose_table

ARCHITECTURE = "deepseek2"
SMALL, SMALL_IN_HALF = 2.0**-10, 2.0**-5
"""Root mean square of the largest latent beside the epsilon's root. Half its square is the relative error of that
latent, which no text comes near: 5e-7, and in half precision what float16 rounds off."""
ORDINARY = 2.0**-10
"""Root mean square of weights that float16 and float16 scales of blocks hold as well as any."""
NORM_AT_LEAST, LARGEST = 2.0**-8, 2.0**13
"""The least factor on a norm, whose values still are ordinary in float16; and the largest weight that is made."""
RESIDUAL = ("token_embd.weight", "attn_output.weight", "ffn_down.weight")
"""Weights that write to the residual stream."""


@dataclass(frozen=True)
class Scales:
    """Factors of a file: the residual stream's; and of each layer the norm's, the latent's, and the latent norm's."""

    stream: float
    norm: list[float]
    latent: list[float]
    latent_norm: list[float]


def latent_form(model: PreTrainedModel, *, half: bool) -> Form:
    """Bring a model with latent attention in every layer into the form of ``deepseek2``.

    `half` tells that weights will be float16, or blocks with float16 scales.

    Raises:
        UsageError: the architecture cannot express the model; the message says what of it.
    """
    source: Any = source_config(model.config)
    layers = latent_sites(model)
    ranks = sorted({layer.config.kv_lora_rank for layer in layers})
    if len(ranks) > 1:
        raise UsageError(
            f"the layers have ranks from {ranks[0]} to {ranks[-1]}, and llama.cpp's {ARCHITECTURE} has one for all; "
            "compile with --engine llama.cpp, which gives them one"
        )

    def make(rope: int, parameters: dict[str, Any]) -> PreTrainedConfig:
        return latent_config(source, "deepseek_v3", common_sizes(layers, rope), parameters)

    table = choose_table([layer.frequencies for layer in layers], source, make)
    if table.type != "default":
        raise UsageError(
            f"the rotary slots need rope_type {table.type}, and llama.cpp's {ARCHITECTURE} is written with the default "
            "one; compile with --engine llama.cpp"
        )
    sizes = common_sizes(layers, table.size)
    query_size = sizes.qk_nope_head_dim + sizes.qk_rope_head_dim
    tensors = decoder_tensors(outside(model, (layer.site.name for layer in layers)), source, ARCHITECTURE)
    for index, layer in enumerate(layers):
        weights = latent_weights(model, layer.site)
        made = layer_weights(layer, weights, sizes, table, query_size**-0.5, (1.0, 1.0))
        tensors |= {f"blk.{index}.{name}": value.float() for name, value in _attention(made, source, sizes).items()}
    scales = _scales(tensors, len(layers), sizes.kv_lora_rank, float(source.rms_norm_eps), half=half)
    _scale(tensors, scales, sizes.kv_lora_rank)
    eps = float(source.rms_norm_eps) * scales.stream**2
    keys = named(
        ARCHITECTURE,
        {
            Keys.Attention.HEAD_COUNT_KV: 1,  # one latent head
            Keys.Attention.Q_LORA_RANK: 0,  # required, and 0 means a query in one step
            Keys.Attention.KV_LORA_RANK: sizes.kv_lora_rank,
            Keys.Attention.KEY_LENGTH: sizes.kv_lora_rank + sizes.qk_rope_head_dim,
            Keys.Attention.VALUE_LENGTH: sizes.kv_lora_rank,
            Keys.Attention.KEY_LENGTH_MLA: query_size,
            Keys.Attention.VALUE_LENGTH_MLA: sizes.v_head_dim,
            Keys.Rope.DIMENSION_COUNT: sizes.qk_rope_head_dim,
            Keys.LLM.LEADING_DENSE_BLOCK_COUNT: len(layers),  # no layer has experts, whose keys are required
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: source.intermediate_size,
            Keys.LLM.EXPERT_SHARED_COUNT: 0,
        },
    )
    cached = sizes.kv_lora_rank + sizes.qk_rope_head_dim
    return Form(
        ARCHITECTURE,
        common_keys(source, ARCHITECTURE, eps) | keys,
        tensors,
        [f"llama.cpp caches {cached} values per token and layer, two bytes each unless told otherwise."],
    )


def _attention(made: dict[str, Tensor], source: Any, sizes: Any) -> dict[str, Tensor]:
    """Weights of one layer by llama.cpp's names, from DeepSeek's; keys up transposed and apart from values up."""
    up = made["kv_b_proj"].view(source.num_attention_heads, -1, sizes.kv_lora_rank)
    keys, values = up.split([sizes.qk_nope_head_dim, sizes.v_head_dim], 1)
    return {
        "attn_q.weight": made["q_proj"],
        "attn_kv_a_mqa.weight": made["kv_a_proj_with_mqa"],
        "attn_kv_a_norm.weight": made["kv_a_layernorm"],
        "attn_k_b.weight": keys.mT.contiguous(),
        "attn_v_b.weight": values.contiguous(),
        "attn_output.weight": made["o_proj"],
    }


def _scales(tensors: dict[str, Tensor], layers: int, rank: int, eps: float, *, half: bool) -> Scales:
    root = eps**0.5
    latent, norm, stream = [], [], 1.0
    for index in range(layers):
        part = f"blk.{index}."
        down, gains = tensors[f"{part}attn_kv_a_mqa.weight"][:rank], tensors[f"{part}attn_norm.weight"]
        # A normalised vector of D values is as long as D's root: that bounds the latent's root mean square.
        bound = float(torch.linalg.matrix_norm(down.double() * gains.double(), 2)) * (len(gains) / rank) ** 0.5
        latent.append(power_of_two((SMALL_IN_HALF if half else SMALL) * root / max(bound, 1e-30)))
        short = latent[-1] * max(rms(down), 1e-30) / ORDINARY if half else 1.0  # of an ordinary size
        beside = max(largest(tensors[f"{part}attn_q.weight"]), largest(tensors[f"{part}attn_kv_a_mqa.weight"][rank:]))
        norm.append(power_of_two(min(1.0, max(short, NORM_AT_LEAST, beside / LARGEST))))
        stream = max(stream, norm[-1] / short)
    if half:
        writes = max(largest(value) for name, value in tensors.items() if name.endswith(RESIDUAL))
        stream = max(1.0, power_of_two(min(stream, LARGEST / writes)))
    # What the norm divides by is the epsilon as the file has it, in float32.
    divisor = float(np.float32(eps * stream**2)) ** 0.5
    latent = [factor * stream for factor in latent]
    return Scales(stream, norm, latent, [divisor / factor for factor in latent])


def _scale(tensors: dict[str, Tensor], scales: Scales, rank: int) -> None:
    """Put the factors into the weights, in place."""
    for index, norm in enumerate(scales.norm):
        part = f"blk.{index}."
        tensors[f"{part}attn_norm.weight"] = tensors[f"{part}attn_norm.weight"] * norm
        tensors[f"{part}attn_q.weight"] /= norm
        down = tensors[f"{part}attn_kv_a_mqa.weight"]
        down /= norm
        down[:rank] *= scales.latent[index]
        tensors[f"{part}attn_kv_a_norm.weight"] *= scales.latent_norm[index]
    if scales.stream == 1:
        return
    for name, value in tensors.items():
        if name.endswith(RESIDUAL):
            tensors[name] = value * scales.stream
    if HEAD not in tensors:  # the head grew with the embedding
        tensors["output_norm.weight"] = tensors["output_norm.weight"] / scales.stream

"""Latent attention as DeepSeek's: a checkpoint of `DeepseekV3ForCausalLM` or `YoutuForCausalLM`, all MLPs dense.

Form: DeepSeek-V2 (arXiv 2405.04434, section 2.1). Per layer the query is ``[nope | rope]``, rope dims 2 i and 2 i + 1
turning together; the latent goes through a norm, which is neutralised (`neutral_norm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.eager.classes import source_config
from attnedit.targets.runtime.hf.latent import LatentSite, LatentWeights, latent_sites, latent_weights
from attnedit.targets.runtime.hf.native import (
    Native,
    decoder_config,
    give_own_head,
    neutral_norm,
    outside,
    refuse_half,
    skeleton,
)
from attnedit.targets.runtime.hf.profiles import Profile
from attnedit.targets.runtime.hf.rope import Table, choose_table

LATENT_EPSILON = 1e-6
"""Of the latent's norm in transformers, whatever ``rms_norm_eps`` says. Engines take ``rms_norm_eps``."""
KERNEL_DIMS = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128}
"""What engines' kernels for latent attention are written for."""

# Routed experts: every layer comes before the first that would have them. Engines read the last four as well.
DENSE_DEEPSEEK = {
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "num_mtp_layers": 0,
    "moe_layer_freq": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "ep_size": 1,
}


@dataclass(frozen=True)
class Sizes:
    """Sizes that all layers share."""

    kv_lora_rank: int
    qk_rope_head_dim: int
    qk_nope_head_dim: int
    v_head_dim: int


def latent_checkpoint(
    model: PreTrainedModel,
    model_type: str,
    kernel_dims: bool = False,
    gguf: bool = False,
    slot_values: int | None = None,
) -> Native:
    """Bring a model with latent attention in every layer into DeepSeek's form.

    Layers are padded to common sizes with zeros, which changes nothing; so are slots that some layers lack. Engines
    take ``rms_norm_eps`` for the latent's norm too, so the residual stream is scaled to the latent's; and they know no
    tied head in this class, so it has weights of its own.

    Args:
        model: the rewritten model.
        model_type: "deepseek_v3" or "youtu".
        kernel_dims: pad to what engines' kernels want.
        gguf: store the query in two steps with a norm between them, neutralised
            like the latent's: llama.cpp loads no other form of most depths. Sizes stay as they are.
        slot_values: rotary values per token, with zeros for slots that are not there; as many as needed unless given.

    Raises:
        UsageError: the class cannot express the model; the message says what of it.
    """
    source: Any = source_config(model.config)
    refuse_half(model_type, model.dtype)
    if kernel_dims:
        check_activation(source)
    layers = latent_sites(model)

    def make(rope: int, parameters: dict[str, Any]) -> PreTrainedConfig:
        sizes = common_sizes(layers, rope, kernel_dims)
        return latent_config(source, model_type, sizes, parameters, source.hidden_size if gguf else None)

    size = KERNEL_DIMS["qk_rope_head_dim"] if kernel_dims else slot_values
    table = choose_table([layer.frequencies for layer in layers], source, make, size)
    if gguf and table.type != "default":
        raise UsageError(
            f"llama.cpp has the default rotary embedding only for this class, the model needs rope_type {table.type}; "
            f"compile with --profile {model_type}, or leave --gguf out"
        )
    config: Any = make(table.size, table.parameters)
    if table.type == "default":
        config.rope_theta = table.parameters["rope_theta"]  # where engines looked before rope_parameters
    sizes, scaling = common_sizes(layers, table.size, kernel_dims), float(_first_attention(config).scaling)
    state = outside(model, (layer.site.name for layer in layers))
    for layer in layers:
        made = layer_weights(layer, latent_weights(model, layer.site), sizes, table, scaling)
        if gguf:
            made |= _query_in_two_steps(made.pop("q_proj"), model.dtype)
        state |= {f"{layer.site.name}.{name}.weight": value.to(model.dtype) for name, value in made.items()}
    give_own_head(config, state)
    if config.rms_norm_eps != LATENT_EPSILON:
        _scale_residual_stream(state, (LATENT_EPSILON / config.rms_norm_eps) ** 0.5)
        config.rms_norm_eps = LATENT_EPSILON
    return Native(config, state, _notes(config, table))


def check_activation(source: Any) -> None:
    """Refuse a source whose MLP engines would compute with another function.

    Raises:
        UsageError: they would.
    """
    if getattr(source, "hidden_act", "silu") != "silu":
        raise UsageError(
            f"engines have a silu in DeepSeek's MLP, the source {source.hidden_act}; leave --kernel-dims out"
        )


def common_sizes(layers: list[LatentSite], rope: int, kernel_dims: bool = False) -> Sizes:
    """Return the sizes that hold every layer, with ``qk_rope_head_dim`` rope.

    Raises:
        UsageError: the kernels' sizes are asked for and are too small.
    """
    # Kernels have no form without a part that meets the latent, so a model that is rotary throughout gets zeros there.
    least = {
        "kv_lora_rank": max(layer.config.kv_lora_rank for layer in layers),
        "qk_rope_head_dim": rope,
        "qk_nope_head_dim": max(layer.config.qk_nope_head_dim for layer in layers) or layers[0].config.head_dim,
        "v_head_dim": max(layer.config.v_head_dim for layer in layers),
    }
    if not kernel_dims:
        return Sizes(**least)
    for name, size in KERNEL_DIMS.items():
        if least[name] > size:
            raise UsageError(f"--kernel-dims has {name} {size}, and the model needs {least[name]}; leave it out")
    return Sizes(**KERNEL_DIMS)


def latent_config(
    source: PreTrainedConfig, model_type: str, sizes: Sizes, rope: dict[str, Any], query_rank: int | None = None
) -> PreTrainedConfig:
    """Make a configuration of DeepSeek's attention, dense, around a source's other parts.

    Raises:
        UsageError: the class cannot compute what the source does around its attention.
    """
    fields: dict[str, Any] = {
        **vars(sizes),
        "q_lora_rank": query_rank,
        "num_key_value_heads": source.num_attention_heads,
        "rope_parameters": rope,
        "rope_interleave": True,
        "attention_bias": False,
    }
    if model_type == "deepseek_v3":
        dense = {"first_k_dense_replace": source.num_hidden_layers, "moe_intermediate_size": source.intermediate_size}
        fields |= DENSE_DEEPSEEK | dense
    else:
        # Loading sets the embedding of the padding token to 0 (transformers 5.23), and sources have one of their own,
        # often that of the last token of a text. The generation config names the padding token.
        fields["pad_token_id"] = None
    return decoder_config(source, model_type, **fields)


def _first_attention(config: Any) -> Any:
    small: Any = skeleton(type(config).from_dict({**config.to_dict(), "num_hidden_layers": 1}))
    return small.model.layers[0].self_attn


def layer_weights(
    layer: LatentSite,
    weights: LatentWeights,
    sizes: Sizes,
    table: Table,
    scaling: float,
    norm: tuple[float, float] | None = None,
) -> dict[str, Tensor]:
    """Return the weights of one layer by DeepSeek's names, in float64.

    The class scales its logits by `scaling`. Factors on input and weight of the latent's norm are those that
    neutralise it in transformers unless given.
    """
    places = table.places(layer.frequencies)
    if places is None:
        raise AssertionError("the table has a place for every slot")
    heads, _, hidden = weights.query.shape
    rank, nope, count = len(weights.latent), weights.key_up.shape[1], len(places)
    # Class and engines scale the logits by the size of the query; what our scale differs goes into the query.
    query = weights.query * (layer.config.scale / scaling)
    rotary = weights.query_slots @ query * (layer.rope_scaling / table.scaling) ** 2
    at = torch.tensor(places, dtype=torch.long, device=query.device)
    queries = query.new_zeros(heads, sizes.qk_nope_head_dim + sizes.qk_rope_head_dim, hidden)
    queries[:, :nope] = query[:, :nope]
    down = query.new_zeros(sizes.kv_lora_rank + sizes.qk_rope_head_dim, hidden)
    factor, weight = norm or neutral_norm(LATENT_EPSILON)
    # Zeros that pad the latent lower its mean square, which only helps to neutralise the norm.
    down[:rank] = factor * weights.latent
    for part in (0, 1):
        rows = slice(part * count, (part + 1) * count)
        queries[:, sizes.qk_nope_head_dim + 2 * at + part] = rotary[:, rows]
        down[sizes.kv_lora_rank + 2 * at + part] = weights.slots[rows]
    up = query.new_zeros(heads, sizes.qk_nope_head_dim + sizes.v_head_dim, sizes.kv_lora_rank)
    up[:, :nope, :rank] = weights.key_up
    values = weights.value_up.shape[1]
    up[:, sizes.qk_nope_head_dim : sizes.qk_nope_head_dim + values, :rank] = weights.value_up
    output = query.new_zeros(heads, weights.output.shape[1], sizes.v_head_dim)
    output[..., :values] = weights.output
    return {
        "q_proj": queries.flatten(0, 1),
        "kv_a_proj_with_mqa": down,
        "kv_a_layernorm": query.new_full((sizes.kv_lora_rank,), weight),
        "kv_b_proj": up.flatten(0, 1),
        "o_proj": output.transpose(0, 1).flatten(1),
    }


def _query_in_two_steps(query: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Put a multiple of the identity and a neutralised norm before a projection [H q, D]."""
    factor, weight = neutral_norm(LATENT_EPSILON)
    size = query.shape[1]
    rounded = torch.eye(size, dtype=torch.float64, device=query.device) * torch.tensor(factor).to(dtype).double()
    return {
        "q_a_proj": rounded,
        "q_a_layernorm": query.new_full((size,), weight),
        "q_b_proj": query * (factor / rounded[0, 0]),  # what rounding the factor changed
    }


def _scale_residual_stream(state: dict[str, Tensor], factor: float) -> None:
    """Multiply the residual stream by a factor; norms with eps times its square then give what they gave before."""
    for name, value in state.items():
        last = name.removesuffix(".weight").rpartition(".")[2]
        if last in ("embed_tokens", "o_proj", "down_proj"):
            state[name] = (value.double() * factor).to(value.dtype)


def _notes(config: Any, table: Table) -> list[str]:
    notes = [
        f"{config.kv_lora_rank + config.qk_rope_head_dim} cached values per token and layer: layers are padded to "
        "common sizes, and rotary slots to one table of frequencies.",
        "Weights for float32 and bfloat16; the latent norm, which must do nothing, breaks in float16.",
    ]
    if config.q_lora_rank is not None:
        notes.append(
            "For llama.cpp's convert_hf_to_gguf.py: convert to f32 or bf16, and quantise neither attn_q_a nor "
            "attn_kv_a_mqa, whose values are too small for a scale in float16. attnedit export --to gguf writes the "
            "file without it, in float16 too."
        )
    if table.type == "longrope":
        notes.append(
            "The rotary slots have frequencies that repeat, listed as a longrope table; transformers reads it, engines "
            "with a DeepSeek class of their own (vLLM, SGLang) read tables of other types only."
        )
    elif table.type != "default":
        notes.append(f"Engines with a DeepSeek class of their own read rope_type {table.type} each in its own way.")
    return notes


DEEPSEEK_V3 = Profile(partial(latent_checkpoint, model_type="deepseek_v3"), uniform=True)
YOUTU = Profile(partial(latent_checkpoint, model_type="youtu"), uniform=True)

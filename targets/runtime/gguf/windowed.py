"""Sliding windows as llama.cpp's ``step35`` (gate per head, norms) or ``granite_swa`` (sink logits, biases)."""

from __future__ import annotations

from typing import Any

import torch
from gguf import Keys
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE
from attnedit.targets.runtime.eager.classes import source_config
from attnedit.targets.runtime.gguf.form import HEAD, Form, common_keys, decoder_tensors, named, plain_theta
from attnedit.targets.runtime.hf.native import outside
from attnedit.targets.runtime.hf.windowed import Layer, check_plain, common_window, windowed_layers

GATED, WITH_SINKS = "step35", "granite_swa"
NO_SINK = -1e30
"""Logit of a sink that takes no probability: every layer of ``granite_swa`` has one."""
PROJECTIONS = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
NORMS = {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}


def windowed_form(model: PreTrainedModel, *, half: bool) -> Form:
    """Bring a model with sliding windows into the form of the architecture that holds it, the same in half precision.

    Raises:
        UsageError: none does; the message says what of it.
    """
    source: Any = source_config(model.config)
    layers = windowed_layers(model, "llama.cpp", sink_logits=True)
    check_plain(layers)
    state = model.state_dict()
    architecture = _architecture(state, layers)
    first = layers[0].site
    theta = plain_theta(source, architecture)
    rotated = 2 * len(first.rotary_pairs)
    if architecture == WITH_SINKS and rotated != first.head_dim:
        raise UsageError(f"{first.name} rotates {rotated} of {first.head_dim} dims, llama.cpp's {architecture} all")
    tensors = decoder_tensors(outside(model, (layer.site.name for layer in layers)), source, architecture)
    for index, layer in enumerate(layers):
        made = _attention(layer, state, architecture)
        tensors |= {f"blk.{index}.{name}": value.float() for name, value in made.items()}
    keys: dict[str, Any] = {
        Keys.Attention.HEAD_COUNT_KV: first.num_key_value_heads,
        Keys.Attention.KEY_LENGTH: first.head_dim,
        Keys.Attention.VALUE_LENGTH: first.v_head_dim,
        Keys.Attention.SLIDING_WINDOW: common_window(layers),
        Keys.Attention.SLIDING_WINDOW_PATTERN: [layer.window is not None for layer in layers],
        Keys.Rope.FREQ_BASE_SWA: theta,
    }
    if architecture == GATED:
        tensors.setdefault(HEAD, tensors["token_embd.weight"])  # it has no tied head
        keys |= {
            Keys.Rope.DIMENSION_COUNT: 2 * rotated,  # of which its full layers take half
            Keys.Rope.DIMENSION_COUNT_SWA: rotated,
            Keys.LLM.EXPERT_FEED_FORWARD_LENGTH: source.intermediate_size,  # required, without experts too
        }
    else:
        keys |= {Keys.Rope.DIMENSION_COUNT: rotated, Keys.LLM.LOGIT_SCALE: 1.0}
    count, window = sum(layer.window is not None for layer in layers), common_window(layers)
    notes = [
        f"{count} of {len(layers)} layers keep {window} tokens. llama.cpp allocates a window and a batch for them "
        "(rounded up to 256 tokens), unless it is started with --swa-full.",
        "Start llama-server with --ctx-checkpoints 0: with windows it may go on from the checkpoint of another prompt.",
    ]
    eps = float(source.rms_norm_eps)
    return Form(architecture, common_keys(source, architecture, eps) | named(architecture, keys), tensors, notes)


def _architecture(state: dict[str, Tensor], layers: list[Layer]) -> str:
    """Say which architecture holds all layers."""
    facts: dict[str, str] = {}
    for layer in layers:
        site, gate = layer.site, layer.trained_gate
        if gate is not None and len(gate) != site.num_attention_heads:
            raise UsageError(f"{site.name} has a gate per element, llama.cpp's {GATED} one per head")
        biases = [name for name in PROJECTIONS if bool(state.get(f"{site.name}.{name}.bias", torch.zeros(1)).any())]
        found = {
            "a trained gate": gate is not None,
            "a norm on queries or keys": site.query_norm is not None or site.key_norm is not None,
            "sink logits": layer.config is not None and layer.config.sink_logit,
            "biases": bool(biases),
        }
        for fact, holds in found.items():
            if holds:
                facts.setdefault(fact, site.name)
    of_gated = [fact for fact in ("a trained gate", "a norm on queries or keys") if fact in facts]
    of_sinks = [fact for fact in ("sink logits", "biases") if fact in facts]
    if of_gated and of_sinks:
        raise UsageError(
            f"{facts[of_sinks[0]]} has {of_sinks[0]}, {facts[of_gated[0]]} {of_gated[0]}, and no architecture of "
            "llama.cpp that is written here has both"
        )
    return WITH_SINKS if of_sinks else GATED


def _attention(layer: Layer, state: dict[str, Tensor], architecture: str) -> dict[str, Tensor]:
    """Weights of one layer by llama.cpp's names."""
    site, config, gate = layer.site, layer.config, layer.trained_gate
    own = {
        name: state[f"{site.name}.{name}"].detach().double()
        for name in (f"{part}.{kind}" for part in (*PROJECTIONS, *NORMS) for kind in ("weight", "bias"))
        if f"{site.name}.{name}" in state
    }
    # The logits' scale is that of the head size; what ours differs goes into the query, or into its norm.
    gain = (site.scale if config is None else config.scale) * site.head_dim**0.5
    for name in ("q_norm.weight",) if site.query_norm is not None else ("q_proj.weight", "q_proj.bias"):
        if name in own:
            own[name] = own[name] * gain
    if gate is None and layer.gate is not None:  # all zeros: one half
        own["o_proj.weight"] = own["o_proj.weight"] / 2
    made = {}
    for name, value in own.items():
        part, _, kind = name.partition(".")
        if architecture == WITH_SINKS and part in ("q_proj", "k_proj"):
            value = _as_neighbours(value, site.head_dim)
        if kind == "weight" or bool(value.any()):
            made[f"{({**PROJECTIONS, **NORMS})[part]}.{kind}"] = value
    if gate is not None:
        made["attn_gate.weight"] = gate
    if architecture == WITH_SINKS:
        sink = f"{site.name}.{GATESWA_MODULE}.sink_logit"
        made["attn_sinks.weight"] = state.get(sink, torch.full((site.num_attention_heads,), NO_SINK))
    return made


def _as_neighbours(rows: Tensor, head_dim: int) -> Tensor:
    """Reorder the rows of every head from halves that turn together to neighbours that do."""
    heads: Tensor = rows.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)

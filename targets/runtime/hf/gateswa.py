"""Gated sliding windows as classes of transformers have them: Laguna, LFM3, and plain classes with ``layer_types``.

Gates: LFM3's is a sigmoid per head, as ours may be; Laguna's a softplus. A gate whose weights are 0 is a constant (1/2
and ln 2) for which the output projection makes up. Both classes normalise queries and keys; where the source does not,
the norms are neutralised (`neutral_norm`).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE
from attnedit.targets.runtime.eager.classes import source_config
from attnedit.targets.runtime.hf.native import OTHER, Native, decoder_config, neutral_norm, refuse_half
from attnedit.targets.runtime.hf.profiles import Profile
from attnedit.targets.runtime.hf.rope import flat_rope
from attnedit.targets.runtime.hf.windowed import Layer, check_plain, common_window, windowed_layers

SLIDING, FULL = "sliding_attention", "full_attention"

# LFM3's names of what other decoders call by Llama's.
LFM3_NAMES = (
    (r"\.input_layernorm\.", ".operator_norm."),
    (r"\.post_attention_layernorm\.", ".ffn_norm."),
    (r"\.mlp\.gate_proj\.", ".feed_forward.w1."),
    (r"\.mlp\.up_proj\.", ".feed_forward.w3."),
    (r"\.mlp\.down_proj\.", ".feed_forward.w2."),
    (r"^model\.norm\.", "model.embedding_norm."),
)


def laguna_checkpoint(model: PreTrainedModel) -> Native:
    """Bring a model with sliding windows into the form of `LagunaForCausalLM`.

    Raises:
        UsageError: the class cannot express the model; the message says what of it.
    """
    layers = windowed_layers(model, "laguna")
    for layer in layers:
        if layer.trained_gate is not None:
            raise UsageError(
                f"{layer.site.name} has a trained gate, a sigmoid; Laguna's is a softplus: use lfm3 or remote"
            )
    source: Any = source_config(model.config)
    fields = _fields(layers, source, model) | {
        "gating": True,
        "mlp_layer_types": ["dense"] * len(layers),
        "num_experts": 1,
        "num_experts_per_tok": 1,
    }
    config = decoder_config(source, "laguna", **fields)
    gain = 1 / math.log(2)
    state = _state(model, layers, lambda layer: gain if layer.gate is None else gain / 2)
    for layer in layers:
        heads = layer.site.num_attention_heads
        state[f"{layer.site.name}.g_proj.weight"] = torch.zeros(heads, source.hidden_size)
    return Native(config, state, _notes(layers))


def lfm3_checkpoint(model: PreTrainedModel) -> Native:
    """Bring a model with sliding windows into the form of `Lfm3ForCausalLM`.

    Raises:
        UsageError: the class cannot express the model; the message says what of it.
    """
    layers = windowed_layers(model, "lfm3")
    gated = any(layer.gate is not None for layer in layers)
    for layer in layers:
        config = layer.config
        if config is not None and config.gate == "element" and layer.trained_gate is not None:
            raise UsageError(f"{layer.site.name} has a gate per element, LFM3's is per head; {OTHER}")
        rope = layer.site.rope
        if rope is not None and 2 * len(rope.pairs) != layer.site.head_dim:
            raise UsageError(
                f"{layer.site.name} rotates {2 * len(rope.pairs)} dims of a head, LFM3 all of them; {OTHER}"
            )
    source: Any = source_config(model.config)
    if getattr(source, "hidden_act", "silu") not in ("silu", "swish"):
        raise UsageError(f"lfm3 has a silu in its MLP, the source {source.hidden_act}; {OTHER}")
    fields = _fields(layers, source, model) | {"use_sandwich_norm": False, "use_attention_gate": gated}
    made: Any = decoder_config(source, "lfm3", **fields)
    state = _state(model, layers, lambda layer: 2.0 if gated and layer.gate is None else 1.0)
    for layer in layers if gated else ():
        gate, heads = layer.gate, layer.site.num_attention_heads
        per_head = gate if gate is not None and len(gate) == heads else torch.zeros(heads, source.hidden_size)
        state[f"{layer.site.name}.g_proj.weight"] = per_head
    return Native(made, {_renamed(name): value for name, value in state.items()}, _notes(layers))


def native_checkpoint(model: PreTrainedModel) -> Native:
    """Bring a model with plain sliding windows into its source's own class; Llama's with windows where that has none.

    Raises:
        UsageError: the class cannot express the model; the message says what of it.
    """
    layers = windowed_layers(model, "native", sink_logits=True)
    for layer in layers:
        if layer.trained_gate is not None:
            raise UsageError(f"{layer.site.name} has a trained gate, which plain classes do not; use lfm3 or remote")
        if layer.config is not None and layer.config.sink_logit and layer.site.sinks is None:
            raise UsageError(f"{layer.site.name} has sink logits, which its source's class does not; {OTHER}")
    source: Any = copy.deepcopy(source_config(model.config))
    state = {name: value for name, value in model.state_dict().items() if f".{GATESWA_MODULE}." not in name}
    for layer in layers:
        if layer.gate is not None:  # all zeros: 1/2
            name = f"{layer.site.name}.{layer.site.o_proj.weight}"
            state[name] = state[name] / 2
        if layer.config is not None and layer.config.sink_logit:
            # Two virtual keys without value weigh what one does with the sum of their exponentials.
            own, ours = (f"{layer.site.name}.{name}" for name in (layer.site.sinks, f"{GATESWA_MODULE}.sink_logit"))
            state[own] = torch.logaddexp(state[own].double(), model.get_parameter(ours).double())
    if getattr(source, "layer_types", None) is None or source.model_type == "qwen2":
        return _as_llama(source, layers, state)
    source.sliding_window = common_window(layers)
    source.layer_types = [FULL if layer.window is None else SLIDING for layer in layers]
    if hasattr(source, "use_sliding_window"):
        source.use_sliding_window = True
        # vLLM's Qwen classes have windows in no layer: so they refuse the model, and do not ignore its windows.
        source.max_window_layers = 0
    return Native(source, state, _notes(layers))


def _as_llama(source: Any, layers: list[Layer], state: dict[str, Tensor]) -> Native:
    """Llama's attention with windows in some layers: Ministral's class, or SmolLM3's where there are biases.

    Transformers knows no windows in Llama's own class. Qwen2's has them, but engines ignore them there, and its
    tokenizer takes the place of the source's.
    """
    biased = any(bool(state[name].any()) for name in _bias_names(layers) if name in state)
    fields: dict[str, Any] = {
        "num_key_value_heads": layers[0].site.num_key_value_heads,
        "rope_parameters": _rope(source),
        "sliding_window": common_window(layers),
        "layer_types": [FULL if layer.window is None else SLIDING for layer in layers],
    }
    if biased:
        fields |= {"attention_bias": True, "use_sliding_window": True, "no_rope_layers": [1] * len(layers)}
    config: Any = decoder_config(source, "smollm3" if biased else "ministral", **fields)
    config.head_dim = layers[0].site.head_dim
    for name in _bias_names(layers):
        weight = state.get(name.replace(".bias", ".weight"))
        if not biased:
            state.pop(name, None)
        elif weight is not None:
            state.setdefault(name, weight.new_zeros(len(weight)))
    note = (
        f"The class is {type(config).__name__.removesuffix('Config')}'s, which is Llama's with windows in some layers; "
        "transformers' own Llama knows none."
    )
    return Native(config, state, [note, *_notes(layers)])


def _bias_names(layers: list[Layer]) -> list[str]:
    parts = ("q_proj", "k_proj", "v_proj", "o_proj")
    return [f"{layer.site.name}.{part}.bias" for layer in layers for part in parts]


def _rope(source: Any) -> dict[str, Any]:
    """Rope parameters of the source, those of all its layers."""
    own = flat_rope(source)
    if not own:
        raise UsageError(f"layers of {type(source).__name__} rotate each type in a way of its own; {OTHER}")
    return own


def _fields(layers: list[Layer], source: Any, model: PreTrainedModel) -> dict[str, Any]:
    """Fields that Laguna and LFM3 have in common."""
    check_plain(layers)
    if any(norm is None for layer in layers for norm in (layer.site.query_norm, layer.site.key_norm)):
        refuse_half("the class", model.dtype)
    first = layers[0].site
    rope = _rope(source)
    return {
        "num_key_value_heads": first.num_key_value_heads,
        "head_dim": first.head_dim,
        "layer_types": [FULL if layer.window is None else SLIDING for layer in layers],
        "sliding_window": common_window(layers),
        "rope_parameters": {SLIDING: dict(rope), FULL: dict(rope)},
        "attention_bias": any(bool(bias.any()) for bias in _biases(model, layers).values()),
    }


def _biases(model: PreTrainedModel, layers: list[Layer]) -> dict[str, Tensor]:
    prefixes = tuple(f"{layer.site.name}." for layer in layers)
    parameters = model.state_dict()
    return {name: value for name, value in parameters.items() if name.startswith(prefixes) and name.endswith("bias")}


def _state(model: PreTrainedModel, layers: list[Layer], gain: Callable[[Layer], float]) -> dict[str, Tensor]:
    """Weights by Llama's names with ``q_norm`` and ``k_norm``: those of Laguna, but for the gate.

    A layer's output projection gets a gain, which makes up for its gate.
    """
    biases = _biases(model, layers)
    own = f".{GATESWA_MODULE}."
    state = {name: value for name, value in model.state_dict().items() if own not in name and name not in biases}
    biased = any(bool(bias.any()) for bias in biases.values())
    for layer in layers:
        site, prefix = layer.site, f"{layer.site.name}."
        o_proj = f"{prefix}o_proj.weight"
        state[o_proj] = state[o_proj].double() * gain(layer)
        scale = layer.config.scale if layer.config is not None else site.scale
        query_gain = scale * site.head_dim**0.5
        for part, norm, extra in (("q_proj", "q_norm", query_gain), ("k_proj", "k_norm", 1.0)):
            if (site.query_norm if part == "q_proj" else site.key_norm) is not None:
                state[f"{prefix}{norm}.weight"] = state[f"{prefix}{norm}.weight"].double() * extra
                continue
            factor, weight = neutral_norm(float(model.config.rms_norm_eps))
            state[f"{prefix}{part}.weight"] = state[f"{prefix}{part}.weight"].double() * factor * extra
            state[f"{prefix}{norm}.weight"] = torch.full((site.head_dim,), weight)
            if f"{prefix}{part}.bias" in biases:
                biases[f"{prefix}{part}.bias"] = biases[f"{prefix}{part}.bias"].double() * factor * extra
        for part in ("q_proj", "k_proj", "v_proj", "o_proj") if biased else ():
            rows = len(state[f"{prefix}{part}.weight"])
            state[f"{prefix}{part}.bias"] = biases.get(f"{prefix}{part}.bias", torch.zeros(rows))
    return state


def _renamed(name: str) -> str:
    for pattern, new in LFM3_NAMES:
        name = re.sub(pattern, new, name)
    return name


def _notes(layers: list[Layer]) -> list[str]:
    count, window = sum(layer.window is not None for layer in layers), common_window(layers)
    return [f"{count} of {len(layers)} layers attend to the last {window} tokens, the token itself included."]


LAGUNA = Profile(laguna_checkpoint, gates=("none",), sinks=("none",), own_head=True)
LFM3 = Profile(lfm3_checkpoint, gates=("none", "head"), sinks=("none",))
NATIVE = Profile(native_checkpoint, named=False, gates=("none",), sinks=("none", "logit"))

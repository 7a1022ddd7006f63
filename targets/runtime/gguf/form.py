"""A model as an architecture of llama.cpp holds it: keys, and tensors by its names."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from gguf import MODEL_ARCH, Keys, get_tensor_name_map
from torch import Tensor
from transformers import PreTrainedConfig

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.hf.native import check_decoder
from attnedit.targets.runtime.hf.rope import flat_rope

HEAD = "output.weight"


@dataclass(frozen=True)
class Form:
    """What goes into a file.

    Attributes:
        architecture: llama.cpp's name of it.
        keys: of the model, the architecture's name put in.
        tensors: float32, in torch's order of dimensions.
        notes: what its user should know.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)


def common_keys(source: Any, architecture: str, eps: float) -> dict[str, Any]:
    """Return the keys that every architecture has, of a decoder with RMS norms and a gated MLP.

    Raises:
        UsageError: llama.cpp cannot compute what the source does around its attention.
    """
    check_decoder(source, f"llama.cpp's {architecture}")
    if (activation := getattr(source, "hidden_act", "silu")) not in ("silu", "swish"):
        raise UsageError(f"llama.cpp's {architecture} has a silu in its MLP, the source {activation}")
    keys = {
        Keys.LLM.BLOCK_COUNT: source.num_hidden_layers,
        Keys.LLM.CONTEXT_LENGTH: source.max_position_embeddings,
        Keys.LLM.EMBEDDING_LENGTH: source.hidden_size,
        Keys.LLM.FEED_FORWARD_LENGTH: source.intermediate_size,
        Keys.LLM.VOCAB_SIZE: source.vocab_size,
        Keys.Attention.HEAD_COUNT: source.num_attention_heads,
        Keys.Attention.LAYERNORM_RMS_EPS: float(eps),
        Keys.Rope.FREQ_BASE: plain_theta(source, architecture),
    }
    return named(architecture, keys)


def named(architecture: str, keys: Mapping[str, Any]) -> dict[str, Any]:
    """Put an architecture's name into keys."""
    return {key.format(arch=architecture): value for key, value in keys.items()}


def plain_theta(source: PreTrainedConfig, architecture: str) -> float:
    """Return the base of the default rotary embedding.

    Raises:
        UsageError: the source's is another.
    """
    rope = flat_rope(source)
    if rope.get("rope_type", "default") != "default" or not rope.get("rope_theta"):
        kind = rope.get("rope_type", "one for each type of layer")
        raise UsageError(f"llama.cpp's {architecture} is written with the default rotary embedding; here it is {kind}")
    return float(rope["rope_theta"])


def decoder_tensors(state: Mapping[str, Tensor], source: Any, architecture: str) -> dict[str, Tensor]:
    """Take what is not attention out of a state, by llama.cpp's names.

    Raises:
        UsageError: a weight is missing, or there is one that llama.cpp has no place for.
    """
    layers = source.num_hidden_layers
    names, left, found = get_tensor_name_map(MODEL_ARCH.LLAMA, layers), dict(state), {}
    if source.tie_word_embeddings:
        left.pop("lm_head.weight", None)
    for stem in _stems(layers, source.tie_word_embeddings):
        value = left.pop(f"{stem}.weight", None)
        if value is None:
            raise UsageError(f"llama.cpp's {architecture} needs {stem}.weight, which the model does not have")
        found[f"{names.get_name(stem)}.weight"] = value.detach().float()
    for name, value in left.items():
        if not name.endswith("bias") or bool(value.any()):
            raise UsageError(f"llama.cpp's {architecture} has no place for {name}")
    return found


def _stems(layers: int, tied: bool) -> Iterator[str]:
    yield from ("model.embed_tokens", "model.norm")
    if not tied:
        yield "lm_head"
    parts = ("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for layer in range(layers):
        yield from (f"model.layers.{layer}.{part}" for part in parts)


def power_of_two(value: float) -> float:
    """Return the largest power of two that is no larger: a factor that rounds nothing."""
    return 2.0 ** math.floor(math.log2(value))


def largest(tensor: Tensor) -> float:
    """Return the largest absolute value; 0 for none."""
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def rms(tensor: Tensor) -> float:
    """Return the root of the mean square."""
    return float(tensor.to(torch.float64).square().mean().sqrt())

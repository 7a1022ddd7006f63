"""A rewritten model in the form of one of transformers' own classes: weights by that class's names, and its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from attnedit.compiler.errors import UsageError, VerificationError

OTHER = "use --profile remote, which holds any result"

# What a decoder may do outside its attention that the classes here do not; and the value at which it does nothing.
MULTIPLIERS = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "logits_scaling": 1.0,
    "logit_scale": 1.0,
    "final_logit_softcapping": None,
}
SHARED_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
EPSILON_ROOT_EXPONENT = 20
"""A norm that must do nothing gets its input times ``sqrt(eps) / 2^20``: then eps is all there is under its root, up
to 5e-7 for values a thousand times the usual. Its weight of 2^20 brings the values back, and rounds nothing."""


@dataclass(frozen=True)
class Native:
    """A model as one of transformers' own classes holds it.

    Attributes:
        config: of that class.
        state: the weights, by its names.
        notes: what its user should know.
        architectures: what config.json calls the class for an engine that has it by another name; transformers goes by
            the model's type.
    """

    config: PreTrainedConfig
    state: dict[str, Tensor]
    notes: list[str] = field(default_factory=list)
    architectures: list[str] | None = None


def decoder_config(source: PreTrainedConfig, model_type: str, **fields: Any) -> PreTrainedConfig:
    """Make a configuration with what a source, with RMS norms and a gated MLP, has outside its attention.

    Raises:
        UsageError: the class cannot compute what the source does around its attention.
    """
    check_decoder(source, model_type)
    values = {name: getattr(source, name) for name in SHARED_FIELDS}
    values |= {name: getattr(source, name, None) for name in TOKENS}
    values["hidden_act"] = getattr(source, "hidden_act", "silu")
    return CONFIG_MAPPING[model_type](**{**values, **fields})


def check_decoder(source: PreTrainedConfig, holder: str) -> None:
    """Refuse a source that does something outside its attention that a decoder of that name cannot.

    Raises:
        UsageError: it does, or lacks what the other needs.
    """
    for name, neutral in MULTIPLIERS.items():
        value = getattr(source, name, neutral)
        if value not in (neutral, None):
            raise UsageError(f"{holder} has no {name}, which is {value} in the source; {OTHER}")
    missing = [name for name in SHARED_FIELDS if getattr(source, name, None) is None]
    if missing:
        raise UsageError(f"{holder} needs a {missing[0]}, which {type(source).__name__} does not have; {OTHER}")


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Build the model of a configuration, its parameters on meta, its buffers real."""
    with torch.device("cpu"), init_empty_weights(include_buffers=False):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def outside(model: PreTrainedModel, modules: Iterable[str]) -> dict[str, Tensor]:
    """Return the state of a model but for what is in the modules of some names, which a class has otherwise."""
    inside = tuple(f"{name}." for name in modules)
    return {key: value for key, value in model.state_dict().items() if not key.startswith(inside)}


def neutral_norm(epsilon: float) -> tuple[float, float]:
    """Return factors on a norm's input and weight with which an RMS norm passes its values on.

    >>> factor, weight = neutral_norm(1e-6)
    >>> x = torch.randn(64)
    >>> y = torch.nn.functional.rms_norm(factor * x, (64,), torch.full((64,), weight), 1e-6)
    >>> bool((y - x).abs().max() < 1e-5)
    True
    """
    weight = 2.0**EPSILON_ROOT_EXPONENT
    return epsilon**0.5 / weight, weight


def refuse_half(profile: str, dtype: torch.dtype) -> None:
    """Refuse float16, in which the input of a neutralised norm would be 0.

    Raises:
        UsageError: it is float16.
    """
    if dtype == torch.float16:
        raise UsageError(
            f"{profile} has a norm that is neutralised by inputs far below what float16 holds; "
            "compile with --dtype bfloat16 or float32"
        )


def check_places(model: PreTrainedModel, state: Mapping[str, Tensor], except_in: tuple[str, ...] = ()) -> None:
    """Hold names and shapes of weights against those of a class, but for those with certain prefixes.

    Raises:
        UsageError: a weight has no place in the class, or the class has one that is not given.
    """
    places = {name: value.shape for name, value in model.state_dict().items() if not name.startswith(except_in)}
    title = type(model).__name__
    for name, value in state.items():
        if name.startswith(except_in):
            continue
        if name not in places:
            raise UsageError(f"{title} has no place for {name}; {OTHER}")
        if places[name] != value.shape:
            raise UsageError(f"{title} has {name} as {tuple(places[name])}, the model as {tuple(value.shape)}; {OTHER}")
    if absent := sorted(set(places) - set(state)):
        raise UsageError(f"{title} needs {absent[0]}, which the model does not have; {OTHER}")


def give_own_head(config: PreTrainedConfig, state: dict[str, Tensor]) -> None:
    """Write a tied head out, for engines whose class takes no embeddings in its place, whatever config.json says."""
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"].detach().clone()
        config.tie_word_embeddings = False


def write_native(native: Native, directory: Path, dtype: torch.dtype, generation_config: Any) -> None:
    """Write weights and configuration; the generation config is the class's own without one.

    Raises:
        UsageError: a weight has no place in the class, or the class has one that is not given.
    """
    model = skeleton(native.config)
    check_places(model, native.state)
    model.load_state_dict({name: value.detach().to(dtype) for name, value in native.state.items()}, assign=True)
    model.tie_weights()
    model.config.dtype = dtype
    if generation_config is not None:
        model.generation_config = generation_config
    model.save_pretrained(directory)
    if native.architectures is not None:
        file = directory / "config.json"
        values = {**json.loads(file.read_text(encoding="utf-8")), "architectures": native.architectures}
        file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_native(directory: Path) -> PreTrainedModel:
    """Load a directory as anyone would, with nothing missing and nothing left over.

    Raises:
        VerificationError: a weight is missing or left over.
    """
    auto: Any = AutoModelForCausalLM
    return complete(*auto.from_pretrained(directory, dtype="auto", output_loading_info=True))


def complete(model: PreTrainedModel, info: Mapping[str, Any]) -> PreTrainedModel:
    """A model that was just loaded, in evaluation mode; `info` is what loading says of its keys.

    Raises:
        VerificationError: a weight is missing or left over.
    """
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info.get(kind) or ()):
            raise VerificationError(f"the written checkpoint has {kind.replace('_', ' ')}, first {keys[0]}")
    result: PreTrainedModel = model.eval()
    return result

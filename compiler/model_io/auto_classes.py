"""Which auto class of transformers loads a source: that of language models, or that of models with a text tower."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.remote_code import auto_map_of

ModelClass = type[PreTrainedModel]


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of several parts, one of which is a language model: its text tower."""
    return type(config.get_text_config(decoder=True)) is not type(config)  # an encoder-decoder's is a copy of its own


def check_text_alone(config: PreTrainedConfig, name: str, where: str) -> None:
    """Refuse a model that is more than a language model where only those have a place.

    Args:
        config: of the model.
        name: what messages call it.
        where: such as "a GGUF".

    Raises:
        UsageError: it takes images or the like.
    """
    if is_multimodal(config):
        raise UsageError(
            f"{name} is more than a language model, and {where} holds one alone; serve the result with transformers, "
            "or export its text tower to onnx"
        )


def model_classes(config_class: type[PreTrainedConfig]) -> list[ModelClass]:
    """The classes with a language-model head that transformers has for a configuration, the whole model's first."""
    found: list[ModelClass] = []
    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        classes = mapping.get(config_class, None)
        found += [kind for kind in (classes if isinstance(classes, (list, tuple)) else [classes]) if kind is not None]
    return list(dict.fromkeys(found))


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads models of a configuration: with images and all where it has more than a text tower."""
    alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_multimodal(config)
    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and not alone
    own = "AutoModelForCausalLM" in auto_map_of(config)
    return AutoModelForMultimodalLM if whole and not own else AutoModelForCausalLM

"""Which auto class of transformers loads a source: that of language models, or that of models with a text tower."""

from __future__ import annotations

from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
)

from attnedit.compiler.model_io.remote_code import auto_map_of

ModelClass = type[PreTrainedModel]


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of several parts, one of which is a language model: its text tower."""
    return config.get_text_config(decoder=True) is not config


def model_classes(config_class: type[PreTrainedConfig]) -> list[ModelClass]:
    """The classes with a language-model head that transformers has for a configuration, the whole model's first."""
    found: list[ModelClass] = []
    for mapping in (MODEL_FOR_MULTIMODAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):
        classes = mapping.get(config_class, None)
        found += [kind for kind in (classes if isinstance(classes, (list, tuple)) else [classes]) if kind is not None]
    return list(dict.fromkeys(found))


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads models of a configuration: with images and all where it has more than a text tower."""
    whole = is_multimodal(config) and type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING
    own = "AutoModelForCausalLM" in auto_map_of(config)
    return AutoModelForMultimodalLM if whole and not own else AutoModelForCausalLM

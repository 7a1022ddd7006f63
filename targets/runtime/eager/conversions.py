"""Conversions between stored and live weights (stacked experts, renamings), which transformers finds by class name."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)


def register_conversions(
    config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], new_model: type[PreTrainedModel]
) -> None:
    """Give a new class the conversions of the one it comes from.

    Args:
        config_class: of the source.
        model_class: of the source.
        new_model: the class that gets them.
    """
    find: Any = get_checkpoint_conversion_mapping
    conversions = find(model_class.__name__)
    if conversions is None:
        conversions = find(config_class.model_type)
    if conversions is not None:
        register_checkpoint_conversion_mapping(new_model.__name__, conversions, overwrite=True)

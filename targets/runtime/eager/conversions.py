"""Conversions between stored and live weights (stacked experts, renamings), which transformers finds by class name."""

from __future__ import annotations

from transformers import PreTrainedConfig, PreTrainedModel

from attnedit.compiler.compatibility.live import keep_conversions, kept_conversions


def register_conversions(
    config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel], new_model: type[PreTrainedModel]
) -> None:
    """Give a new class the conversions of the one that it comes from."""
    conversions = kept_conversions(model_class.__name__)
    if conversions is None:
        conversions = kept_conversions(config_class.model_type)
    if conversions is not None:
        keep_conversions(new_model.__name__, conversions)

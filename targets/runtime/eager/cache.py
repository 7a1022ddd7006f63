"""Caches of rewritten models: layers with a window are bounded, whoever makes the cache."""

from __future__ import annotations

from typing import Any, cast

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from attnedit.targets.attention.gateswa import GateSWA
from attnedit.targets.attention.gateswa_layers import bounded_layer


def bounded_cache(model: PreTrainedModel) -> DynamicCache:
    """Make a cache for a rewritten model, its bounded layers in place.

    A plain ``DynamicCache(config=model.config)`` gets them at the first forward, which is too late for one thing only:
    ``activate_past_recording`` on a cache that nothing has used yet.
    """
    cache = DynamicCache(config=model.config)
    bind_cache(model, cache)
    return cache


def bind_cache(model: nn.Module, cache: Any) -> Any:
    """Give a cache the bounded layers that a rewritten model asks for, in place of empty dynamic ones.

    Args:
        model: any model; one without gated sliding-window attention changes nothing.
        cache: a transformers cache; anything else is left alone.

    Returns:
        The same cache.
    """
    if isinstance(cache, Cache):
        for module in model.modules():
            if isinstance(module, GateSWA):
                bounded_layer(cache, module.config)
    return cache


class BoundedGeneration:
    """First base of a model class: `generate` makes caches whose layers with a window are bounded."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Bound the layers before the first forward: assisted generation switches their recording on before it."""
        parent: Any = super()
        result = parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        cache = bind_cache(cast(PreTrainedModel, self), model_kwargs.get("past_key_values"))
        if cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()
        return result

"""Caches of rewritten models: layers with a window are bounded, whoever makes the cache."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Cache, DynamicCache, PreTrainedModel

from attnedit.targets.attention.gateswa import GateSWA
from attnedit.targets.attention.gateswa_cache import bounded_layer


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

"""Which layer of a transformers cache a sliding window gets."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from attnedit.targets.attention.gateswa.cache import GateSWALayer
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.ring import RingLayer


def bounded_layer(cache: Any, config: GateSWAConfig) -> GateSWALayer | RingLayer | None:
    """Return the layer that `config` asks for, in place of an empty one where there is none yet.

    Args:
        cache: a transformers cache.
        config: names the layer, the window and the kept sinks.

    Returns:
        None where the cache has a layer of another kind there, or one with other tokens in it: that layer keeps every
        token, and attention over it is masked. So is attention over the static layer of a site that slides in the
        source, as its mask is sized by the source's window.
    """
    layers = getattr(cache, "layers", None)
    if layers is None:
        return None
    grow = getattr(cache, "layer_class_to_replicate", None)
    while grow is not None and len(layers) <= config.layer_idx:
        layers.append(grow())
    found = layers[config.layer_idx]
    if isinstance(found, GateSWALayer | RingLayer):
        return found
    if type(found) is StaticLayer and not found.is_initialized and config.source_window is None:
        ring = RingLayer(found.max_cache_len, config.sliding_window, config.sink_tokens)
        layers[config.layer_idx] = ring
        return ring
    if type(found) not in (DynamicLayer, DynamicSlidingWindowLayer) or found.get_seq_length():
        return None
    layer = GateSWALayer(config.sliding_window, config.sink_tokens)
    # Recording is switched on for a whole cache, but a plain dynamic layer cannot remember that.
    layer.record_past = any(getattr(other, "record_past", False) for other in layers)
    layers[config.layer_idx] = layer
    return layer

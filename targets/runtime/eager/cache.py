"""Generation with rewritten models: layers with a window are bounded, whoever makes the cache, and masks stay small."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import given_cache
from attnedit.compiler.compatibility.live import GenerationHook
from attnedit.compiler.compatibility.paged import size_pages
from attnedit.targets.attention.module import attention_modules
from attnedit.targets.runtime.eager.paging import paged_config

LARGE_MASK = 1 << 26
"""Places of a prompt's attention mask beyond which the prompt is read in parts: 8,192 x 8,192."""


def bounded_cache(model: PreTrainedModel) -> DynamicCache:
    """Make a cache for a rewritten model, its bounded layers in place.

    A plain ``DynamicCache(config=model.config)`` gets them at the first forward, which is too late for one thing only:
    ``activate_past_recording`` on a cache that nothing has used yet.

    Args:
        model: a rewritten one; of any other it is a plain dynamic cache.

    Returns:
        An empty cache for one batch.
    """
    cache = DynamicCache(config=model.config)
    bind_cache(model, cache)
    return cache


def bind_cache(model: nn.Module, cache: Any) -> Any:
    """Give a cache the bounded layers that a rewritten model asks for, in place of empty dynamic ones; return it.

    Args:
        model: any model; one without attention that bounds its cache changes nothing.
        cache: a transformers cache; anything else is left alone.
    """
    if isinstance(cache, Cache):
        for _, module in attention_modules(model):
            module.bind_cache(cache)
    return cache


class BoundedGeneration(GenerationHook):
    """First base of a model class: `generate` bounds what the layers with a window cache, and what a mask takes.

    A batch of prompts of different lengths needs a mask in memory, of T x T for each prompt of T tokens. Long ones are
    read in parts, unless the caller sets ``prefill_chunk_size``.
    """

    def cache_wanted(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Read long prompts in parts; not those of a model that takes images: each part would be given all of them."""
        config = cast(PreTrainedModel, self).config
        if type(config.get_text_config(decoder=True)) is type(config) and generation_config.prefill_chunk_size is None:
            generation_config.prefill_chunk_size = _part_of_prompt(model_kwargs.get("attention_mask"))

    def cache_made(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Bound the layers before the first forward: assisted generation switches their recording on before it."""
        cache = bind_cache(cast(PreTrainedModel, self), given_cache(model_kwargs))
        if cache is not None and generation_config.is_assistant:
            cache.activate_past_recording()

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """Make the manager that ``generate_batch`` begins with, with pages for what rewritten layers cache.

        Raises:
            UsageError: the model cannot be served so (`paged_config`).
        """
        model = cast(PreTrainedModel, self)
        paged_config(model)
        parent: Any = super()
        manager = parent.init_continuous_batching(*args, **kwargs)
        return size_pages(manager, paged_config(model))  # again: it may have switched the attention implementation


def _part_of_prompt(mask: Any) -> int | None:
    """Tokens of a prompt to read at a time, from its padding mask [B, T]; None for all."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] ** 2 <= LARGE_MASK or bool(mask.all()):
        return None
    return max(1, LARGE_MASK // mask.shape[1])

"""Private names of torch and transformers that rewritten models need when they run, each held by a test.

A checkpoint with code of its own gets a copy of this file.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _python_dispatch
from transformers import StaticCache, conversion_mapping
from transformers.utils import output_capturing


class GenerationHook:
    """First base of a model class: `cache_wanted` and `cache_made` run before and after `generate` makes its cache."""

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        parent: Any = super()
        self.cache_wanted(generation_config, model_kwargs)
        result = parent._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)
        self.cache_made(generation_config, model_kwargs)
        return result

    def _get_static_cache_init_shape(self) -> None:
        """Static layers are made at the first forward, which knows what each of them holds."""

    def cache_wanted(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Change the generation's configuration in place."""

    def cache_made(self, generation_config: Any, model_kwargs: dict[str, Any]) -> None:
        """Change the cache among the model's arguments in place."""


def before_early_initialization(prepare: Callable[[Any, Any, int, torch.dtype, Any], None]) -> None:
    """Have every static cache that is to make its tensors ahead ask first, as exports do.

    Args:
        prepare: called with the cache, the configuration that it was made for, the batch size, dtype and device; layers
            that it initialises stay as they are.
    """
    init, early = StaticCache.__init__, StaticCache.early_initialization

    @functools.wraps(init)
    def made(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        init(self, config, *args, **kwargs)
        self.made_for = config

    @functools.wraps(early)
    def initialized(
        self: Any, batch_size: int, num_heads: Any, head_dim: Any, dtype: torch.dtype, device: torch.device
    ) -> None:
        prepare(self, self.made_for, batch_size, dtype, device)
        early(self, batch_size, num_heads, head_dim, dtype, device)

    StaticCache.__init__ = made  # type: ignore[method-assign]
    StaticCache.early_initialization = initialized  # type: ignore[method-assign]


def recorded_attention() -> list[Tensor] | None:
    """Where a forward that is asked for attention weights collects them, layer by layer; None if it is not asked."""
    collector = output_capturing._active_collector
    if torch.compiler.is_compiling() and not collector.compiling:
        return None  # compilers do not read what the forward around them has set
    collected: dict[str, list[Tensor]] | None = collector.get()
    return None if collected is None else collected.get("attentions")


def kept_conversions(name: str) -> Any:
    """The conversions between stored and live weights that transformers keeps for a class or a model type, or None."""
    return conversion_mapping.get_checkpoint_conversion_mapping(name)


def keep_conversions(name: str, conversions: Any) -> None:
    """Have transformers keep conversions for a class, in place of those that it has."""
    conversion_mapping.register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a module is a linear one whose weight can be read: no subclass, adapter, quantiser or hook around it."""
    return (
        type(module) is nn.Linear
        and not _python_dispatch.is_traceable_wrapper_subclass(module.weight)
        and not module._forward_pre_hooks
        and not hasattr(module, "_hf_hook")
    )


def keep_in_place(*tensors: Tensor) -> None:
    """Promise compilers that tensors stay where they are: CUDA graphs skip those that may lie elsewhere next time."""
    for tensor in tensors:
        torch._dynamo.mark_static_address(tensor)

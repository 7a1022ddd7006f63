"""The names under which models take and return a cache, read from signatures; what is no cache is refused.

A checkpoint with code of its own gets a copy of this file (`attnedit.targets.runtime.hf.remote`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, fx, nn
from transformers import Cache

from attnedit.compiler.compatibility.paged import PagedLayers, is_paged
from attnedit.compiler.errors import UsageError

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Of the arguments; a model that has several, for the sake of old callers, prefers the first."""


def cache_parameter(module: nn.Module) -> str | None:
    """Return the name of the argument through which a model, or a part of one, takes its cache.

    Args:
        module: anything with a forward. One that only passes keyword arguments on takes what its base class names, or
            what the one module that it wraps does (`torch.compile`, adapters).

    Returns:
        None where no signature names one.
    """
    return next((name for names in _signatures(module) for name in CACHE_NAMES if name in names), None)


def _signatures(module: nn.Module) -> Iterator[Mapping[str, inspect.Parameter]]:
    """Parameters of a module's forward, and of those that it overrides while it takes any keyword argument."""
    bases = [base for base in type(module).__mro__ if base is not nn.Module and "forward" in vars(base)]
    forwards = [module.forward, *(vars(base)["forward"] for base in bases)]
    for forward in forwards:
        parameters = inspect.signature(forward).parameters
        yield parameters
        if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
    inner = list(module.children())
    if len(inner) == 1:
        yield from _signatures(inner[0])


def with_cache(model: nn.Module, cache: Any) -> dict[str, Any]:
    """Return the keyword arguments that hand a cache to a model and have it filled.

    Raises:
        UsageError: the model takes none.
    """
    name = cache_parameter(model)
    if name is None:
        raise UsageError(
            f"{type(model).__name__} keeps no key-value cache: its forward has no argument {', '.join(CACHE_NAMES)}; "
            "give a causal language model that has one"
        )
    return {name: cache, "use_cache": True}


def given_cache(arguments: Mapping[str, Any]) -> Any:
    """Return the cache among keyword arguments of a model, or among what it returned; None where there is none."""
    found = (value for name, value in arguments.items() if name in CACHE_NAMES)
    return next((value for value in found if value is not None), None)


def append(cache: Any, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
    """Add what a layer caches [B, G, T, .] to its cache, and return everything that this holds for it.

    Raises:
        UsageError: the cache is static, and was made for other sizes than the layer's.
    """
    layers = getattr(cache, "layers", ())
    made = getattr(layers[layer_idx], "keys", None) if layer_idx < len(layers) else None
    if isinstance(made, Tensor) and made.dim() == 4 and made.shape[1::2] != keys.shape[1::2]:
        raise UsageError(
            f"layer {layer_idx} was given a cache for {made.shape[1]} heads of {made.shape[3]} values and caches "
            f"{keys.shape[1]} of {keys.shape[3]}; make it with the rewritten model's configuration, or leave its "
            "tensors to the first forward (no early_initialization)"
        )
    result: tuple[Tensor, Tensor] = cache.update(keys, values, layer_idx)
    return result


def known_cache(cache: Any, others: Mapping[str, Any] | None = None) -> Any:
    """Return the cache that a rewritten layer was given. A node of every rewritten graph.

    Returns:
        A `transformers.Cache`, None, or the pages of continuous batching (`PagedLayers`).

    Raises:
        UsageError: it is neither, or another cache is among the other arguments: left unread, either would have the
            layer attend to new tokens alone.
    """
    if isinstance(cache, fx.Proxy):  # unpickling a graph traces its code
        return cache.tracer.create_proxy(
            "call_function", known_cache, (cache, *(() if others is None else (others,))), {}
        )
    others = others or {}
    if cache is None:
        cache = next((value for value in others.values() if is_paged(value)), None)
    pages = is_paged(cache) and "read_index" in others
    if cache is not None and not pages and not (isinstance(cache, Cache) and hasattr(cache, "layers")):
        raise UsageError(
            f"a rewritten attention layer was given a {type(cache).__name__} as its cache and knows only "
            "transformers' Cache with layers (DynamicCache, StaticCache) and the pages of generate_batch"
        )
    for name, value in others.items():
        if value is not None and value is not cache and (name in CACHE_NAMES or isinstance(value, Cache)):
            raise UsageError(
                f"a rewritten attention layer was given a {type(value).__name__} as {name}, which it does not take "
                "its cache from; hand the model its cache by the name that its forward has, and only once"
            )
    return PagedLayers(cache, others) if pages else cache

"""Continuous batching of rewritten models: what transformers' paged cache has to hold, or why it cannot."""

from __future__ import annotations

import copy
from typing import Any

from torch import fx
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.paged import GROUPS, keeps_softcap, pages_by_index, passes_arguments_on
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.module import attention_modules

FULL, SLIDING = GROUPS


def paged_config(model: PreTrainedModel) -> Any:
    """Return the configuration by which a paged cache is made for a rewritten model.

    Where every layer's attention is new, a page has room for the largest number of values that one of them caches per
    token; else it is as large as for the source, and the new layers use as much of it as they need. Pages of a layer
    with kept sinks hold every token, as a ring of the last ones would drop them.

    Raises:
        UsageError: the model cannot be served so; with the reason.
    """
    config = copy.deepcopy(model.config.get_text_config())
    modules = [module for _, module in attention_modules(model)]
    new: dict[int, SiteConfig] = {module.config.layer_idx: module.config for module in modules}
    count: int = config.num_hidden_layers
    per_layer: list[str] | None = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    kinds = list(per_layer or [FULL if window is None else SLIDING] * count)
    if not pages_by_index():
        raise _refusal("this version of transformers makes its pages in another way (5.23 is known)")
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    if any(not list(attention_modules(graph)) for graph in graphs):
        raise _refusal("a rewrite of your own may cache anything")
    if closed := next((module for module in modules if not module.pages), None):
        raise _refusal(f"{type(closed).__name__} does not read pages")
    if unknown := sorted(set(kinds) - set(GROUPS)):
        raise _refusal(f"it has layers of {', '.join(unknown)}")
    if not passes_arguments_on(model):
        raise _refusal(f"{type(model).__name__} does not pass a paged cache on to its layers")
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if capped and len(new) < count and not keeps_softcap(model.config):
        raise _refusal("layers that keep the source's attention would lose its softcap in transformers' paged one")
    for layer, own in new.items():
        if getattr(own, "sink_tokens", 0):
            kinds[layer] = FULL
    if per_layer is None and len(set(kinds)) > 1:  # its forward knows one mask, for all layers
        if len(new) < count:
            raise _refusal("some layers keep the source's window, and others kept sinks outside it")
        kinds = [FULL] * count
    config.layer_types = kinds
    if SLIDING not in kinds:
        config.sliding_window = None
    if len(new) == count:
        config.num_key_value_heads = 1
        config.head_dim = max(-(-_values(own) // 2) for own in new.values())
    return config


def _values(config: SiteConfig) -> int:
    """Values that one layer caches per token."""
    if config.cached is None:
        raise _refusal(f"{type(config).__name__} does not say what it caches")
    heads, key, value = config.cached
    return heads * (key + value)


def _refusal(reason: str) -> UsageError:
    return UsageError(
        f"continuous batching (generate_batch) is not supported here: {reason}; "
        "use generate, with a batch of padded prompts"
    )

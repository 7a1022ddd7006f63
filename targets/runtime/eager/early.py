"""Static caches whose tensors are made before the first forward, as transformers' exportable modules want them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Cache

from attnedit.compiler.compatibility.live import before_early_initialization
from attnedit.targets.attention.kinds import config_from_dict, kind_of


def initialize_early(cache: Cache, config: Any, batch_size: int, dtype: torch.dtype, device: Any) -> None:
    """Make the tensors of a static cache's layers that a rewritten model has changed, before any token is seen."""
    for values in (getattr(config, "attnedit", None) or {"sites": {}})["sites"].values():
        site = config_from_dict(values)
        if (own_layer := kind_of(site).cache_layer) is not None:
            own_layer(cache, site)
        layer: Any = cache.layers[site.layer_idx]
        if site.cached is not None and not layer.is_initialized:
            heads, *widths = site.cached
            empty = (torch.zeros((batch_size, heads, 0, width), dtype=dtype, device=device) for width in widths)
            layer.lazy_initialization(*empty)


before_early_initialization(initialize_early)

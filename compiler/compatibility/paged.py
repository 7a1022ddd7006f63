"""transformers' paged cache, which continuous batching reads and writes: as rewritten layers use it.

Requests of different lengths stand one after another in one row, and attend to what pages hold of each. Its names are
transformers' own and change, so they stand here. A checkpoint with code of its own gets a copy of this file.

Shapes: T new tokens of all requests, S tokens that pages hold of them, G key/value heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.generation import continuous_batching

from attnedit.compiler.errors import UsageError

GROUPS = ("full_attention", "sliding_attention")
"""What layers may be for the paged cache: one that keeps every token, or the last of a window."""


class PagedLayers:
    """A paged cache in one forward, with what the forward says of its requests.

    A layer's values for a token go into its two rows of a page, of G values of one size each, whatever they are.

    Args:
        cache: a `PagedAttentionCache` of transformers.
        arguments: of the forward: where requests begin, which places of the pages are read and written.
    """

    def __init__(self, cache: Any, arguments: Mapping[str, Any]) -> None:
        self._cache, self._arguments = cache, arguments

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Write new tokens into their pages.

        Args:
            keys: [1, G or 1, T, any size], of any dtype.
            values: the same, of any size.
            layer_idx: whose pages.

        Returns:
            Keys and values of all that the requests may attend to [1, G or 1, S, .], in the dtypes given.

        Raises:
            UsageError: a page has no room for so many values, or its places are not given.
        """
        group = self._cache.layer_to_allocator[layer_idx]
        if self._arguments.get("block_table") is not None:
            raise UsageError(
                "continuous batching of a rewritten model reads pages by index: set max_blocks_per_request=0"
            )
        heads, size = group.num_key_value_heads, group.head_dim
        parts = [x[0].transpose(0, 1).flatten(1).to(group.cache_dtype) for x in (keys, values)]
        rows = torch.cat(parts, dim=-1)
        room = 2 * heads * size
        if rows.shape[-1] > room:
            raise UsageError(
                f"layer {layer_idx} caches {rows.shape[-1]} values per token, and a page has room for {room}; "
                "use generate, with a batch of padded prompts"
            )
        pages = F.pad(rows, (0, room - rows.shape[-1])).view(-1, 2, heads, size).permute(1, 2, 0, 3).unsqueeze(1)
        # It changes the arguments that it is given.
        read = self._cache.update(pages[0], pages[1], layer_idx, dict(self._arguments))
        rows = torch.stack([x[0] for x in read]).permute(2, 0, 1, 3).flatten(1)[:, : rows.shape[-1]]
        held = rows.split([part.shape[-1] for part in parts], dim=-1)
        found = [
            part.unflatten(1, (x.shape[1], x.shape[3])).transpose(0, 1).unsqueeze(0).to(x.dtype)
            for part, x in zip(held, (keys, values), strict=True)
        ]
        return found[0], found[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return S, the tokens that pages hold of all requests together, once the new ones are written."""
        group = self._cache.layer_to_allocator[layer_idx]
        read: int = self._arguments["read_index"][group.index].numel()
        new: int = self._arguments["write_index"][group.index].numel()
        return read or new

    def visible(self, layer_idx: int, window: int | None = None, sink_tokens: int = 0) -> Tensor:
        """Say which tokens each new one sees: those of its request up to itself.

        Args:
            layer_idx: whose pages.
            window: the last so many of them, itself included; None for all.
            sink_tokens: and the first so many.

        Returns:
            bool [1, 1, T, S]; a place that no request has sees nothing.

        Raises:
            UsageError: the pages drop tokens that are needed.
        """
        group = self._cache.layer_to_allocator[layer_idx]
        kept = getattr(group, "sliding_window", None)
        if kept is not None and (sink_tokens or window is None or window > kept):
            raise UsageError(
                f"layer {layer_idx} needs tokens that a paged cache of the last {kept} drops; "
                "use generate, with a batch of padded prompts"
            )
        new: Tensor = self._arguments["cu_seq_lens_q"]
        held: Tensor = self._arguments["cu_seq_lens_k"][group.layer_type]
        requests = new.shape[0] - 1
        own, before_end = _places(new, self._arguments["write_index"][group.index].numel())
        others, others_before_end = _places(held, self.get_seq_length(layer_idx))
        behind = others_before_end - before_end[:, None]
        seen = (others == own[:, None]) & (own < requests)[:, None] & (behind >= 0)
        if window is not None:
            near = behind < window
            if sink_tokens:
                first = held[others.clamp(max=requests)]
                place = torch.arange(others.shape[0], device=held.device)
                near = near | (place - first < sink_tokens)
            seen = seen & near
        return seen[None, None]


def _places(starts: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The request of each of so many places, from where requests start int [N + 1], and the places to its end."""
    place = torch.arange(count, device=starts.device, dtype=starts.dtype)
    request = torch.searchsorted(starts, place, right=True) - 1
    return request, starts[(request + 1).clamp(max=starts.shape[0] - 1)] - place


def is_paged(cache: Any) -> bool:
    """Whether something is a paged cache of the form that `PagedLayers` knows."""
    return isinstance(cache, continuous_batching.PagedAttentionCache) and hasattr(cache, "layer_to_allocator")


def pages_by_index() -> bool:
    """Whether this transformers has a paged cache of that form, and a manager whose pages can be sized."""
    manager = continuous_batching.ContinuousBatchingManager
    return hasattr(manager, "_create_batch_processor") and hasattr(
        continuous_batching.cache, "group_layers_by_attn_type"
    )


def passes_arguments_on(model: Any) -> bool:
    """Whether a model's class says that it hands its keyword arguments on to every attention module."""
    return bool(getattr(model, "_supports_attention_backend", False))


def keeps_softcap(config: Any) -> bool:
    """Whether transformers' attention over pages heeds a softcap: flash attention does, by itself."""
    return str(config._attn_implementation).startswith("flash")


def size_pages(manager: Any, config: Any) -> Any:
    """Have a manager of continuous batching make its pages by another configuration than the model's; return it.

    Args:
        manager: of transformers, as ``init_continuous_batching`` returns it.
        config: of a text model: heads and their size, and what layers are, decide what a page holds.
    """
    if "_create_batch_processor" in vars(manager):  # kept from an earlier session
        return manager
    create = manager._create_batch_processor
    # Kernels that read and write pages themselves know only keys and values.
    manager.continuous_batching_config.max_blocks_per_request = 0

    def created() -> Any:
        model = manager.model
        manager.model = SimpleNamespace(
            config=config,
            device=model.device,
            dtype=model.dtype,
            _supports_logits_to_keep=model._supports_logits_to_keep,
        )
        try:
            return create()
        finally:
            manager.model = model

    manager._create_batch_processor = created
    return manager

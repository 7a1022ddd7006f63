"""Gated sliding-window attention as a module that stands in place of the attention of a source layer, after rope.

Method: Attention Editing (arXiv 2604.05688), GateSWA; kept sink tokens as in StreamingLLM (arXiv 2309.17453), sink
logits as in gpt-oss, the output gate as in Gated Attention (arXiv 2505.06708).

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query and key size, dv value size, n sink slots,
D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from attnedit.compiler.compatibility.live import recorded_attention
from attnedit.compiler.compatibility.paged import PagedLayers
from attnedit.compiler.compatibility.torch_names import exporting
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.blocks import attend_in_blocks
from attnedit.targets.attention.gateswa.cache import GateSWALayer, Sinks
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.decode import ring_decode, ring_for_step, steps_fused
from attnedit.targets.attention.gateswa.dense import attend_densely
from attnedit.targets.attention.gateswa.documents import Documents
from attnedit.targets.attention.gateswa.layers import bounded_layer
from attnedit.targets.attention.gateswa.masks import by_query, last_columns, real_keys
from attnedit.targets.attention.gateswa.ring import RingLayer
from attnedit.targets.attention.gateswa.view import View
from attnedit.targets.attention.kernels import Virtual, as_virtual, kernel_for
from attnedit.targets.attention.module import AttentionModule
from attnedit.targets.attention.prefill import one_sink, prefill_attention, prefills_fused

__all__ = ["GateSWA", "GateSWAConfig"]

MIN_BLOCK, MAX_BLOCK = 64, 512
"""Queries of a prefill attend in blocks of one window, within these bounds: the work is linear in the length."""


class GateSWA(AttentionModule):
    """Sliding-window attention with kept sink tokens, a sink logit and an output gate, each of them optional.

    Query t of head h (key/value head g) sees the last ``sliding_window`` tokens, itself included, and the first
    ``sink_tokens`` real tokens of its document, less what the mask hides. With their logits l, and b and v_s of the
    virtual key::

        output = (sum e^l v + e^b v_s) / (sum e^l + e^b) * sigmoid(g_proj hidden)

    Weights:
        g_proj: Linear(D -> H or H dv); None where ``config.gate`` is "none". It starts at 0, where the gate is 1/2:
            with the weight of the output projection doubled (its bias not) that is the ungated layer.
        sink_logit: [H], b; None unless ``config.sink_logit``.
        sink_value: [G, dv], v_s; None (0) unless ``config.sink_value``.

    Args:
        config: the shape.
        device: where the weights are made.
        dtype: their dtype.

    Attributes:
        blocks: attend in blocks of queries. A tracer always gets one block, since its lengths may be symbolic.
    """

    config_class = GateSWAConfig
    pages = True
    config: GateSWAConfig

    g_proj: nn.Linear | None
    sink_logit: nn.Parameter | None
    sink_value: nn.Parameter | None

    def __init__(
        self, config: GateSWAConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config)
        self.blocks = True
        heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.v_head_dim
        out = heads * (size if config.gate == "element" else 1)
        self.g_proj = (
            nn.Linear(config.hidden_size, out, bias=config.gate_bias, device=device, dtype=dtype)
            if config.gate != "none"
            else None
        )
        self.sink_logit = nn.Parameter(torch.empty(heads, device=device, dtype=dtype)) if config.sink_logit else None
        self.sink_value = (
            nn.Parameter(torch.empty(groups, size, device=device, dtype=dtype)) if config.sink_value else None
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set every weight to 0."""
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def bind_cache(self, cache: Cache) -> None:
        """Give the cache the bounded layer of this window in place of an empty one."""
        bounded_layer(cache, self.config)

    def extra_repr(self) -> str:
        """Name what defines the cache and the form."""
        config = self.config
        return f"sliding_window={config.sliding_window}, sink_tokens={config.sink_tokens}, gate={config.gate!r}"

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, H, T, d], rotated.
            key: [B, G, T, d], rotated.
            value: [B, G, T, dv].
            hidden: [B, T, D], read by the gate only.
            attention_mask: None (causal), bool [B, 1 or H, T, >= S] with True where to attend, the same in floats to
                add to the logits, or a padding mask [B, >= S] of the new and cached tokens. It need not know of the
                window. Where ``config.source_window`` is None it covers every token so far.
            past_key_values: a transformers cache. An empty dynamic layer in it gives way to a bounded one
                (`attnedit.targets.attention.gateswa.cache`); any other keeps what it keeps, and is masked. Or its
                pages, which say what is seen in place of the mask.
            sinks: [H], the source's own sink logits, where ``config.sinks``.

        Returns:
            [B, T, H, dv] in the dtype of ``query``. A query that may attend to nothing gets finite numbers.

        Raises:
            UsageError: gate or sinks lack their input, the mask has none of these forms, or the cache has dropped
                tokens that are needed.
        """
        config = self.config
        if config.sinks != (sinks is not None):
            given = "were" if config.sinks is False else "were not"
            raise UsageError(f"layer {config.layer_idx}: config.sinks is {config.sinks}, but sinks {given} given")
        if isinstance(past_key_values, PagedLayers):
            out = self._attend_pages(query, key, value, past_key_values, sinks)
        elif (ring := ring_for_step(query, attention_mask, past_key_values, config)) is not None:
            learning = [x for x in (key, value, sinks, *self.parameters()) if x is not None]
            if not (self.training and self.attention_dropout) and steps_fused(query, ring, config, learning):
                return self._step_in_kernel(query, key, value, hidden, ring, sinks)
            keys, values, seen = ring.step(key, value)
            out = self._attend_block(query, keys, values, seen[None, None, None], sinks)
        else:
            out = self._attend(query, self._view(key, value, attention_mask, past_key_values), sinks)
        if self.g_proj is None:
            return out
        opened = torch.sigmoid(self.g_proj(self._gated_by(hidden)))
        gate: Tensor = opened.unflatten(-1, (config.num_attention_heads, -1))
        return out * gate.to(out.dtype)

    def _view(self, key: Tensor, value: Tensor, attention_mask: Tensor | None, cache: Any) -> View:
        """Add the new tokens [B, G, T, .] to the cache, and say what they attend to."""
        mask = by_query(attention_mask, key.shape[2], self.config.layer_idx)
        layer = None if cache is None else bounded_layer(cache, self.config)
        if layer is None:
            return self._all_keys(key, value, mask, key.shape[2], cache)
        if isinstance(layer, RingLayer):
            return self._ring_keys(key, value, mask, cache, layer)
        return self._bounded_keys(key, value, mask, cache, layer)

    def _step_in_kernel(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None, ring: RingLayer, sinks: Tensor | None
    ) -> Tensor:
        """Attend with one token, its gate included, to a ring that it goes into."""
        keys, values = ring.tensors(key, value)
        gate = None if self.g_proj is None else self.g_proj(self._gated_by(hidden))
        sink = self.sink_logit, self.sink_value
        out = ring_decode(query, key, value, (keys, values), ring.cumulative_length, self.config, sinks, sink, gate)
        ring.cumulative_length.add_(1)
        return out

    def _gated_by(self, hidden: Tensor | None) -> Tensor:
        if hidden is None:
            raise UsageError(f"layer {self.config.layer_idx}: the gate reads hidden states, got None")
        return hidden

    def _attend_pages(
        self, query: Tensor, key: Tensor, value: Tensor, pages: PagedLayers, sinks: Tensor | None
    ) -> Tensor:
        """Attend with the new tokens of several requests in one row, to what pages hold of each."""
        config = self.config
        mask = pages.visible(config.layer_idx, config.sliding_window, config.sink_tokens)
        keys, values = pages.update(key, value, config.layer_idx)
        blocks = zip(query.split(MAX_BLOCK, dim=2), mask.split(MAX_BLOCK, dim=2), strict=True)
        return torch.cat([self._attend_block(part, keys, values, rows, sinks) for part, rows in blocks], dim=1)

    def _bounded_keys(self, key: Tensor, value: Tensor, mask: Tensor | None, cache: Any, layer: GateSWALayer) -> View:
        """Put the new tokens into the bounded layer of the cache; key [B, G, T, d], mask [B, 1 or H, T, M]."""
        config, length, past = self.config, key.shape[2], layer.get_seq_length()
        real = None if mask is None else real_keys(mask[..., -length:])
        keys, values = cache.update(key, value, config.layer_idx, real=real)
        slots = layer.slot_positions()
        columns = keys.shape[2] - slots.shape[1]
        near = None if mask is None else last_columns(mask, columns, config.layer_idx)
        # A mask as narrow as the source's own window says nothing of the slots.
        far = mask if mask is not None and mask.shape[-1] == past + length else None
        position = torch.arange(past + length - columns, past + length, device=keys.device)
        return View(keys, values, slots, position, past, columns - length, near, far)

    def _ring_keys(self, key: Tensor, value: Tensor, mask: Tensor | None, cache: Any, layer: RingLayer) -> View:
        """Put the new tokens into the ring of a static cache; no number is read off a tensor."""
        length = key.shape[2]
        past = layer.get_seq_length() + torch.zeros((), dtype=torch.long, device=key.device)  # it changes in place
        seen = None if mask is None else real_keys(mask)
        real = None if seen is None else seen.index_select(-1, past + torch.arange(length, device=key.device))
        held = layer.slot_positions(key, seen, past)
        keys, values = cache.update(key, value, self.config.layer_idx, real=real, held=held)
        slots, columns = layer.slot_positions(key, seen, past + length), layer.column_positions(length)
        return View(keys, values, slots, columns, past, columns.shape[0] - length, mask, mask, by_position=True)

    def _all_keys(self, key: Tensor, value: Tensor, mask: Tensor | None, length: int, cache: Any) -> View:
        """Take all keys of a cache that drops none (or of no cache); the sinks are found anew among them."""
        config = self.config
        past: int | Tensor = 0
        if cache is not None:
            seen = cache.get_seq_length(config.layer_idx)
            fixed = isinstance(seen, Tensor) and exporting()  # it changes in place, and is not read
            seen = seen.clone() if fixed else int(seen)
            key, value = cache.update(key, value, config.layer_idx)
            # Static caches return more keys than there are, and start at 0; sliding ones have dropped old ones.
            past = seen if fixed else min(seen, key.shape[2] - length)
            dropped = not fixed and seen > past
            hidden_sinks = dropped or ((fixed or seen > 0) and config.source_window is not None)
            if config.sink_tokens and hidden_sinks:
                raise UsageError(
                    f"layer {config.layer_idx}: {type(cache).__name__} does not keep the sink tokens; "
                    "use a DynamicCache that was empty at first"
                )
        before = past if isinstance(past, int) else 0  # for blocks of queries, which no compiler sees
        if mask is not None:
            mask = last_columns(mask, key.shape[2], config.layer_idx, longer_cache=cache is not None)
        real = None if mask is None else real_keys(mask)
        position = torch.arange(key.shape[2], device=key.device)
        if mask is not None and real is not None and self._may_hold_documents(mask, length, cache):
            documents = Documents.of(mask, real.expand(mask.shape[0], -1), config.sink_tokens)
            if torch.compiler.is_compiling():  # how many there are is not to be read
                slots = position.new_zeros((key.shape[0], 0))
                return View(key, value, slots, position, past, before, mask, mask, documents=documents)
            if documents.several():
                slots = documents.slots().expand(key.shape[0], -1)
                keys, values = (torch.cat((_at(x, slots), x), dim=2) for x in (key, value))
                return View(keys, values, slots, position, past, before, mask, mask, documents=documents)
        sinks = Sinks.empty(key, value, config.sink_tokens).extended(key, value, real, 0)
        keys, values = torch.cat((sinks.keys, key), dim=2), torch.cat((sinks.values, value), dim=2)
        return View(keys, values, sinks.positions, position, past, before, mask, mask)

    def _may_hold_documents(self, mask: Tensor, length: int, cache: Any) -> bool:
        """Whether rows of tokens may be packed documents: transformers tells them apart where nothing is cached."""
        square = cache is None and length > 1 and mask.shape[-2] == mask.shape[-1]
        return bool(self.config.sink_tokens) and square and not exporting()

    def _attend(self, query: Tensor, view: View, sinks: Tensor | None) -> Tensor:
        """Attend in blocks of queries [B, H, T, d], each to the slots and the columns that some of them sees."""
        length, slots = query.shape[2], view.slots.shape[1]
        columns = view.keys.shape[2] - slots
        window = self.config.sliding_window
        size = min(max(window, MIN_BLOCK), MAX_BLOCK)
        recorded = recorded_attention()
        if length > 1 and recorded is None and self._fuses(query, view):
            learning = (view.keys, view.values, *self.parameters())
            if prefills_fused(query, learning, (query.shape[-1], view.values.shape[-1])):
                return self._attend_in_kernel(query, view, sinks)
            if length > size:
                return attend_in_blocks(query, view, self.config, self._virtual(sinks), size)
        if recorded is not None or not self.blocks or torch.compiler.is_compiling():
            mask = view.mask(self.config, 0, length, 0, columns)
            return self._attend_block(query, view.keys, view.values, mask, sinks, None if recorded is None else view)
        out = []
        for first in range(0, length, size):
            last = min(first + size, length)
            low = max(0, view.before + first - window + 1)
            high = min(columns, view.before + last)
            keys, values = (_cut(x, slots, low, high) for x in (view.keys, view.values))
            mask = view.mask(self.config, first, last, low, high)
            out.append(self._attend_block(query[:, :, first:last], keys, values, mask, sinks))
        return out[0] if len(out) == 1 else torch.cat(out, dim=1)

    def _fuses(self, query: Tensor, view: View) -> bool:
        """Whether all blocks go through one fused kernel: nothing but the window and the sinks says what is seen."""
        plain = view.near is None and view.far is None and view.documents is None and self.config.softcap is None
        dropout = self.training and self.attention_dropout
        traced = not self.blocks or exporting()
        return plain and not dropout and not traced and kernel_for(query) is None

    def _attend_in_kernel(self, query: Tensor, view: View, sinks: Tensor | None) -> Tensor:
        """Attend with all queries to a view without masks through the kernel of windows."""
        config, past = self.config, view.past
        if not isinstance(past, Tensor):
            past = torch.full((), past, dtype=torch.long, device=query.device)
        return prefill_attention(
            query,
            view.keys,
            view.values,
            past,
            view.before,
            config.scale,
            window=config.sliding_window,
            slots=view.slots,
            sink=one_sink(self._virtual(sinks), query.shape[1]),
        )

    def _virtual(self, sinks: Tensor | None) -> Virtual:
        return as_virtual(sinks, self.sink_logit, self.sink_value)

    def _attend_block(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        mask: Tensor,
        sinks: Tensor | None,
        recorded: View | None = None,
    ) -> Tensor:
        """Attend with queries [B, H, t, d] to keys [B, G, S, d] under a mask; returns [B, t, H, dv].

        Weights are recorded where `recorded` says of which tokens the keys are.
        """
        dropout = self.attention_dropout if self.training else 0.0
        return attend_densely(query, keys, values, mask, self.config, self._virtual(sinks), dropout, recorded)


def _at(x: Tensor, positions: Tensor) -> Tensor:
    """Take positions [B, m] of [B, G, T, .]; anything where they are none."""
    index = positions.clamp(max=x.shape[2] - 1)[:, None, :, None]
    return x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3]))


def _cut(x: Tensor, slots: int, low: int, high: int) -> Tensor:
    """Return slots and columns low..high of [B, G, n + C, .]."""
    if low == 0 and slots + high == x.shape[2]:
        return x
    columns = x[:, :, slots + low : slots + high]
    return torch.cat((x[:, :, :slots], columns), dim=2) if slots else columns

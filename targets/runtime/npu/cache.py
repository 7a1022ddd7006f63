"""Caches of lowered graphs: paged buffers and rings, written in place, and where the tokens of a call stand.

Rows are packed: a row's real tokens are at positions 0, 1, .. whatever its padding was, so that neither kernels nor
masks know of padding on the left. Shorter rows of a prompt are filled up on the right; what those tokens leave in a
cache lies behind the row's length, and is overwritten before it is read.

Shapes: B batch, T new tokens, M blocks per row, G cached heads, W window, n sink tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from attnedit.targets.runtime.npu.legalise import LayerPlan
from attnedit.targets.runtime.npu.limits import BLOCK

ops = torch.ops.npu


@dataclass(frozen=True)
class Step:
    """The new tokens of a call.

    Attributes:
        prefill: whether rows are empty before.
        lengths: real tokens of each row, new ones included, int64 [B].
        counts: the same as numbers, for kernels that want them; only in decode.
        positions: of the new tokens, int64 [B or 1, T].
        slots: where they go in paged buffers, int32 [B T].
        table: blocks of each row, int32 [B, M].
        triangle: the mask that stands for causal ones of any length, bool [2048, 2048], True above the diagonal.
    """

    prefill: bool
    lengths: Tensor
    counts: Sequence[Any]
    positions: Tensor
    slots: Tensor
    table: Tensor
    triangle: Tensor

    @classmethod
    def of_prompt(cls, ids: Tensor, lengths: Tensor, table: Tensor, triangle: Tensor) -> Step:
        """Describe a first call with tokens [B, T]."""
        positions = torch.arange(ids.shape[1])[None]
        return cls(True, lengths, (), positions, _slots(positions.expand_as(ids), table), table, triangle)

    @classmethod
    def of_token(cls, lengths: Tensor, counts: Sequence[Any], table: Tensor, triangle: Tensor) -> Step:
        """Describe a call with one token per row."""
        positions = (lengths - 1)[:, None]
        return cls(False, lengths, counts, positions, _slots(positions, table), table, triangle)


def _slots(positions: Tensor, table: Tensor) -> Tensor:
    """Places in paged buffers of tokens at positions [B, T], int32 [B T]."""
    block = table.gather(1, positions // BLOCK)
    return (block * BLOCK + positions % BLOCK).to(torch.int32).flatten()


_call: ContextVar[tuple[Step, Cache]] = ContextVar("attnedit_npu_call")


@contextmanager
def calling(step: Step, cache: Cache) -> Iterator[None]:
    """Make these what `current_step` and `current_cache` return inside the block."""
    token = _call.set((step, cache))
    try:
        yield
    finally:
        _call.reset(token)


def current_step() -> Step:
    """Return the step of the call that is being traced."""
    return _call.get()[0]


def current_cache() -> Any:
    """Return the cache of the call that is being traced."""
    return _call.get()[1]


class NpuLayer(CacheLayerMixin):
    """One layer: its buffers, shaped as `LayerPlan.caches` says, and how they are written."""

    is_sliding = False

    def __init__(self, plan: LayerPlan, buffers: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.buffers = plan, tuple(buffers)
        self.keys = self.values = None
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the buffers are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return new tokens as they are: attention writes them, and knows how to read what was there.

        A layer that holds something else than attention reads is the exception: it is written here, and in decode
        everything held is returned, [B, G, M * block, .].
        """
        if self.plan.surveyed.form not in ("held", "traced"):
            return key_states, value_states
        empty = not value_states.shape[-1]  # no buffer holds that
        self.write_pages(*((key_states,) if empty else (key_states, value_states)))
        if current_step().prefill:
            return key_states, value_states
        keys = self.all_rows(0)
        return keys, keys.new_zeros(*keys.shape[:3], 0) if empty else self.all_rows(1)

    def write_pages(self, *parts: Tensor) -> None:
        """Write new tokens [B, G, T, .] into the paged buffers."""
        step = current_step()
        rows = [
            F.pad(part, (0, buffer.shape[-1] - part.shape[-1])).transpose(1, 2).flatten(0, 1).contiguous()
            for part, buffer in zip(parts, self.buffers, strict=True)
        ]
        if not self.plan.decode.fused:
            for row, buffer in zip(rows, self.buffers, strict=True):
                buffer.view(-1, *buffer.shape[2:]).index_copy_(0, step.slots.long(), row)
        elif len(rows) == 1:
            flat = self.buffers[0].view(-1, *self.buffers[0].shape[2:])
            ops.npu_scatter_nd_update_(flat, step.slots[:, None], rows[0])
        else:
            ops.npu_scatter_pa_kv_cache(*rows, *self.buffers, step.slots, cache_mode="Norm")

    def pages(self, part: int) -> Tensor:
        """A paged buffer as fused attention reads it, [blocks, block, G * size]."""
        return self.buffers[part].flatten(2)

    def all_rows(self, part: int) -> Tensor:
        """Everything in a paged buffer, by row, [B, G, M * block, .]."""
        return self.buffers[part][current_step().table.long()].flatten(1, 2).transpose(1, 2)

    def write_ring(self, *parts: Tensor) -> None:
        """Write new tokens [B, G, T, .] into the sinks' slots and the ring of the window."""
        step, surveyed = current_step(), self.plan.surveyed
        window, sinks = int(surveyed.window or 0), surveyed.sink_tokens
        for part, buffer in zip(parts, self.buffers, strict=True):
            new = F.pad(part, (0, buffer.shape[-1] - part.shape[-1]))
            if step.prefill:
                # Place p % W of the ring takes the row's last token p of that place; anything where there is none.
                last = step.lengths[:, None] - 1
                source = last - (last - torch.arange(window)) % window
                source = torch.cat((torch.arange(sinks).expand(len(source), -1), source), dim=1)
                source = source.clamp(min=0).clamp(max=new.shape[2] - 1)
                index = source[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
                buffer.copy_(new.gather(2, index))
                continue
            position = step.positions[:, 0]
            places = [sinks + position % window]
            if sinks:
                # One of the first tokens goes to its own slot too.
                places.append(torch.where(position < sinks, position, places[0]))
            for place in places:
                self._put(buffer, place, new)

    def _put(self, buffer: Tensor, place: Tensor, new: Tensor) -> None:
        if self.plan.decode.fused:
            ops.scatter_update_(buffer, place, new.contiguous(), -2)
        else:
            buffer.scatter_(2, place[:, None, None, None].expand_as(new), new)

    def ring_visible(self) -> Tensor:
        """Which places a decoding token sees, bool [B, 1, 1, n + W]."""
        surveyed, position = self.plan.surveyed, current_step().positions
        window = int(surveyed.window or 0)
        # Place j holds the last token so far of that place.
        visible = position - (position - torch.arange(window)) % window >= 0
        if surveyed.sink_tokens:
            # A sink inside the window is in the ring, so its own slot shows only once it has left.
            visible = torch.cat((position - torch.arange(surveyed.sink_tokens) >= window, visible), dim=1)
        return visible[:, None, None]

    def get_seq_length(self) -> int:
        """Return 0: positions are given with every call."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the new tokens alone: masks are not made of this."""
        return query_length, 0

    def get_max_length(self) -> int:
        """Return -1: no bound."""
        return -1


def npu_cache(plans: Sequence[LayerPlan], buffers: dict[str, Tensor]) -> Cache:
    """Make a transformers cache over buffers by name."""
    layers: list[Any] = []
    for plan in plans:
        prefix = f"past.{plan.surveyed.layer}."
        layers.append(NpuLayer(plan, [buffer for name, buffer in buffers.items() if name.startswith(prefix)]))
    return Cache(layers=layers)

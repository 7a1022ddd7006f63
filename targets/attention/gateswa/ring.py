"""The bounded cache of sliding-window attention in tensors of fixed size, for `torch.compile` and CUDA graphs.

What a step may read or branch on are shapes: lengths and positions are tensors, and every write is in place. Keys,
values and a length are all that is kept, as in every static layer: exported programs hold the layer in their buffers,
and begin anew by setting the length. To the masks of transformers the layer looks like one of full attention, as
`GateSWALayer` does.

Shapes: B batch, G key/value heads, T new tokens, W window, n sink slots, d key size, dv value size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from attnedit.compiler.compatibility.live import keep_in_place
from attnedit.targets.attention.gateswa.cache import Sinks
from attnedit.targets.attention.gateswa.documents import EMPTY


class RingLayer(StaticLayer):
    """One layer of a static cache that holds n kept sinks and, in a ring, the last W tokens of each sequence.

    `keys` and `values` are [B, G, n + W, .]: the sink slots, then the ring, in which the token at position p has slot
    ``p % W``.

    Args:
        max_cache_len: tokens that the cache's other layers hold; masks are that wide.
        sliding_window: W, tokens each query sees, itself included.
        sink_tokens: n, kept sink tokens.
    """

    def __init__(self, max_cache_len: int, sliding_window: int, sink_tokens: int = 0) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.window = sliding_window
        self.sink_tokens = sink_tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the tensors for keys and values like the given ones [B, G, T, .]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        batch, groups, count = *key_states.shape[:2], self.sink_tokens
        self.keys, self.values = (
            x.new_zeros((batch, groups, count + self.window, x.shape[-1])) for x in (key_states, value_states)
        )
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():
            keep_in_place(self.keys, self.values, self.cumulative_length)
        self.is_initialized = True

    def tensors(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they lie in the ring, made like new ones [B, G, T, .] where there are none yet."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.keys is None or self.values is None:
            raise AssertionError("an initialised layer has tensors")
        return self.keys, self.values

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        real: Tensor | None = None,
        held: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens, and return what they may attend to.

        Args:
            key_states: [B, G, T, d].
            value_states: [B, G, T, dv].
            *args: not used.
            real: bool [B, T] or [1, T], False for padding; None where all are real.
            held: positions of the sinks before, of `slot_positions`; needed where there are slots.
            **kwargs: not used.

        Returns:
            Keys and values: the sink slots, then the tokens of `column_positions`.
        """
        keys, values = ring = self.tensors(key_states, value_states)
        count, length, past = self.sink_tokens, key_states.shape[2], self.cumulative_length
        if count:
            if held is None:
                raise AssertionError("what the sink slots hold is read off the mask")
            before = Sinks(keys[:, :, :count], values[:, :, :count], held)
            sinks = before.extended(key_states, value_states, real, past)
            before.keys.copy_(sinks.keys)
            before.values.copy_(sinks.values)
        if length > 1:
            columns = count + (past + torch.arange(1 - self.window, 0, device=self.device)) % self.window
            keys, values = (
                torch.cat((x[:, :, :count], x.index_select(2, columns), new), dim=2)
                for x, new in ((keys, key_states), (values, value_states))
            )
        kept = min(length, self.window)
        slots = count + (past + torch.arange(length - kept, length, device=self.device)) % self.window
        for x, new in zip(ring, (key_states, value_states), strict=True):
            x.index_copy_(2, slots, new[:, :, length - kept :])
        self.cumulative_length.add_(length)
        return keys, values

    def step(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Add one token where none is padding, in a third of the operations that `update` and its positions take.

        The sinks are then the first n tokens: token p < n goes into a slot besides its place in the ring. Slot j shows
        once its token has left the window, at position j + W, and place i of the ring from position i on.

        Args:
            key_states: [B, G, 1, d].
            value_states: [B, G, 1, dv].

        Returns:
            Keys and values, the sink slots first, and which of them the token sees, bool [n + W].
        """
        ring = self.tensors(key_states, value_states)
        count, past = self.sink_tokens, self.cumulative_length
        begins = torch.arange(self.window, device=self.device)
        places = (past % self.window + count).view(1)
        if count:
            begins = torch.cat((torch.arange(self.window, self.window + count, device=self.device), begins))
            places = torch.cat((torch.where(past < count, past.view(1), places), places))
        seen = begins <= past
        for held, new in zip(ring, (key_states, value_states), strict=True):
            held.index_copy_(2, places, new.expand(-1, -1, len(places), -1))
        self.cumulative_length.add_(1)
        return *ring, seen

    def column_positions(self, length: int) -> Tensor:
        """Positions of what the last update returned after the sink slots, `EMPTY` where nothing is.

        Args:
            length: T of that update.

        Returns:
            int64 [W], as they lie in the ring, for one new token; [W - 1 + T], ascending, for more.
        """
        newest = self.cumulative_length - 1
        if length == 1:
            position = newest - (newest - torch.arange(self.window, device=self.device)) % self.window
        else:
            position = newest + torch.arange(2 - self.window - length, 1, device=self.device)
        return torch.where(position < 0, EMPTY, position)

    def slot_positions(self, new: Tensor, real: Tensor | None, stop: int | Tensor) -> Tensor:
        """Positions of the kept sinks before position `stop`: the first n real tokens of each row.

        Args:
            new: keys of the tokens that come in, [B, G, T, d].
            real: bool [B or 1, S], False for padding, S at least `stop`; None where all are real.
            stop: tokens so far.

        Returns:
            int64 [B, n]; `EMPTY` for a slot without token.
        """
        batch, device = new.shape[0], new.device
        wanted = torch.arange(self.sink_tokens, device=device)
        if real is None:
            return torch.where(wanted < stop, wanted, EMPTY).expand(batch, -1)
        real = real & (torch.arange(real.shape[-1], device=device) < stop)
        chosen = (real.cumsum(-1)[:, None] == wanted[:, None] + 1) & real[:, None]
        return torch.where(chosen.any(-1), chosen.to(torch.int32).argmax(-1), EMPTY).expand(batch, -1)

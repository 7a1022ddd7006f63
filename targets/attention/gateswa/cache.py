"""The bounded cache of sliding-window attention: recent tokens and kept sinks, as a layer of a transformers cache.

To the masks of transformers the layer looks like one of full attention: it reports every token it has seen. So the
masks of the other layers stay as they are, whichever layer they are sized by, and the one that arrives here shows
padding and custom patterns at every position. Which of those positions are still at hand is known to `GateSWA` alone.

Shapes: B batch, G key/value heads, T new tokens, R recent tokens, n sink slots, d key size, dv value size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.documents import EMPTY


@dataclass(frozen=True)
class Sinks:
    """The first real tokens of each sequence, kept outside the window.

    Attributes:
        keys: [B, G, n, d]; anything where the slot is empty.
        values: [B, G, n, dv].
        positions: int64 [B, n], positions in the padded sequence, ascending; `EMPTY` for a slot without token.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    @classmethod
    def empty(cls, key: Tensor, value: Tensor, count: int) -> Sinks:
        """Make `count` slots without tokens, for keys and values like `key` and `value` [B, G, T, .]."""
        batch, groups = key.shape[:2]
        return cls(
            key.new_zeros((batch, groups, count, key.shape[-1])),
            value.new_zeros((batch, groups, count, value.shape[-1])),
            torch.full((batch, count), EMPTY, dtype=torch.long, device=key.device),
        )

    def extended(self, key: Tensor, value: Tensor, real: Tensor | None, start: int | Tensor) -> Sinks:
        """Fill empty slots with the first real ones of new tokens.

        Args:
            key: [B, G, T, d].
            value: [B, G, T, dv].
            real: bool [B, T] or [1, T], False for padding; None where all are real.
            start: position of the first of them.
        """
        batch, count = self.positions.shape
        if not count:
            return self
        length = key.shape[2]
        position = torch.arange(length, device=key.device) + start
        fresh = position if real is None else torch.where(real, position, EMPTY)
        position = torch.cat((self.positions, fresh.expand(batch, length)), dim=1)
        filled = position != EMPTY
        # The slot that each candidate would have; slot j takes the first candidate of rank j.
        rank = filled.cumsum(1) - 1
        wanted = torch.arange(count, device=key.device)[:, None]
        chosen = (rank[:, None] == wanted) & filled[:, None]
        index = chosen.to(torch.int32).argmax(-1)
        positions = torch.where(chosen.any(-1), position.gather(1, index), EMPTY)
        return Sinks(_pick(self.keys, key, index), _pick(self.values, value, index), positions)

    def before(self, position: int) -> Sinks:
        """Copy, with the slots of tokens at `position` and later empty."""
        positions = torch.where(self.positions < position, self.positions, EMPTY)
        return Sinks(self.keys.clone(), self.values.clone(), positions)

    def select(self, rows: Tensor) -> Sinks:
        """Take these rows of the batch (int64 or bool [B])."""
        rows = rows.to(self.keys.device)
        return Sinks(self.keys[rows], self.values[rows], self.positions[rows])

    def complete(self) -> bool:
        """Whether no slot is empty."""
        return bool((self.positions != EMPTY).all())


class GateSWALayer(DynamicLayer):
    """One layer of a transformers cache that holds at most ``sliding_window + sink_tokens`` tokens per sequence.

    `keys` and `values` hold the last ``sliding_window - 1`` tokens or fewer, which is what the next token needs beside
    itself; more only while the past is recorded (`activate_past_recording`), until the next `crop`.

    Args:
        sliding_window: W, tokens each query sees, itself included.
        sink_tokens: n, kept sink tokens.

    Attributes:
        sinks: the kept sinks; None before the first update.
        max_tokens: ``sliding_window + sink_tokens``.
    """

    is_sliding = False  # see the module's first lines
    is_croppable = True

    def __init__(self, sliding_window: int, sink_tokens: int = 0) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.window = sliding_window
        self.sink_tokens = sink_tokens
        self.max_tokens = sliding_window + sink_tokens
        self.cumulative_length = 0
        self.record_past = False
        self.sinks: Sinks | None = None
        self._complete = False

    def activate_past_recording(self) -> None:
        """Drop nothing from now on until `crop` is called, so that `crop` can bring any of it back."""
        self.record_past = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make empty tensors like the first keys and values."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.sinks = Sinks.empty(key_states, value_states, self.sink_tokens)
        self._complete = False
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, real: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add new tokens, and return what they may attend to.

        Args:
            key_states: [B, G, T, d].
            value_states: [B, G, T, dv].
            *args: not used.
            real: bool [B, T] or [1, T], False for padding; None where all are real.
            **kwargs: not used.

        Returns:
            Keys and values [B, G, n + R + T, .]: all sink slots (`sinks.positions` says which hold tokens), the
            ``R = min(past, sliding_window - 1)`` tokens before the new ones, the new ones.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.sinks is None or self.keys is None or self.values is None:
            raise AssertionError("an initialised layer has tensors")
        if not self._complete:
            self.sinks = self.sinks.extended(key_states, value_states, real, self.cumulative_length)
            self._complete = self.sinks.complete()
        recent = min(self.cumulative_length, self.window - 1)
        self.cumulative_length += key_states.shape[2]
        keep = min(self.cumulative_length, self.window - 1)
        sinks = self.sinks
        keys = torch.cat((sinks.keys, _last(self.keys, recent), key_states), dim=2)
        values = torch.cat((sinks.values, _last(self.values, recent), value_states), dim=2)
        if self.record_past:
            self.keys = torch.cat((self.keys, key_states), dim=2)
            self.values = torch.cat((self.values, value_states), dim=2)
        elif key_states.shape[2] == 1:
            # Views on what is returned, which has no more slots than the bound: no copy.
            self.keys, self.values = _last(keys, keep), _last(values, keep)
            count = self.sink_tokens
            self.sinks = Sinks(keys[:, :, :count], values[:, :, :count], sinks.positions)
        else:
            # Views would keep a long prefill alive.
            self.keys, self.values = _last(keys, keep).clone(), _last(values, keep).clone()
            self.sinks = sinks.before(self.cumulative_length)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens, exactly; afterwards only what the next token needs is held.

        Args:
            tokens_to_remove: how many, as a number not above 0.

        Raises:
            UsageError: the number is positive, or tokens that left the window are needed again and were not recorded.
        """
        if tokens_to_remove > 0:
            raise UsageError(f"crop takes minus the number of tokens to remove, got {tokens_to_remove}")
        if not self.is_initialized or self.sinks is None or self.keys is None or self.values is None:
            return
        length = max(0, self.cumulative_length + tokens_to_remove)
        held = self.keys.shape[2] + tokens_to_remove
        needed = min(length, self.window - 1)
        if held < needed:
            raise UsageError(
                f"cannot crop {-tokens_to_remove} of {self.cumulative_length} tokens: of those before, "
                f"{max(0, held)} are still there and a window of {self.window} needs {needed}; "
                "call activate_past_recording on the cache before the forward that is to be undone"
            )
        if self.keys.shape[2] > needed:
            self.keys, self.values = (x[:, :, held - needed : held].clone() for x in (self.keys, self.values))
        self.cumulative_length = length
        self.sinks = self.sinks.before(length)
        self._complete = self.sinks.complete()

    def slot_positions(self) -> Tensor:
        """Positions of the kept sinks, int64 [B, n]; `EMPTY` for a slot without token."""
        if self.sinks is None:
            raise AssertionError("slots are made by the first update")
        return self.sinks.positions

    def get_seq_length(self) -> int:
        """Return the number of tokens seen."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return length and offset for the mask: every token ever seen, as for full attention."""
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """Return the most tokens this layer holds."""
        return self.max_tokens

    def reset(self) -> None:
        """Forget everything."""
        self.keys = self.values = self.sinks = None
        self.is_initialized = False
        self.cumulative_length = 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take these rows of the batch (int64 [B]), for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch `repeats` times."""
        if self.keys is not None:
            rows = torch.arange(self.keys.shape[0], device=self.keys.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take these rows of the batch (int64 or bool [B])."""
        if self.sinks is not None and self.keys is not None and self.values is not None:
            self.keys, self.values = (x[indices.to(x.device)] for x in (self.keys, self.values))
            self.sinks = self.sinks.select(indices)


def _pick(old: Tensor, new: Tensor, index: Tensor) -> Tensor:
    """Gather from [B, G, n, d] followed by [B, G, T, d] what index [B, n] names."""
    return torch.cat((old, new), dim=2).gather(2, index[:, None, :, None].expand_as(old))


def _last(x: Tensor, count: int) -> Tensor:
    """Return the last `count` of [B, G, T, d]."""
    return x.narrow(2, x.shape[2] - count, count)

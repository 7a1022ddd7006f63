"""What the queries of one call of gated sliding-window attention attend to.

Shapes: B batch, T new tokens, S tokens so far, C columns, H heads, G key/value heads, n sink slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnedit.compiler.graph.masks import hidden_value
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.documents import Documents


@dataclass(frozen=True)
class View:
    """What the queries of one call attend to.

    Attributes:
        keys: [B, G, n + C, d], slots first, then columns: neighbouring positions in order.
        values: [B, G, n + C, dv].
        slots: positions of the sink slots, int64 [B, n].
        columns: positions of the columns, int64 [C]; ascending and without gaps where there are several queries.
        past: position of the first query; a tensor where it is not to be read.
        before: columns before that of the first query.
        near: the given mask at the columns, [B, 1 or H, T, C]; like `far` if `by_position`.
        far: the given mask by position, [B, 1 or H, T, past + T or more]; None where it does not reach back so far.
        by_position: `near` has a column per position.
        documents: packed into each row, of which every one has slots of its own; without slots, a mask of all columns
            shows them. None where rows are one document.
    """

    keys: Tensor
    values: Tensor
    slots: Tensor
    columns: Tensor
    past: int | Tensor
    before: int
    near: Tensor | None
    far: Tensor | None
    by_position: bool = False
    documents: Documents | None = None

    def by_token(self, weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Spread weights and values over all tokens so far; those that are not at hand have none.

        Args:
            weights: [B, H, T, n + C]; a token that has a slot and a column has a weight in one of them.
            values: [B, G, n + C, dv].

        Returns:
            [B, H, T, S] and [B, G, S, dv].
        """
        if self.by_position and self.near is not None:
            width = self.near.shape[-1]
        else:
            width = max(int(self.past) + weights.shape[2], self.columns.shape[0])
        position = torch.cat((self.slots, self.columns.expand(weights.shape[0], -1)), dim=1).clamp(max=width)
        index = position[:, None, None].expand(weights.shape)
        spread = weights.new_zeros((*weights.shape[:3], width + 1)).scatter_add(-1, index, weights)
        index = position[:, None, :, None].expand(values.shape)
        tokens = values.new_zeros((*values.shape[:2], width + 1, values.shape[-1])).scatter(2, index, values)
        return spread[..., :width], tokens[:, :, :width]

    def mask(self, config: GateSWAConfig, first: int, last: int, low: int, high: int) -> Tensor:
        """Mask of queries first..last over slots and columns low..high.

        Args:
            config: of the attention, whose window and kept tokens show.
            first: query of this call to begin with.
            last: the one after the last.
            low: column to begin with.
            high: the one after the last.

        Returns:
            [B or 1, 1 or H, last - first, n + high - low], bool or floats to add.
        """
        device = self.keys.device
        position = torch.arange(first, last, device=device) + self.past
        columns = self.columns[low:high]
        behind = position[:, None] - columns
        near = ((behind >= 0) & (behind < config.sliding_window))[None, None]
        if self.near is not None:
            rows = self.near[:, :, first:last]
            index = columns.clamp(max=rows.shape[-1] - 1)
            near = _restrict(near, rows.index_select(-1, index) if self.by_position else rows[..., low:high])
        if not config.sink_tokens:
            return near
        if self.documents is not None and not self.slots.shape[1]:
            return self._with_kept(config, near, behind, first, last, low, high)
        # A sink inside the window is among the columns, so its slot shows only once it has left.
        far = (position[:, None] - self.slots[:, None, None, :]) >= config.sliding_window
        if self.documents is not None:
            far = far & self.documents.same(first, last, self.slots)
        if self.far is not None and config.source_window is None:
            rows = self.far[:, :, first:last].expand(far.shape[0], -1, -1, -1)
            index = self.slots.clamp(max=rows.shape[-1] - 1)[:, None, None]
            far = _restrict(far, rows.gather(-1, index.expand(-1, *rows.shape[1:3], -1)))
        if far.dtype != near.dtype:
            far = _restrict(far, near.new_zeros(()))
        shape = torch.broadcast_shapes(far.shape[:3], near.shape[:3])
        return torch.cat((far.expand(*shape, -1), near.expand(*shape, -1)), dim=-1)

    def _with_kept(
        self, config: GateSWAConfig, near: Tensor, behind: Tensor, first: int, last: int, low: int, high: int
    ) -> Tensor:
        """A mask `near` over columns, with each document's kept tokens in it where they stand; see `mask`."""
        if self.documents is None or self.near is None:
            raise AssertionError("documents are read off a mask")
        columns = self.columns[low:high].expand(self.documents.start.shape[0], -1)
        kept = self.documents.kept[:, None, None, low:high] & self.documents.same(first, last, columns)
        kept = kept & (behind >= config.sliding_window)
        if config.source_window is None:
            return _restrict(kept | (behind < config.sliding_window) & (behind >= 0), self.near[:, :, first:last])
        return near | kept if near.dtype == torch.bool else torch.where(kept, 0.0, near)


def _restrict(visible: Tensor, mask: Tensor) -> Tensor:
    """Hide more: a bool mask and another one, bool or additive; the result is of the latter's kind."""
    if mask.dtype == torch.bool:
        return visible & mask
    return torch.where(visible, mask, hidden_value(mask))

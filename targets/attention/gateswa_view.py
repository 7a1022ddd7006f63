"""What the queries of one call of gated sliding-window attention attend to.

Shapes: B batch, T new tokens, S tokens so far, C columns, H heads, G key/value heads, n sink slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnedit.targets.attention.gateswa_documents import Documents


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

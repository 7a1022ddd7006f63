"""Documents packed into one row: which token belongs to which, read off the attention mask, and each one's own sinks.

Shapes: B batch, T tokens, H heads, n kept sinks of a document.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnedit.compiler.graph.masks import shown

EMPTY = 2**31 - 1
"""Position of a slot without token: later than every query."""


@dataclass(frozen=True)
class Documents:
    """Documents of rows that nothing was read before.

    Attributes:
        start: position at which each token's document starts, int64 [B, T]; -1 before the first.
        kept: whether a token is among the first n of its document, bool [B, T].
    """

    start: Tensor
    kept: Tensor

    @classmethod
    def of(cls, mask: Tensor, real: Tensor, count: int) -> Documents:
        """Read them off a mask.

        A document starts with a token that sees itself and none before.

        Args:
            mask: of what each token sees, bool or floats to add, [B, 1 or H, T, T].
            real: which tokens some token sees, bool [B, T].
            count: kept sinks of a document, n.
        """
        seen = shown(mask).any(dim=1)
        own = torch.arange(seen.shape[1], device=seen.device)
        starts = seen.diagonal(dim1=1, dim2=2) & (seen.to(torch.uint8).argmax(-1) == own)
        start = torch.where(starts, own, -1).cummax(-1).values
        rank = real.cumsum(-1)
        rank = rank - rank.gather(1, start.clamp(min=0))
        return cls(start, real & (start >= 0) & (rank < count))

    def several(self) -> bool:
        """Whether a row has more than one."""
        before, after = self.start[:, :-1], self.start[:, 1:]
        return bool(((before >= 0) & (before != after)).any())

    def slots(self) -> Tensor:
        """Positions of the kept tokens of all documents, ascending, int64 [B, m]; `EMPTY` where a row has fewer."""
        position = torch.arange(self.kept.shape[1], device=self.kept.device)
        count = int(self.kept.sum(-1).max())
        return torch.where(self.kept, position, EMPTY).sort(-1).values[:, :count]

    def same(self, first: int, last: int, others: Tensor) -> Tensor:
        """Whether queries first..last and other positions [B, m] are of one document, bool [B, 1, last - first, m]."""
        theirs = self.start.gather(1, others.clamp(max=self.start.shape[1] - 1))
        return (self.start[:, first:last, None] == theirs[:, None])[:, None]

"""Where a training stage is: what a checkpoint holds beside parameters and optimiser."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

SPIKE = 3.0
"""A loss this many times the highest of the last ones is not learned from."""
HISTORY = 32


@dataclass
class StageState:
    """Where a stage is, beside parameters and optimiser.

    Attributes:
        name: of the stage.
        step: steps done, skipped ones too.
        best, best_step: lowest held-out loss, mean of those of all parts, and when the last of them was reached.
        part_best: the lowest of each part.
        backed_off: times that parts went back to their best with a lower rate, all together.
        rate: highest learning rate, relative to the root mean square of each weight; of the part with the worst start.
        first, last: held-out loss before training, and at the last look.
        since: looks since the best.
        skipped: steps without an update.
        row: steps in a row with a loss far above the usual one.
        recoveries: times that training went back to its best state.
        seconds: spent.
        tokens: seen.
        losses: the last ones; of those not learned from what would have been.
        usual: the median of the last losses when held-out windows were best.
        done: whether it is over.
    """

    name: str
    step: int = 0
    best: float = math.inf
    best_step: int = 0
    part_best: list[float] = field(default_factory=list)
    backed_off: int = 0
    rate: float = math.nan
    first: float = math.nan
    last: float = math.nan
    since: int = 0
    skipped: int = 0
    row: int = 0
    recoveries: int = 0
    seconds: float = 0.0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    usual: float = math.nan
    done: bool = False

    def spikes(self, loss: float) -> bool:
        """Take in a loss; whether it is far above all of the last ones."""
        if not math.isfinite(loss):
            self.row += 1
            return True
        if len(self.losses) < HISTORY // 4:
            self.losses.append(loss)
            return False
        if math.isnan(self.usual):
            self.usual = statistics.median(self.losses)
        self.row = self.row + 1 if loss > SPIKE * self.usual else 0
        most = SPIKE * max(self.losses)
        self.losses = [*self.losses, min(loss, most)][-HISTORY:]
        return loss > most

    def forget(self) -> None:
        """Losses so far say nothing of those to come."""
        self.row, self.losses, self.usual = 0, [], math.nan

"""Slots and rank of one layer within so many cached values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.passes.budget import source_values
from attnedit.targets.attention.mla.paths import TORCH_SIZE

VALUES_PER_SLOT = 8
"""One rotary slot (two values) for every eight cached values: the best split at a context of 8,192 tokens
(docs/results.md); at 1,024 tokens twelve were."""
MOST_VALUES_PER_SLOT = 11
"""Where queries would grow beyond `TORCH_SIZE`, slots may be as few as this to keep them within: one for nine values is
as good as one for eight, one for twelve costs half a percent of perplexity (SmolLM2, a half, 8,192 tokens)."""
VALUES_TO_UNFOLD = 4
"""Cached values per rotary frequency from which frequencies are not folded in pairs."""
VALUES_TO_ALIGN = 256
"""Cached values from which latent and slots are multiples of eight values: GPUs read 16 bytes at a time."""


@dataclass(frozen=True)
class Shape:
    """What one layer caches per token.

    Attributes:
        rank: latent values (kv_lora_rank).
        slots: rotary slots of two values each (qk_rope_head_dim is 2 slots).
        fold: neighbouring frequencies that are mixed into common slots.
        exact: every rotary component is a slot and the latent holds all else: nothing is lost.
        columns: of cos and sin, one for each slot and all different; None where the most valuable components are
            slots, whatever their frequencies.
    """

    rank: int
    slots: int
    fold: int = 1
    exact: bool = False
    columns: tuple[int, ...] | None = None

    @property
    def values(self) -> int:
        """Cached values per token."""
        return self.rank + 2 * self.slots


def exact_shape(site: AttentionSite) -> Shape:
    """The lossless shape: G slots per frequency, pass-through key dims and values in the latent."""
    planes = len(site.rotary_pairs)
    slots = site.num_key_value_heads * planes
    return Shape(rank=source_values(site) - 2 * slots, slots=slots, exact=True)


def shape_for(site: AttentionSite, values: int) -> Shape:
    """Split `values` cached values into slots and latent; the lossless shape where everything fits."""
    full = exact_shape(site)
    if values >= full.values:
        return full
    planes = len(site.rotary_pairs)
    if not planes:
        return Shape(rank=values, slots=0)
    fold = 1 if values >= VALUES_TO_UNFOLD * planes else 2
    # at least one slot for every two (folded) frequencies, whatever the share
    slots = max(round(values / VALUES_PER_SLOT), planes // (2 * fold))
    slots = max(1, min(slots, values // 4, full.slots))
    slots_beside_head = (TORCH_SIZE - site.head_dim) // 2
    if slots > slots_beside_head >= values / MOST_VALUES_PER_SLOT:
        slots = slots_beside_head
    rank = values - 2 * slots
    if values >= VALUES_TO_ALIGN and full.slots % 4 == 0:
        slots = max(4, round(slots / 4) * 4)
        rank = (values - 2 * slots) // 8 * 8
    return Shape(rank=rank, slots=slots, fold=fold)


def table_shape(values: int, columns: Sequence[int]) -> Shape:
    """Split `values` into latent and slots of frequencies that are all different and equally spaced.

    Args:
        values: cached values per token.
        columns: of cos and sin, fastest first. Every one, or every second, ... gets a slot: what comes closest to
            one slot for `VALUES_PER_SLOT` values.
    """
    planes = len(columns)
    if not planes:
        return Shape(rank=values, slots=0, columns=())
    folds = [fold for fold in range(1, planes + 1) if planes % fold == 0 and 4 * (planes // fold) <= values]
    wanted = values / VALUES_PER_SLOT
    fold = min(folds or [planes], key=lambda fold: abs(math.log(planes / fold / wanted)))
    kept = tuple(columns[::fold])
    return Shape(max(1, values - 2 * len(kept)), len(kept), fold, columns=kept)


def common_shapes(
    sites: Sequence[AttentionSite], values: int, columns: Mapping[str, Sequence[int]]
) -> dict[str, Shape]:
    """Shapes of layers that a class stores alike: the same rank in all, the same slots in those that rotate.

    Args:
        sites: the layers.
        values: cached values per token of a layer that rotates.
        columns: of cos and sin, fastest first, by the site's name.
    """
    shapes = {site.name: table_shape(values, columns[site.name]) for site in sites}
    rank = min(shape.rank for shape in shapes.values())
    return {site.name: _of_rank(site, shapes[site.name], rank) for site in sites}


def fixed_shapes(
    sites: Sequence[AttentionSite], rank: int, fold: int, columns: Mapping[str, Sequence[int]]
) -> dict[str, Shape]:
    """Shapes of layers of which everything is fixed: a latent of `rank`, and a slot for each of `columns`."""
    shapes = {}
    for site in sites:
        kept = tuple(columns[site.name])
        shapes[site.name] = _of_rank(site, Shape(rank, len(kept), fold, columns=kept), rank)
    return shapes


def _of_rank(site: AttentionSite, shape: Shape, rank: int) -> Shape:
    """The shape with another rank; no latent holds more than what the slots leave of keys and values."""
    return replace(shape, rank=max(1, min(rank, source_values(site) - 2 * shape.slots)))

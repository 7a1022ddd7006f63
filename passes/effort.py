"""How much the closed form looks at: a GPU does in a minute what takes two cores an hour."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.passes.site_sample import sampled_queries


@dataclass(frozen=True)
class Effort:
    """Of the closed form, on one kind of device.

    Attributes:
        queries: sampled queries, as a multiple of what the options of a fit ask for.
        measured_long: windows of each longer length that losses of layers are measured on.
    """

    queries: float
    measured_long: int


ON_CPU = Effort(queries=1.0, measured_long=1)
ON_GPU = Effort(queries=2.0, measured_long=3)
"""Both take a half and a quarter of SmolLM2's cache further (docs/notebook/2026-11-long-context.md)."""


def effort_on(model: PreTrainedModel) -> Effort:
    """What the device of the model's embeddings, where calibration runs, can do."""
    return ON_CPU if embedding_weight(model).device.type == "cpu" else ON_GPU


def queries_for(model: PreTrainedModel, windows: Sequence[Tensor], total: int) -> Callable[[int], int]:
    """`sampled_queries` of the windows, as many times `total` as the model's device can do."""
    return sampled_queries(windows, round(effort_on(model).queries * total))

"""What a report is made of: rows of layers, rules, checks and stages, and curves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from attnedit.compiler.reporting.graph_svg import GraphSketch


class Record(BaseModel):
    """A part of a report, which stays as it is."""

    model_config = ConfigDict(frozen=True)


class LayerReport(Record):
    """One attention site, before and after.

    Attributes:
        layer: cache slot.
        name: fully qualified name of the attention module.
        kind: what it became (``"mla"``, ``"gateswa"``, or the names of the rewrites that it went through), or
            ``"source"`` where it was left as it is.
        kv_lora_rank: latent size; None where there is none.
        qk_rope_head_dim: rotary values in the cache; None where there is no latent.
        sliding_window: tokens a query sees, of a layer that got a window.
        figures: others that the kind of attention shows, by name.
        loss_increase: KL divergence in nats per token from the source of the model with this layer alone rewritten;
            None if not measured.
        values_before: cached values per token of the source.
        values_after: the same of the result.
        energy_kept: share of the weighted second moment that the latent keeps, 0 to 1; None if not measured.
        output_error: relative squared error of the attention output on calibration data; None if not measured.
    """

    layer: int
    name: str
    kind: str
    kv_lora_rank: int | None = None
    qk_rope_head_dim: int | None = None
    sliding_window: int | None = None
    figures: dict[str, Any] = Field(default_factory=dict)
    loss_increase: float | None = None
    values_before: float
    values_after: float
    energy_kept: float | None = None
    output_error: float | None = None


class Verification(Record):
    """One promise of a rewrite, held on real numbers.

    Attributes:
        what: what was compared.
        contract: ``"exact"``, ``"close(...)"`` or ``"learned"``.
        error: largest deviation as a fraction of the largest value; None for ``"learned"``.
        tolerance: what was allowed.
    """

    what: str
    contract: str
    error: float | None = None
    tolerance: float | None = None

    def __str__(self) -> str:
        error = "" if self.error is None else f", error {self.error:.1e}"
        allowed = "" if self.tolerance is None else f" (allowed {self.tolerance:.1e})"
        return f"{self.what}: {self.contract}{error}{allowed}"


@dataclass(frozen=True)
class KVUsage:
    """What a model's cache holds, measured on a live cache.

    Attributes:
        per_layer: cached values per token of each layer, averaged over ``length`` positions: a layer that keeps
            only a window of W tokens and n sinks costs (W + n) / length of its width.
        bytes_per_token: of all layers together, in the dtype the cache really has.
        length: the context length that the average is over.
    """

    per_layer: tuple[float, ...]
    bytes_per_token: float
    length: int

    @property
    def values_per_token_layer(self) -> float:
        """Mean of ``per_layer``."""
        return sum(self.per_layer) / len(self.per_layer)


class RuleReport(Record):
    """What one rewrite, or one pass of our own, did.

    Attributes:
        name: of the rewrite.
        place: file and line of its pattern; empty for a pass of our own.
        contract: what it promises.
        matched: places where it could apply.
        rewritten: of those, how many it changed.
        rejected: of the others, how many by reason.
        nearest_miss: where nothing matched: the place that came closest, and what differs there.
        seconds: spent on matching, rewriting, fitting and verifying.
    """

    name: str
    place: str = ""
    contract: str
    matched: int
    rewritten: int
    rejected: dict[str, int] = Field(default_factory=dict)
    nearest_miss: str | None = None
    seconds: float


class PipelineStage(BaseModel):
    """One stage of a compilation; ``attnedit compile --explain`` says what each does.

    Attributes:
        name: of the stage.
        did: what it did, in a line.
        seconds: it took.
        checked: what it held to be so, with the figures found.
    """

    name: str
    did: str = ""
    seconds: float = 0.0
    checked: list[str] = Field(default_factory=list)


class StageReport(Record):
    """One stage of training.

    Attributes:
        name: "fit" (with the group of layers where there are several) or "distill".
        steps: optimiser steps done, those skipped too.
        tokens: seen by training, over all steps.
        seconds: of wall-clock time, evaluations included.
        learning_rate: the highest, as a fraction of each weight's root mean square; None in reports that did not say.
        before: held-out loss before the first step. Of "fit" the mean over layers of the squared error of the attention
            output as a fraction of its power, half of it that of the first token alone; of "distill" the KL divergence
            from the source in nats per token.
        best: the lowest held-out loss, in the same unit; of "fit" each layer's own lowest, averaged.
        best_step: after how many steps that was.
        trained_on: median loss of the last steps, on the text that is learned from, in the same unit; None in reports
            that did not say.
        skipped: steps whose loss or gradient was broken.
        backed_off: times that a layer's held-out loss had grown, so that it went back to its best with a lower rate.
    """

    name: str
    steps: int
    tokens: int
    seconds: float
    learning_rate: float | None = None
    before: float
    best: float
    best_step: int
    trained_on: float | None = None
    skipped: int = 0
    backed_off: int = 0


class LossCurve(Record):
    """Mean loss of tokens by their position in long windows, of source and result.

    Attributes:
        data: what the windows are, and what they were used for.
        windows: how many.
        ends: position after the last token of each range, ascending; the first range begins with the second token.
        source: mean negative log-likelihood in nats of the source in each range.
        result: of the result.
    """

    data: str
    windows: int
    ends: list[int]
    source: list[float]
    result: list[float]


class KVCurve(Record):
    """Memory of the cache of one sequence, by the cost model.

    Attributes:
        lengths: tokens of context, ascending.
        before: bytes of the source's cache at each.
        after: of the result's.
    """

    lengths: list[int]
    before: list[float]
    after: list[float]


class SiteGraphs(Record):
    """The graph of an attention module before and after, of all layers that are alike.

    Attributes:
        kind: what the attention became.
        layers: those that have these graphs, but for their sizes.
        before, after: of the first of them.
    """

    kind: str
    layers: list[int]
    before: GraphSketch
    after: GraphSketch

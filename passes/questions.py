"""What the pipeline and targets with a budget ask and answer each other: plans, one site's work, its fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.stream import AttentionInputs
from attnedit.compiler.rewriting.rewrite import Contract, learned
from attnedit.passes.beginnings import without_beginnings
from attnedit.passes.budget import Allocation
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import queries_for, take_samples


class TargetOptions(Protocol):
    """What a target reads of a compilation's options."""

    @property
    def alternations(self) -> int:
        """Rounds of least squares."""
        ...

    @property
    def allocation(self) -> Allocation:
        """How layers share the budget."""
        ...

    def asked(self, name: str, default: object) -> Any:
        """A field by its name; what a profile asks for where it is None; or else the default."""
        ...


class SiteFitted(Protocol):
    """Weights of one site: a dataclass, `energy_kept` among its fields where that is known."""

    @property
    def output_error(self) -> float | None:
        """Relative squared error of the attention output on what it was fitted on."""
        ...


class Shape(Protocol):
    """What one layer will cache. A dataclass: its text tells one fit from another."""

    @property
    def values(self) -> float:
        """Cached values per token, averaged over the context."""
        ...

    @property
    def exact(self) -> bool:
        """Whether nothing is lost, so that no data is needed."""
        ...


class ClassSizes(Protocol):
    """What a class that has one size for all layers takes (`attnedit.targets.runtime.hf.towards.ClassSizes`)."""

    @property
    def columns(self) -> Mapping[str, Sequence[int]]:
        """Of cos and sin that rotary slots may have, fastest first, by the site's name."""
        ...

    @property
    def fold(self) -> int:
        """How many of a site's frequencies share a slot where the sizes are fixed."""
        ...

    def rank(self, source_values: int, budget: float) -> int | None:
        """Size of the latent within a fraction of the source's values per token and layer; None for any."""
        ...


@dataclass(frozen=True)
class Question:
    """What a target plans by.

    Attributes:
        sites: all attention sites of the model.
        chosen: those that it may change.
        before: cached values per token of the source by layer, at the context length.
        length: of the context.
        budget: fraction of the source's cached values that all layers together may keep; None for the target's own.
        changed: what layers cache that a target before this one has changed, by layer.
        last: whether no other target comes after this one.
        losses: what each chosen site costs alone at an even share, in nats, by name; None for even shares.
    """

    sites: list[AttentionSite]
    chosen: list[AttentionSite]
    before: Mapping[int, float]
    length: int
    budget: float | None = None
    changed: Mapping[int, float] = field(default_factory=dict)
    last: bool = True
    losses: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Claim:
    """What a target will make of sites.

    Attributes:
        shapes: of each site that it may change, by name.
        leave: layers of the chosen sites that it leaves as they are, or how many: those that would cost most.
    """

    shapes: Mapping[str, Any]
    leave: int | list[int] = 0


@dataclass(frozen=True)
class SiteWork:
    """One site to fit.

    Attributes:
        source: live source model in eval mode.
        result: the model that the graph is for; it shares the source's tensors.
        site: the attention site.
        inputs: batches of what its module is called with.
        windows: calibration token ids [N, T] of each length T, int64.
        seed: of sampled queries.
        kept: where fits are kept and looked for.
    """

    source: PreTrainedModel
    result: PreTrainedModel
    site: AttentionSite
    inputs: Iterator[AttentionInputs]
    windows: Sequence[Tensor]
    seed: int = 0
    kept: KeptFits | None = None

    def samples(self, queries: int, *, hidden: bool = False) -> list[LayerSample]:
        """The site's queries, keys and values on the calibration data.

        Args:
            queries: to sample over all windows (`attnedit.passes.site_sample`).
            hidden: whether to keep the hidden states.
        """
        count = queries_for(self.source, without_beginnings(self.windows)[0], queries)
        return take_samples(self.source, self.site, self.inputs, count, self.seed, hidden=hidden)


@dataclass(frozen=True)
class SiteFit:
    """One site as it was fitted.

    Attributes:
        graph: in place of the attention module, weights included.
        energy_kept, output_error: see `LayerReport`; None where not measured.
        details: what the target wants to know of it in `fitted_notes`.
        contract: what the new attention promises: `LOSSLESS`, or that its error is measured.
    """

    graph: fx.GraphModule
    energy_kept: float | None = None
    output_error: float | None = None
    details: Any = None
    contract: Contract = learned


LOSSLESS = Contract("close")
"""The source's values to rounding, which verification holds the whole model to."""

"""Targets that plan over all attention sites under one budget: what ours and those of other packages have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Protocol, Self, TypeAlias, TypeVar

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.model_inputs import given_digest
from attnedit.compiler.execution.stream import AttentionInputs
from attnedit.compiler.rewriting.rewrite import Contract, Reject, learned
from attnedit.passes.beginnings import begins, without_beginnings
from attnedit.passes.budget import Allocation, by_loss, least_values, plan
from attnedit.passes.effort import queries_for
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.kept_fits import KeptFits, digest
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import take_samples
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.kinds import use_kind


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


S = TypeVar("S", bound=Shape)
F = TypeVar("F", bound=SiteFitted)


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
            queries: to sample over all windows (`attnedit.passes.effort`).
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


class AttentionTarget(ABC, Generic[S, F]):
    """What attention becomes, chosen for all sites under one budget, and fitted site by site on sampled activations.

    A package registers an instance under the entry points `attnedit.targets`. A subclass needs `shape`, `fit` and
    `build`; the driver does the rest: budgets, even or by loss, data, one model or layer by layer, fits that are kept,
    training, checks, reports, saving, exports.

    Attributes:
        name: what `attnedit compile --target` calls it.
        kind: of the attention that it makes. A saved result names it, so the entry point has the kind's name.
        description: one line for people.
        reads: options of `attnedit.options.CompileOptions` that it reads; it is refused any other that only some
            targets read.
        leaves: whether it may leave layers for another target to change ("gateswa+mla").
        begins: whether its fits want `attnedit.passes.beginnings`, the first tokens of many texts, beside the windows.
        default_budget: where none is asked for; None where the target goes by something else.
        stage, does: of the pipeline, in `attnedit compile --explain`.
        fits: dataclass of what `fit` returns: tensors, numbers, and such dataclasses.
        queries: sampled over all calibration windows for a fit; None for `FitOptions.output_queries`.
        fit_options: how much work a fit may do; from the option `alternations`.
        allocation: how layers share the budget; from the option.
    """

    name: str
    kind: AttentionKind
    description: str = ""
    reads: ClassVar[frozenset[str]] = frozenset({"kv_budget", "allocation", "calibration_length", "alternations"})
    leaves: ClassVar[bool] = False
    begins: ClassVar[bool] = False
    default_budget: ClassVar[float | None] = 0.5
    stage: ClassVar[str] = "fit"
    does: str = "fit new attention"
    fits: ClassVar[type]
    queries: ClassVar[int | None] = None
    fit_options: FitOptions = FitOptions()
    allocation: Allocation = "auto"

    def configured(self, options: TargetOptions) -> Self:
        """A copy that goes by a compilation's options.

        Args:
            options: `attnedit.options.CompileOptions`.

        Returns:
            A target of the same class.

        Raises:
            UsageError: they make no sense, whatever the model.
        """
        use_kind(self.kind)
        result = copy.copy(self)
        result.fit_options, result.allocation = FitOptions.of(options.alternations), options.allocation
        return result

    def towards(self, given: ClassSizes) -> Self:
        """A copy for a profile's class that has sizes of its own.

        Args:
            given: the sizes.

        Returns:
            A target of the same class.

        Raises:
            UsageError: the target has no shapes for such a class.
        """
        raise UsageError(f"{self.name} has no shapes for a class with one size for all layers; leave the profile out")

    def quick(self) -> Self:
        """A copy for fits that only tell layers apart."""
        result = copy.copy(self)
        result.fit_options = FitOptions.of(1)
        return result

    def check(self, site: AttentionSite) -> Reject | None:
        """Look closer at a site.

        Args:
            site: that could change.

        Returns:
            None to change it, `Reject` with the reason to leave it as it is.
        """
        return None

    def notes(self, chosen: list[AttentionSite]) -> list[str]:
        """What the user should know before any data is read.

        Args:
            chosen: sites that change.

        Returns:
            Lines of the report.
        """
        return []

    def fitted_notes(self, fits: Mapping[str, SiteFit]) -> list[str]:
        """What the user should know of the fits.

        Args:
            fits: by the site's name.

        Returns:
            Lines of the report.
        """
        return []

    def least(self, site: AttentionSite) -> int:
        """The smallest cache that a site can have.

        Args:
            site: that changes.

        Returns:
            Values per token.
        """
        return least_values(site)

    def shape(self, site: AttentionSite, values: int) -> Shape:
        """What a site may cache.

        Args:
            site: that changes.
            values: cached per token at most.

        Returns:
            The shape; an exact one where everything fits.

        Raises:
            NotImplementedError: the target has a `plan` of its own.
        """
        raise NotImplementedError(f"{type(self).__name__} has no shape()")

    def plan(self, question: Question) -> Claim:
        """Share the budget among the chosen sites.

        Raises:
            UsageError: the budget cannot be met.
        """
        asked = question
        own = {site.layer_idx for site in asked.chosen}
        changed = {layer: values for layer, values in asked.changed.items() if layer not in own}
        budget = asked.budget
        if budget is None:
            budget = self.default_budget or 1.0
            after = {**asked.before, **changed, **{layer: budget * asked.before[layer] for layer in own}}
            budget = sum(after.values()) / sum(asked.before.values()) if changed else budget
        given = (list(asked.sites), dict(asked.before), list(asked.chosen), budget, changed, asked.losses)
        return Claim(plan(*given, shape=self.shape, least=self.least))

    def by_loss(self, claim: Claim, sites: list[AttentionSite]) -> bool:
        """Whether shares go by what each layer costs alone, which is measured first."""
        return "allocation" in self.reads and by_loss(
            self.allocation, self.fit_options.alternations, claim.shapes, sites
        )

    @property
    def cached_tokens(self) -> int:
        """The most tokens that a layer holds, where that bounds it: calibration windows must be longer; else 0."""
        return 0

    @property
    def exact_stream(self) -> bool:
        """Whether hidden states are computed in the model's own dtype; see `FitOptions`."""
        return self.fit_options.exact_stream

    def check_data(self, windows: Sequence[Tensor]) -> None:
        """Refuse calibration windows [N, T] of each length T that cannot show what is lost.

        Raises:
            UsageError: they cannot.
        """
        longest = max(part.shape[1] for part in windows)
        if longest <= self.cached_tokens:
            raise UsageError(
                f"{self.name} holds {self.cached_tokens} tokens: calibration windows of {longest} tokens lose nothing "
                "to it; give longer ones"
            )

    def fit_site(self, work: SiteWork, shape: S) -> SiteFit:
        """Fit and build one site's new attention on what its module is called with.

        Args:
            work: the site, with its model and data.
            shape: what it will cache.

        Raises:
            CaptureError: the site cannot be rewritten.
        """
        if shape.exact:
            return SiteFit(self.build(work.result, work.site, shape, None), contract=LOSSLESS)

        def make() -> F:
            samples = work.samples(self.queries or self.fit_options.output_queries)
            if not self.begins:
                longest = max(sample.key.shape[2] for sample in samples)
                samples = [sample for sample in samples if not begins(sample.key.shape[2], longest)]
            return self.fit(samples, shape)

        made_from = (
            "" if work.kept is None else digest(*work.windows, given_digest(), shape, self.fit_options, work.seed)
        )
        fit = make() if work.kept is None else work.kept.get(self.fits, work.site.name, made_from, make)
        graph = self.build(work.result, work.site, shape, fit)
        return SiteFit(graph, getattr(fit, "energy_kept", None), fit.output_error)

    @abstractmethod
    def fit(self, samples: Sequence[LayerSample], shape: S) -> F:
        """Weights of one site: a dataclass with `output_error`, and `energy_kept` where that is known.

        Args:
            samples: of the site, one for each length of windows.
            shape: what it caches.

        Returns:
            What `build` takes.
        """

    @abstractmethod
    def build(self, model: PreTrainedModel, site: AttentionSite, shape: S, fit: F | None) -> fx.GraphModule:
        """The site's graph with its new attention, weights included.

        Args:
            model: that the graph is for; its own tensors are not written to.
            site: the attention site.
            shape: what it caches.
            fit: from `fit`; None of an exact shape.

        Returns:
            What `attnedit.targets.attention.site_graph.replace_attention` makes.
        """


AnyTarget: TypeAlias = AttentionTarget[Any, Any]
"""Whatever its shapes and fits."""

"""Targets that plan over all attention sites under one budget: what ours and those of other packages have in common."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeAlias, TypeVar

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.model_inputs import given_digest
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.compiler.rewriting.rewrite import Reject
from attnedit.passes.beginnings import begins
from attnedit.passes.budget import Allocation, by_loss, least_values, plan
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.kept_fits import digest
from attnedit.passes.questions import (
    LOSSLESS,
    Claim,
    ClassSizes,
    Question,
    Shape,
    SiteFit,
    SiteFitted,
    SiteWork,
    TargetOptions,
)
from attnedit.passes.sample import LayerSample
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.kinds import use_kind

S = TypeVar("S", bound=Shape)
F = TypeVar("F", bound=SiteFitted)


class AttentionTarget(Target, ABC, Generic[S, F]):
    """A target that chooses for all sites under one budget, and fits site by site on sampled activations.

    A package registers an instance under the entry points `attnedit.targets`. A subclass needs `shape`, `fit` and
    `build`; the driver does the rest: budgets, even or by loss, data, one model or layer by layer, fits that are kept,
    training, checks, reports, saving, exports.

    Attributes:
        name: what `attnedit compile --target` calls it.
        kind: of the attention that it makes. A saved result names it, so the entry point has the kind's name.
        description: one line for people.
        begins: whether its fits want `attnedit.passes.beginnings`, the first tokens of many texts, beside the windows.
        default_budget: where none is asked for; None where the target goes by something else.
        fits: dataclass of what `fit` returns: tensors, numbers, and such dataclasses.
        queries: sampled over all calibration windows for a fit; None for `FitOptions.output_queries`.
        fit_options: how much work a fit may do; from the option `alternations`.
        allocation: how layers share the budget; from the option.
    """

    kind: AttentionKind
    reads: ClassVar[frozenset[str]] = frozenset({"kv_budget", "allocation", "calibration_length", "alternations"})
    begins: ClassVar[bool] = False
    default_budget: ClassVar[float | None] = 0.5
    stage: ClassVar[str] = "fit"
    does: str = "fit new attention"
    fits: ClassVar[type]
    queries: ClassVar[int | None] = None
    fit_options: FitOptions = FitOptions()
    allocation: Allocation = "auto"

    def __init__(self) -> None:
        """Subclasses have options of their own, or none."""

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

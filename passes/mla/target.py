"""The target "mla": layers become multi-head latent attention."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar, Self

from torch import fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.passes.mla.fit import Fit, build, exact_factors, fit_layer
from attnedit.passes.mla.linear import LinearSite, linearise
from attnedit.passes.mla.shapes import Shape, common_shapes, fixed_shapes, shape_for
from attnedit.passes.questions import Claim, ClassSizes, Question, SiteFit, SiteWork
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import output_weight
from attnedit.passes.target import AttentionTarget
from attnedit.targets.attention.kinds import KINDS
from attnedit.targets.attention.mla.graph import MLA_MODULE

LINEAR = 1e-6
"""Energy that a linear map misses by rounding alone."""


class LatentTarget(AttentionTarget[Shape, Fit]):
    """Latent attention in every layer; see docs/method.md.

    Attributes:
        given: sizes of a class whose queries, keys and values are linear in the hidden states, without norm and bias,
            be the source's so or not; nothing is exact then. None for shapes by budget.
    """

    name = "mla"
    kind = KINDS[MLA_MODULE]
    description = "latent attention in every layer"
    reads = AttentionTarget.reads | {"profile", "kernel_dims", "engine"}
    does = "fit latent attention"
    fits = Fit
    default_budget: ClassVar[float] = 0.5
    given: ClassSizes | None = None

    def towards(self, given: ClassSizes) -> Self:
        """A copy for a class that has such sizes, and linear maps."""
        result = copy.copy(self)
        result.given = given
        return result

    def quick(self) -> Self:
        """A copy for fits that only tell layers apart; maps are none of their business."""
        result = super().quick()
        result.given = None
        return result

    def notes(self, chosen: list[AttentionSite]) -> list[str]:
        """Positions in what is compressed."""
        turned = [site for site in chosen if site.unread_rope]
        if not turned or self.given is not None:
            return []
        return [
            f"keys of {len(turned)} layers are compressed with their positions in them, which needs a larger cache for "
            f"the same quality: {turned[0].name}: {turned[0].unread_rope}"
        ]

    def fitted_notes(self, fits: Mapping[str, SiteFit]) -> list[str]:
        """How far off the linear maps are that stand for something else."""
        maps = [fit.details.errors for fit in fits.values() if isinstance(fit.details, LinearSite)]
        worst = [max(errors) for errors in zip(*maps, strict=True)]
        if not worst or max(worst) < LINEAR:
            return []
        figures = zip(("queries", "keys", "values"), worst, strict=True)
        named = ", ".join(f"{name} {error:.1%}" for name, error in figures)
        return [f"energy that the linear maps miss on calibration data, in the worst layer: {named}"]

    def shape(self, site: AttentionSite, values: int) -> Shape:
        """Latent and rotary slots."""
        return shape_for(site, values)

    def plan(self, question: Question) -> Claim:
        """By the budget, or as the class has it."""
        given, latent, before = self.given, question.chosen, question.before
        if given is None:
            return super().plan(question)
        budget = self.default_budget if question.budget is None else question.budget
        rank = given.rank(min(int(values) for values in before.values() if values), budget)
        if rank is not None:
            return Claim(fixed_shapes(latent, rank, given.fold, given.columns))
        values = int(budget * sum(before.values()) / len(question.sites) + 1e-6)
        if values < (least := max(self.least(site) for site in latent)):
            raise UsageError(
                f"kv_budget {budget:g} leaves {values} cached values per token and layer, {least} are needed"
            )
        return Claim(common_shapes(latent, values, given.columns))

    def by_loss(self, claim: Claim, sites: list[AttentionSite]) -> bool:
        """Not where the class has one size for all layers."""
        return self.given is None and super().by_loss(claim, sites)

    def fit_site(self, work: SiteWork, shape: Shape) -> SiteFit:
        """Fit one site, on linear maps where the class has them; those are not kept."""
        if self.given is None or shape.exact:
            return super().fit_site(work, shape)
        samples = work.samples(self.fit_options.output_queries, hidden=True)
        maps, samples = linearise(work.source, work.site, samples)
        fit = self.fit(samples, shape)
        graph = build(work.result, work.site, shape, fit.factors, maps)
        return SiteFit(graph, fit.energy_kept, fit.output_error, maps)

    def fit(self, samples: Sequence[LayerSample], shape: Shape) -> Fit:
        """Closed form and refits."""
        return fit_layer(samples, shape, self.fit_options)

    def build(self, model: PreTrainedModel, site: AttentionSite, shape: Shape, fit: Fit | None) -> fx.GraphModule:
        """The graph with its weights."""
        if fit is None:
            return build(model, site, shape, exact_factors(site, shape, output_weight(model, site)[0]))
        return build(model, site, shape, fit.factors)

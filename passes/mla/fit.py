"""Fit one MLA layer to one attention site: analytic start, then alternating closed-form refits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnedit.compiler.errors import UsageError
from attnedit.passes.mla import least_squares
from attnedit.passes.mla.budget import Shape
from attnedit.passes.mla.initialise import analytic, mix_components
from attnedit.passes.mla.least_squares import logit_target, refit_latent, refit_output, refit_query
from attnedit.passes.mla.weights import Factors
from attnedit.passes.sample import LayerSample


@dataclass(frozen=True)
class FitOptions:
    """How much work the closed-form fit may do (docs/benchmarks.md has what each setting buys).

    Attributes:
        alternations: rounds of query-side and latent-side least squares, each followed by the output side's.
        latent_side: without it, a round is the query side and the output side only.
        iterations: conjugate-gradient steps of each of the first two; few regularise where queries are few.
        output_queries: sampled queries, over all calibration sequences, of the output regression; see
            `attnedit.passes.site_sample.sampled_queries`.
        logit_queries: sampled queries of the logits' least squares.
        exact_stream: whether hidden states are computed in the model's own dtype; else in bfloat16 where the
            processor multiplies that faster.
    """

    alternations: int = 2
    latent_side: bool = True
    iterations: int = 8
    output_queries: int = 16384
    logit_queries: int = 16384
    exact_stream: bool = True

    @classmethod
    def of(cls, alternations: int) -> FitOptions:
        """Settings for a number of alternations; up to one is the quick job, on few queries, without the latent side.

        Raises:
            UsageError: the number is negative.
        """
        if alternations < 0:
            raise UsageError(f"alternations must not be negative, got {alternations}")
        if alternations > 1:
            return cls(alternations)
        return cls(
            alternations, latent_side=False, iterations=3, output_queries=8192, logit_queries=2048, exact_stream=False
        )

    @property
    def logit_share(self) -> float:
        """Of the output regression's queries, those that the logits' least squares take."""
        return min(1.0, self.logit_queries / self.output_queries)


@dataclass(frozen=True)
class Fit:
    """Weights, the share of the weighted second moment kept, and the output's relative squared error."""

    factors: Factors
    energy_kept: float
    output_error: float


@torch.no_grad()
def fit_layer(samples: Sequence[LayerSample], shape: Shape, options: FitOptions) -> Fit:
    """Closed-form MLA weights of one layer; see docs/method.md for the steps."""
    components = mix_components(samples, shape.fold, shape.columns) if shape.slots else None
    factors, energy = analytic(samples, components, shape.slots, shape.rank)
    if not options.alternations:
        factors, error = refit_output(samples, factors)
        return Fit(factors, energy, error)
    few = [sample.thinned(max(1, round(len(sample.positions) * options.logit_share))) for sample in samples]
    target = logit_target(few)
    for turn in range(options.alternations):
        if least_squares.STUDENT and turn:
            target = logit_target(few, factors)
        factors, error = refit_output(samples, refit_query(few, factors, target, options.iterations))
        if options.latent_side:
            factors, error = refit_output(samples, refit_latent(few, factors, target, options.iterations))
    return Fit(factors, energy, error)

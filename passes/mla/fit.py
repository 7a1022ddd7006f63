"""Fit one MLA layer to one attention site: analytic start, then alternating closed-form refits."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from attnedit.passes.mla.budget import Shape
from attnedit.passes.mla.initialise import analytic, mix_components
from attnedit.passes.mla.least_squares import logit_target, refit_latent, refit_output, refit_query
from attnedit.passes.mla.sample import LayerSample
from attnedit.passes.mla.weights import Factors, output_error


@dataclass(frozen=True)
class FitOptions:
    """How much work the closed-form fit may do.

    Attributes:
        alternations: rounds of query-side, latent-side and output-side least squares after the analytic start.
        iterations: conjugate-gradient steps of each of the first two.
        output_queries: sampled queries, over all calibration sequences, of the output regression.
        logit_queries: sampled queries of the logits' least squares.
    """

    alternations: int = 2
    iterations: int = 8
    output_queries: int = 16384
    logit_queries: int = 8192


@dataclass(frozen=True)
class Fit:
    """Weights, the share of the weighted second moment kept, and the output's relative squared error."""

    factors: Factors
    energy_kept: float
    output_error: float


@torch.no_grad()
def fit_layer(sample: LayerSample, shape: Shape, options: FitOptions) -> Fit:
    """Closed-form MLA weights of one layer; see docs/method.md for the steps."""
    components = mix_components(sample, shape.fold) if shape.slots else None
    factors, energy = analytic(sample, components, shape.slots, shape.rank)
    factors = refit_output(sample, factors)
    if options.alternations:
        few = sample.thinned(max(1, options.logit_queries // len(sample.query)))
        target = logit_target(few)
        for _ in range(options.alternations):
            factors = refit_output(sample, refit_query(few, factors, target, options.iterations))
            factors = refit_output(sample, refit_latent(few, factors, target, options.iterations))
    return Fit(factors, energy, output_error(sample, factors))

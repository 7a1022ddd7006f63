"""Fit one MLA layer to one attention site: analytic start, then alternating closed-form refits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from attnedit.compiler.errors import AttneditError
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.mla.initialise import Split, analytic, mix_components
from attnedit.passes.mla.least_squares import logit_target, refit_latent, refit_output, refit_query
from attnedit.passes.mla.shapes import Shape
from attnedit.passes.mla.weights import Factors
from attnedit.passes.sample import LayerSample

ROUNDING = 1e-6
"""Of the output's relative squared error, which is a difference of float32 sums."""


@dataclass(frozen=True)
class Fit:
    """Weights, the share of the weighted second moment kept, and the output's relative squared error."""

    factors: Factors
    energy_kept: float
    output_error: float


@torch.no_grad()
def fit_layer(samples: Sequence[LayerSample], shape: Shape, options: FitOptions) -> Fit:
    """Closed-form MLA weights of one layer; see docs/method.md for the steps. The best of all rounds is kept.

    Raises:
        AttneditError: nothing finite was found.
    """
    components = mix_components(samples, shape.fold, shape.columns) if shape.slots else None
    factors, energy = analytic(samples, Split.of(samples, components, shape.slots), shape.rank)
    return refine(samples, factors, energy, options)


@torch.no_grad()
def refine(samples: Sequence[LayerSample], factors: Factors, energy: float, options: FitOptions) -> Fit:
    """Refit weights by least squares, in rounds; the best of all is kept.

    Args:
        samples: of the layer, or of some of its query heads.
        factors: to begin with.
        energy: that the latent keeps.
        options: of the fit.

    Raises:
        AttneditError: nothing finite was found.
    """
    output, error = refit_output(samples, factors)
    best = Fit(output, energy, error)
    sides = (refit_query, refit_latent) if options.latent_side else (refit_query,)
    if options.alternations:
        few = [sample.thinned(max(1, round(len(sample.positions) * options.logit_share))) for sample in samples]
    for turn, refit in enumerate(sides * options.alternations):
        target = logit_target(few, factors if turn else None)
        factors, error = refit_output(samples, refit(few, factors, target, options.iterations))
        # Logits stand in for what is attended; where few keys take all of it, that may fail.
        if error <= best.output_error + ROUNDING:
            best = Fit(factors, energy, error)
    if not math.isfinite(best.output_error):
        raise AttneditError("queries, keys or values are too large for float32, so that no latent can be fitted")
    return best

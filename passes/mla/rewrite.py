"""The MLA pass as a whole: fit every layer that becomes latent on the calibration stream."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.model_inputs import given_digest
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.progress import Progress, track
from attnedit.passes.effort import effort_on, queries_for
from attnedit.passes.kept_fits import KeptFits, digest
from attnedit.passes.layer_loss import loss_increases, measured_rows
from attnedit.passes.mla.assemble import build, exact_factors
from attnedit.passes.mla.budget import Shape
from attnedit.passes.mla.fit import Fit, FitOptions, fit_layer
from attnedit.passes.mla.linear import LinearSite, linearise
from attnedit.passes.site_sample import output_weight, take_samples

FIT_TOKENS = 16_384
"""Calibration tokens of each length for the quick fits whose losses are measured; at least two windows."""


@dataclass(frozen=True)
class Latent:
    """What the pass did, by the site's name.

    Attributes:
        graphs: of the layers that became latent.
        fits: what was measured of those that are not exact.
        linear: maps that stand for queries, keys and values, where they were asked for.
    """

    graphs: dict[str, fx.GraphModule]
    fits: dict[str, Fit]
    linear: dict[str, LinearSite] = field(default_factory=dict)


def latent_layers(
    source: PreTrainedModel,
    result: PreTrainedModel,
    sites: list[AttentionSite],
    shapes: Mapping[str, Shape],
    options: FitOptions,
    windows: Sequence[Tensor] | None,
    *,
    linear: bool = False,
    seed: int = 0,
    kept: KeptFits | None = None,
    progress: Progress | None = None,
) -> Latent:
    """Rewrite attention sites into latent attention; nothing is put into the models yet.

    Args:
        source: live source model in eval mode.
        result: the model that the graphs are for; it shares the source's tensors.
        sites: those to rewrite.
        shapes: what each caches, by the site's name.
        options: of the fits.
        windows: calibration token ids [N, T] of each length T; None where every shape is exact, which needs no data.
        linear: whether queries, keys and values are to be linear in the hidden states, without norm and bias, be the
            source's so or not; no shape is exact then.
        seed: of the sampled queries.
        kept: where fits are kept and looked for; not those with maps.
        progress: see `attnedit.compiler.progress`.

    Raises:
        CaptureError: a layer cannot be rewritten.
    """
    graphs: dict[str, fx.GraphModule] = {}
    fits: dict[str, Fit] = {}
    maps: dict[str, LinearSite] = {}
    if windows is None:
        for site in track(sites, "build layers", progress):
            graphs[site.name] = exact_layer(result, site, shapes[site.name])
        return Latent(graphs, fits)

    def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
        work = (shapes[site.name], options, windows, seed)
        graphs[site.name], fit, linear_site = fit_site(source, result, site, inputs, *work, linear=linear, kept=kept)
        if fit is not None:
            fits[site.name] = fit
        if linear_site is not None:
            maps[site.name] = linear_site

    stream(source, sites, windows, visit, progress=progress, stage="fit layers", exact=options.exact_stream)
    return Latent(graphs, fits, maps)


def fit_site(
    source: PreTrainedModel,
    result: PreTrainedModel,
    site: AttentionSite,
    inputs: Iterator[AttentionInputs],
    shape: Shape,
    options: FitOptions,
    windows: Sequence[Tensor],
    seed: int,
    *,
    linear: bool = False,
    kept: KeptFits | None = None,
) -> tuple[fx.GraphModule, Fit | None, LinearSite | None]:
    """Fit and build one site's latent attention on what its module is called with; see `latent_layers`.

    Returns:
        The graph; its fit, None of an exact shape; the maps, None unless asked for.
    """
    if shape.exact:
        return exact_layer(result, site, shape), None, None
    maps: LinearSite | None = None

    def make() -> Fit:
        nonlocal maps
        queries = queries_for(source, windows, options.output_queries)
        samples = take_samples(source, site, inputs, queries, seed, hidden=linear)
        if linear:
            maps, samples = linearise(source, site, samples)
        return fit_layer(samples, shape, options)

    made_from = "" if kept is None else digest(*windows, given_digest(), shape, options, seed)
    fit = make() if kept is None or linear else kept.get(Fit, site.name, made_from, make)
    return build(result, site, shape, fit.factors, maps), fit, maps


def single_losses(
    source: PreTrainedModel,
    result: PreTrainedModel,
    sites: list[AttentionSite],
    shapes: Mapping[str, Shape],
    windows: Sequence[Tensor],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What the model loses with one layer alone latent, after a quick fit, on windows that the fit has not seen.

    Args:
        source: see `latent_layers`, as for the other arguments.
        result: nothing is put into it.
        sites: those that become latent.
        shapes: what each caches, by the site's name.
        windows: calibration token ids [N, T] of each length T, longest first.
        seed: of the sampled queries and of the repeated passages.
        progress: told of the fits and of the measurements.

    Returns:
        Mean KL(source || result) in nats per token, by the site's name.

    Raises:
        CaptureError: a layer cannot be rewritten, or layers exchange more than hidden states.
    """
    seen, rows = measured_rows(windows, seed, effort_on(source).measured_long)
    few = [part[: max(2, FIT_TOKENS // part.shape[1])] for part in seen]
    latent = latent_layers(source, result, sites, shapes, FitOptions.of(1), few, seed=seed, progress=progress)
    return loss_increases(source, sites, latent.graphs, rows, progress=progress)


def exact_layer(model: PreTrainedModel, site: AttentionSite, shape: Shape) -> fx.GraphModule:
    """One layer of the lossless shape, which needs no data; see `build` for the arguments."""
    return build(model, site, shape, exact_factors(site, shape, output_weight(model, site)[0]))

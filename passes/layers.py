"""A target's fits of all layers of a live model, and which of them keep what they have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.progress import Progress, track
from attnedit.passes.effort import effort_on
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.layer_loss import loss_increases, measured_rows
from attnedit.passes.questions import Claim, SiteFit, SiteWork
from attnedit.passes.target import AnyTarget

FIT_TOKENS = 16_384
"""Calibration tokens of each length for the quick fits whose losses are measured; at least two windows."""


@dataclass(frozen=True)
class Layers:
    """What a target did, by the site's name.

    Attributes:
        fits: of the layers that it changes.
        left: layers that keep what they have, ascending.
        loss_increases: measured divergence of changing one layer alone; empty if not measured.
    """

    fits: Mapping[str, SiteFit]
    left: list[int] = field(default_factory=list)
    loss_increases: Mapping[str, float] = field(default_factory=dict)

    @property
    def graphs(self) -> dict[str, fx.GraphModule]:
        """Of the layers that it changes."""
        return {name: fit.graph for name, fit in self.fits.items()}


def fit_layers(
    target: AnyTarget,
    source: PreTrainedModel,
    result: PreTrainedModel,
    sites: list[AttentionSite],
    claim: Claim,
    windows: Sequence[Tensor] | None,
    *,
    seed: int = 0,
    kept: KeptFits | None = None,
    progress: Progress | None = None,
) -> Layers:
    """Rewrite attention sites as a target wants them; nothing is put into the models yet.

    Args:
        target: configured.
        source: live source model in eval mode.
        result: the model that the graphs are for; it shares the source's tensors.
        sites: those that it may change.
        claim: what it makes of them.
        windows: calibration token ids [N, T] of each length T, longest first; None where every shape is exact.
        seed: of sampled queries and of the repeated passages that losses are measured on.
        kept: where fits are kept and looked for.
        progress: see `attnedit.compiler.progress`.

    Raises:
        UsageError: the data does not show what is lost.
        CaptureError: a layer cannot be rewritten, or layers exchange more than hidden states.
    """
    tried = [site for site in sites if site.name in claim.shapes]
    fits: dict[str, SiteFit] = {}
    if windows is None:
        for site in track(tried, "build layers", progress):
            shape = claim.shapes[site.name]
            fits[site.name] = target.fit_site(SiteWork(source, result, site, iter(()), (), seed), shape)
        return Layers(fits)
    target.check_data(windows)

    def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
        work = SiteWork(source, result, site, inputs, windows, seed, kept)
        fits[site.name] = target.fit_site(work, claim.shapes[site.name])

    stage = f"fit {target.stage if target.leaves else 'layers'}"
    stream(source, tried, windows, visit, progress=progress, stage=stage, exact=target.exact_stream)
    if not isinstance(claim.leave, int):
        return Layers(fits, claim.leave)
    increases: dict[str, float] = {}
    if claim.leave:
        rows = measured_rows(windows, seed, effort_on(source).measured_long)[1]
        graphs = {name: fit.graph for name, fit in fits.items()}
        increases = loss_increases(source, tried, graphs, rows, progress=progress)
    dearest = sorted(tried, key=lambda site: -increases.get(site.name, 0.0))[: claim.leave]
    stay = {site.name for site in dearest}
    left = sorted(site.layer_idx for site in dearest)
    return Layers({name: fit for name, fit in fits.items() if name not in stay}, left, increases)


def single_losses(
    target: AnyTarget,
    source: PreTrainedModel,
    result: PreTrainedModel,
    sites: list[AttentionSite],
    claim: Claim,
    windows: Sequence[Tensor],
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """What the model loses with one layer alone changed, after a quick fit, on windows that the fit has not seen.

    The arguments are those of `fit_layers`; nothing is put into the result.

    Returns:
        Mean KL(source || result) in nats per token, by the site's name.

    Raises:
        CaptureError: a layer cannot be rewritten, or layers exchange more than hidden states.
    """
    seen, rows = measured_rows(windows, seed, effort_on(source).measured_long)
    few = [part[: max(2, FIT_TOKENS // part.shape[1])] for part in seen]
    layers = fit_layers(target.quick(), source, result, sites, claim, few, seed=seed, progress=progress)
    return loss_increases(source, sites, layers.graphs, rows, progress=progress)

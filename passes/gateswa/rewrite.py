"""The GateSWA pass as a whole: fit every layer that could get a window, then choose those that do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.model_inputs import given_digest
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.progress import Progress
from attnedit.passes.effort import effort_on, queries_for
from attnedit.passes.gateswa.build import build
from attnedit.passes.gateswa.fit import WindowFit, fit_window
from attnedit.passes.gateswa.options import GateSWAOptions
from attnedit.passes.kept_fits import KeptFits, digest
from attnedit.passes.layer_loss import loss_increases, measured_rows
from attnedit.passes.site_sample import take_samples

QUERIES = 16384
"""Sampled queries over all calibration sequences."""


@dataclass(frozen=True)
class Windowed:
    """What the pass did.

    Attributes:
        graphs: of the layers that got a window, by the site's name.
        fits: their weights and errors.
        full: layers that stay full, ascending.
        loss_increases: measured divergence of windowing one layer alone, by the site's name; empty if not measured.
    """

    graphs: dict[str, fx.GraphModule]
    fits: dict[str, WindowFit]
    full: list[int]
    loss_increases: dict[str, float] = field(default_factory=dict)


def window_layers(
    source: PreTrainedModel,
    result: PreTrainedModel,
    sites: list[AttentionSite],
    options: GateSWAOptions,
    full: int | list[int],
    windows: Sequence[Tensor],
    *,
    seed: int = 0,
    kept: KeptFits | None = None,
    progress: Progress | None = None,
) -> Windowed:
    """Rewrite attention sites into windowed attention; nothing is put into the models yet.

    Args:
        source: live source model in eval mode.
        result: the model that the graphs are for; it shares the source's tensors.
        sites: those that could get a window.
        options: form of the new attention.
        full: layers that stay full, or how many: then those whose windows cost most.
        windows: calibration token ids [N, T] of each length T.
        seed: of the sampled queries.
        kept: where fits are kept and looked for.
        progress: see `attnedit.compiler.progress`.

    Raises:
        UsageError: no query of the calibration data loses anything to the window.
        CaptureError: a layer cannot be rewritten.
    """
    check_loss(windows, options)
    tried = sites if isinstance(full, int) else [site for site in sites if site.layer_idx not in full]
    graphs: dict[str, fx.GraphModule] = {}
    fits: dict[str, WindowFit] = {}

    def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
        work = (options, windows, seed)
        graphs[site.name], fits[site.name] = fit_site(source, result, site, inputs, *work, kept=kept)

    stream(source, tried, windows, visit, progress=progress, stage="fit windows")
    if not isinstance(full, int):
        return Windowed(graphs, fits, full)
    increases: dict[str, float] = {}
    if full:
        rows = measured_rows(windows, seed, effort_on(source).measured_long)[1]
        increases = loss_increases(source, tried, graphs, rows, progress=progress)
    dearest = sorted(tried, key=lambda site: -increases.get(site.name, 0.0))[:full]
    stay = {site.name for site in dearest}
    return Windowed(
        {name: graph for name, graph in graphs.items() if name not in stay},
        {name: fit for name, fit in fits.items() if name not in stay},
        sorted(site.layer_idx for site in dearest),
        increases,
    )


def fit_site(
    source: PreTrainedModel,
    result: PreTrainedModel,
    site: AttentionSite,
    inputs: Iterator[AttentionInputs],
    options: GateSWAOptions,
    windows: Sequence[Tensor],
    seed: int,
    *,
    kept: KeptFits | None = None,
) -> tuple[fx.GraphModule, WindowFit]:
    """Fit and build one site's windowed attention on what its module is called with; see `window_layers`."""
    config = options.config(site)

    def make() -> WindowFit:
        return fit_window(take_samples(source, site, inputs, queries_for(source, windows, QUERIES), seed), config)

    made_from = "" if kept is None else digest(*windows, given_digest(), config, seed)
    fit = make() if kept is None else kept.get(WindowFit, site.name, made_from, make)
    return build(result, site, config, fit), fit


def check_loss(windows: Sequence[Tensor], options: GateSWAOptions) -> None:
    """Refuse calibration windows [N, T] of each length T that show nothing of what the attention's windows take away.

    Raises:
        UsageError: they are too short.
    """
    longest = max(part.shape[1] for part in windows)
    if longest <= options.cached_tokens:
        raise UsageError(
            f"window {options.window}: calibration windows of {longest} tokens lose nothing to it; "
            "give a smaller window"
        )

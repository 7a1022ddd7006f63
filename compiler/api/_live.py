"""A live model as the source of a pipeline: targets are fitted one after another, each on what those before it left."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attnedit._stages import Job, Source
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.model_io.devices import resolve_device
from attnedit.compiler.model_io.heads import check_text_alone
from attnedit.compiler.model_io.live_checks import check_in_memory, check_live
from attnedit.compiler.model_io.source_checks import check_config, check_weights, model_name
from attnedit.compiler.progress import track
from attnedit.compiler.reporting.records import PipelineStage
from attnedit.compiler.rewriting.dumps import Dump
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.options import CompileOptions
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.layer_loss import loss_increases, measured_rows
from attnedit.passes.questions import Claim, Question, SiteFit, SiteWork
from attnedit.passes.site_sample import effort_on
from attnedit.passes.target import AnyTarget, AttentionTarget
from attnedit.planning import Plan, check_fresh, check_head
from attnedit.targets.attention.kinds import config_of, kind_of
from attnedit.targets.runtime.eager import share_copy

FIT_TOKENS = 16_384
"""Calibration tokens of each length for the quick fits whose losses are measured; at least two windows."""
_SHARES_NOTE = "latent layers share the cache by what each costs alone; allocation='even' gives all the same"


class LiveSource(Source):
    """A live model, rewritten in memory; see `attnedit._stages.Source`."""

    def __init__(self, model: PreTrainedModel, options: CompileOptions, kept: KeptFits | None = None) -> None:
        self._kept, self.options, self.name = kept, options, model_name(model)
        self.fuel, self.dump = Fuel(options.fuel), Dump(options.dump_graphs)
        if (record := getattr(model.config, "attnedit", None)) is not None:
            self.check_again(model)
        check_live(model, self.name)
        if record is None:
            check_config(model.config, self.name, trust_remote_code=True)  # what is live has run already
        check_head(model, options)
        check_in_memory(model, self.name)
        if options.profile or options.engine:
            check_text_alone(model.config, self.name, "a profile or an engine")
        if record is None:
            check_weights(model, self.name)
        self.model = self.result = self._on_device(model)
        self._changed: dict[int, float] = {}
        self._alone: dict[str, float] = {}

    def check_again(self, model: PreTrainedModel) -> None:
        """Refuse a model that attnedit has rewritten."""
        check_fresh(model, self.name)

    def capture(self) -> list[AttentionSite]:
        """Its attention sites."""
        return capture(self.model)

    def ready(self, plan: Plan) -> None:
        """Make the model that becomes the result."""
        self.result = self.model if self.options.in_place else share_copy(self.model)

    def measure(self, job: Job, target: Target | None, entry: PipelineStage) -> None:
        """What each layer costs alone after a quick fit, where shares go by it."""
        assert isinstance(target, AttentionTarget)
        super().measure(job, target, entry)
        claim = target.plan(self._question(job, target))
        if job.windows is None or not target.by_loss(claim, self.left):
            return
        self._alone = self.costs(target, claim, job.windows)
        entry.did = f"{len(self._alone)} layers measured"
        job.fitted.loss_increase |= self._alone
        job.fitted.notes.append(_SHARES_NOTE)

    def fit(self, job: Job, target: Target | None, entry: PipelineStage) -> None:
        """All layers that a target changes."""
        assert isinstance(target, AttentionTarget)
        fitted, start = job.fitted, perf_counter()
        claim = target.plan(dataclasses.replace(self._question(job, target), losses=self._alone or None))
        fits, stay, costs = self.layers(target, claim, job.windows, self._kept)
        entry.did = f"{len(fits)} layers became {target.kind.title}"
        entry.did += f", {len(stay)} stay as they are" if target.leaves else ""
        fitted.loss_increase |= costs
        fitted.notes += [*([_choice_note(stay)] if costs else []), *target.fitted_notes(fits)]
        fitted.full = stay if target.leaves else fitted.full
        fitted.matched[target.name] = fits
        for name, fit in fits.items():
            fitted.graphs[name], fitted.contracts[name] = fit.graph, fit.contract.kind
            for measured, figure in ((fitted.energy_kept, fit.energy_kept), (fitted.output_error, fit.output_error)):
                if figure is not None:
                    measured[name] = figure
        done = [site for site in self.left if site.name in fits]
        self._changed |= {site.layer_idx: claim.shapes[site.name].values for site in done}
        self.left, self._alone = [site for site in self.left if site.name not in fits], {}
        fitted.spent[target.name] = perf_counter() - start

    def layers(
        self, target: AnyTarget, claim: Claim, windows: Sequence[Tensor] | None, kept: KeptFits | None = None
    ) -> tuple[dict[str, SiteFit], list[int], dict[str, float]]:
        """Rewrite attention sites as a target wants them; nothing is put into the models yet.

        Args:
            target: configured.
            claim: what it makes of the sites that are left.
            windows: calibration token ids [N, T] of each length T, longest first; None where every shape is exact.
            kept: where fits are kept and looked for.

        Returns:
            Fits by the site's name, layers that keep what they have, and what each costs alone where that says which.

        Raises:
            UsageError: the data does not show what is lost.
            CaptureError: a layer cannot be rewritten, or layers exchange more than hidden states.
        """
        seed, progress = self.options.seed, self.options.progress
        tried, fits = [site for site in self.left if site.name in claim.shapes], dict[str, SiteFit]()

        def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
            work = SiteWork(self.model, self.result, site, inputs, windows or (), seed, kept)
            fits[site.name] = target.fit_site(work, claim.shapes[site.name])

        if windows is None:
            for site in track(tried, "build layers", progress):
                visit(site, iter(()))
            return fits, [], {}
        target.check_data(windows)
        stage = f"fit {target.stage if target.leaves else 'layers'}"
        stream(self.model, tried, windows, visit, progress=progress, stage=stage, exact=target.exact_stream)
        if not isinstance(claim.leave, int):
            return fits, claim.leave, {}
        rows = self._measured(windows)[1] if claim.leave else None
        costs = {} if rows is None else self._costs(tried, fits, rows)
        stay = sorted(tried, key=lambda site: -costs.get(site.name, 0.0))[: claim.leave]
        fits = {name: fit for name, fit in fits.items() if all(site.name != name for site in stay)}
        return fits, sorted(site.layer_idx for site in stay), costs

    def costs(self, target: AnyTarget, claim: Claim, windows: Sequence[Tensor]) -> dict[str, float]:
        """What the model loses with one layer alone changed, after a quick fit, on windows that the fit has not seen.

        The arguments are those of `layers`; nothing is put into the result.

        Returns:
            Mean KL(source || result) in nats per token, by the site's name.
        """
        seen, rows = self._measured(windows)
        few = [part[: max(2, FIT_TOKENS // part.shape[1])] for part in seen]
        return self._costs(self.left, self.layers(target.quick(), claim, few)[0], rows)

    def _measured(self, windows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        return measured_rows(windows, self.options.seed, effort_on(self.model).measured_long)

    def _costs(
        self, sites: list[AttentionSite], fits: Mapping[str, SiteFit], rows: Sequence[Tensor]
    ) -> dict[str, float]:
        graphs = {name: fit.graph for name, fit in fits.items()}
        return loss_increases(self.model, sites, graphs, rows, progress=self.options.progress)

    def lower(self, job: Job) -> None:
        """As many graphs as there is fuel for."""
        fitted, chosen = job.fitted, job.plan.chosen
        graphs = fitted.graphs = self.fuel.limit(fitted.graphs, [site.name for site in chosen])
        fitted.notes += self.fuel.note()
        for site in (site for site in chosen if site.name in graphs):
            kind = kind_of(config_of(graphs[site.name])).name
            self.dump(kind, site.name, graph_module(self.model, site), graphs[site.name])

    def _question(self, job: Job, target: AnyTarget) -> Question:
        return job.plan.question(target, self.left, self._changed)

    def _on_device(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model, or a copy that shares its tensors, where it is to be worked on."""
        if self.options.device is None:
            return model
        moved: Any = model if self.options.in_place else share_copy(model)
        found: PreTrainedModel = moved.to(resolve_device(self.options.device))
        return found


def _choice_note(full: list[int]) -> str:
    listed = ",".join(map(str, full)) + ("," if len(full) == 1 else "")
    return f"full layers chosen by measured loss; full_layers={listed!r} takes them again without measuring"

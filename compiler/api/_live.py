"""A live model as the source of a pipeline: targets are fitted one after another, each on what those before it left."""

from __future__ import annotations

import dataclasses
from time import perf_counter
from typing import Any

from transformers import PreTrainedModel

from attnedit._stages import Job, Source
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.model_io.devices import resolve_device
from attnedit.compiler.model_io.heads import check_text_alone
from attnedit.compiler.model_io.live_checks import check_in_memory, check_live
from attnedit.compiler.model_io.source_checks import check_config, check_weights, model_name
from attnedit.compiler.reporting.records import PipelineStage
from attnedit.compiler.rewriting.dumps import Dump
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.options import CompileOptions
from attnedit.passes.kept_fits import KeptFits
from attnedit.passes.layers import fit_layers, single_losses
from attnedit.passes.questions import Question
from attnedit.passes.target import AnyTarget
from attnedit.planning import Plan, check_fresh, check_head
from attnedit.targets.attention.kinds import config_of, kind_of
from attnedit.targets.runtime.eager import share_copy

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

    def measure(self, job: Job, target: AnyTarget, entry: PipelineStage) -> None:
        """What each layer costs alone after a quick fit, where shares go by it."""
        entry.did = "shares are even, nothing was measured"
        claim = target.plan(self._question(job, target))
        if job.windows is None or not target.by_loss(claim, self.left):
            return
        given: dict[str, Any] = {"seed": self.options.seed, "progress": self.options.progress}
        self._alone = single_losses(target, self.model, self.result, self.left, claim, job.windows, **given)
        entry.did = f"{len(self._alone)} layers measured"
        job.fitted.loss_increase |= self._alone
        job.fitted.notes.append(_SHARES_NOTE)

    def fit(self, job: Job, target: AnyTarget | None, entry: PipelineStage) -> None:
        """All layers that a target changes."""
        assert target is not None
        fitted, start = job.fitted, perf_counter()
        claim = target.plan(dataclasses.replace(self._question(job, target), losses=self._alone or None))
        given: dict[str, Any] = {"seed": self.options.seed, "kept": self._kept, "progress": self.options.progress}
        layers = fit_layers(target, self.model, self.result, self.left, claim, job.windows, **given)
        entry.did = f"{len(layers.fits)} layers became {target.kind.title}"
        entry.did += f", {len(layers.left)} stay as they are" if target.leaves else ""
        fitted.loss_increase |= layers.loss_increases
        fitted.notes += [_choice_note(layers.left)] if layers.loss_increases else []
        fitted.notes += target.fitted_notes(layers.fits)
        fitted.full = layers.left if target.leaves else fitted.full
        fitted.matched[target.name] = layers.fits
        for name, fit in layers.fits.items():
            fitted.graphs[name], fitted.contracts[name] = fit.graph, fit.contract.kind
            for measured, figure in ((fitted.energy_kept, fit.energy_kept), (fitted.output_error, fit.output_error)):
                if figure is not None:
                    measured[name] = figure
        done = [site for site in self.left if site.name in layers.fits]
        self._changed |= {site.layer_idx: claim.shapes[site.name].values for site in done}
        self.left, self._alone = [site for site in self.left if site.name not in layers.fits], {}
        fitted.spent[target.name] = perf_counter() - start

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

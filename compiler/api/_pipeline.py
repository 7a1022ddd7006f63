"""The one pipeline: for targets and for rewrites, on a live model and on a checkpoint that is read layer by layer."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit._stages import Log, said
from attnedit.compiler.capture.capture import as_captured
from attnedit.compiler.capture.kept_exports import keeping
from attnedit.compiler.capture.probe import sees_ahead
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.transformers_names import repeated_heads
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.lengths import record_lengths
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.compiler.evaluation.positions import loss_curve
from attnedit.compiler.execution.model_inputs import giving
from attnedit.compiler.execution.verify import (
    check_tokens,
    decode_error,
    decode_note,
    logits_of,
    same_decode,
    same_logits,
)
from attnedit.compiler.graph.modules import evaluating, set_modes
from attnedit.compiler.model_io.devices import resolve_device
from attnedit.compiler.model_io.heads import has_language_head
from attnedit.compiler.reporting.records import KVUsage
from attnedit.compiler.reporting.report import Report
from attnedit.figures import engine_notes, site_graphs
from attnedit.options import CompileOptions
from attnedit.passes.beginnings import beginnings
from attnedit.passes.effort import effort_on
from attnedit.planning import Plan, calibration_windows, plan_sites
from attnedit.recipe import Recipe
from attnedit.rows import Fitted, compile_report
from attnedit.targets.attention.kinds import config_of
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit, use_captured_implementation
from attnedit.targets.runtime.hf.towards import check_form

FITTED = "calibration windows, on which it was fitted"


class Source(ABC):
    """A model to rewrite, with where its result goes.

    Attributes:
        model: live, or with its weights on meta.
        result: what the new attention is put into; the model itself or a copy that shares its tensors.
        name: in messages.
        device: where prompts belong; None for that of the weights.
        few_passes: every pass through the model or its result costs reading it.
    """

    model: PreTrainedModel
    result: PreTrainedModel
    name: str
    device: torch.device | None = None
    few_passes = False

    @abstractmethod
    def capture(self) -> list[AttentionSite]:
        """Its attention sites."""

    def plan(self, sites: list[AttentionSite], before: KVUsage, options: CompileOptions) -> Plan:
        """What is to become of the sites."""
        return plan_sites(self.model, sites, before, options)

    @abstractmethod
    def ready(self, plan: Plan) -> None:
        """Refuse a plan that cannot be done here, before data is read."""

    def data(self, options: CompileOptions) -> CalibrationWindows:
        """Windows of calibration data."""
        return calibration_windows(self.model, options)

    @abstractmethod
    def fit(self, plan: Plan, windows: list[Tensor] | None, log: Log) -> Fitted:
        """New attention for every site that changes; no data where nothing is lost."""

    def reading(self, result: PreTrainedModel | None = None) -> AbstractContextManager[None]:
        """Inside, forward passes of the model work, or of its result."""
        return nullcontext()


@repeated_heads()
def run(source: Source, options: CompileOptions) -> tuple[PreTrainedModel, Report]:
    """Rewrite a source; what is left is to train, or to write what is no weight.

    Raises:
        UsageError: wrong input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract.
    """
    log, model = Log(options.progress), source.model
    modes = evaluating(model)
    implementation = contextlib.ExitStack()
    implementation.enter_context(keeping(options.capture_cache))
    try:
        with log("capture", bar=True) as entry:
            sites = source.capture()
            implementation.enter_context(as_captured(model, sites))
            plan = source.plan(sites, kv_usage(model), options)
            entry.did = f"{len(sites)} attention sites, {len(plan.chosen)} of them to change"
            exact = plan.exact
        source.ready(plan)
        data = windows = None
        if plan.needs_data:
            with log("data") as entry:
                data = source.data(options)
                entry.did = f"{data} windows, {data.tokens:,} tokens"
            windows = data.parts
            plan.notes.extend(data.notes)
            implementation.enter_context(giving(data.inputs, model, source.result))
            if data.inputs.by_ids and sees_ahead(model):
                plan.notes.append("tokens of an image see each other both ways; fits take them as looking back only")
        fitted = source.fit(plan, None if data is None else _fitted_on(data, plan, options.seed), log)
        configs = {site.name: config_of(fitted.graphs[site.name]) for site in plan.chosen if site.name in fitted.graphs}
        held = max((target.cached_tokens for target in plan.targets), default=0)
        ids = check_tokens(windows, model, held, source.device)
        expected, own_error = None, 0.0
        if options.verify:
            with source.reading():
                expected = logits_of(model, ids) if exact else None
                own_error = 0.0 if source.few_passes else decode_error(model, ids, len(sites))
        with log("lower") as entry:
            drawn = site_graphs(model, plan, fitted.graphs, configs)
            splice(source.result, fitted.graphs)
            result = to_attnedit(source.result, configs)
            record_lengths(result, calibration=None if data is None else data.length)
            if options.form is not None:
                check_form(result, options.form)
            entry.did = f"{len(configs)} sites"
        checks, curve = list(fitted.checks), None
        losses = has_language_head(model) and not source.few_passes
        if options.verify:
            with log("verify", bar=True) as entry, source.reading(result):
                held_to = [] if expected is None else [same_logits(expected, result, ids)]
                few = source.few_passes
                held_to.append(same_decode(result, ids, fitted.rounding, own=own_error, few_passes=few))
                worth = plan.targets and options.alternations > 1 and result is not model and losses
                if windows is not None and worth and data is not None and not data.inputs.by_ids:
                    rows = windows[0][: effort_on(model).measured_long]
                    curve = loss_curve(model, result, rows, FITTED, options.progress)
                entry.did, entry.checked = f"{ids.shape[1]} tokens", [said(check) for check in held_to]
                checks += held_to
    finally:
        implementation.close()
        set_modes(model, modes)
    use_captured_implementation(result, sites)
    set_modes(result, modes)
    report = compile_report(
        result,
        plan,
        configs,
        fitted,
        data,
        source=source.name,
        verification=checks,
        seconds=log.seconds,
        pipeline=log.entries,
        notes=[*plan.notes, *fitted.notes, *engine_notes(result, plan, configs), *decode_note(own_error)],
        graphs=drawn,
        loss_curve=curve,
    )
    return result, report


def _fitted_on(data: CalibrationWindows, plan: Plan, seed: int) -> list[Tensor]:
    """Windows, and beginnings where a target wants them; where images go with windows, those are run as they are."""
    wanted = any(target.begins for target in plan.targets) and not data.inputs.by_ids
    return [*data.parts, *(beginnings(data.parts, seed) if wanted else [])]


def with_recipe(report: Report, options: CompileOptions, model: str | None) -> Report:
    """The report with what was asked for; `model` names the source, where it has a name."""
    recipe = Recipe.from_options(options, report.full_layers, report.calibration_length, model)
    return report.model_copy(update={"recipe": recipe.model_dump(exclude_defaults=True)})


def on_device(model: PreTrainedModel, options: CompileOptions) -> PreTrainedModel:
    """The model, or a copy that shares its tensors, where it is to be worked on."""
    if options.device is None:
        return model
    moved: Any = model if options.in_place else share_copy(model)
    found: PreTrainedModel = moved.to(resolve_device(options.device))
    return found

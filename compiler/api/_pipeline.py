"""The one pipeline as a list of stages: for targets and rewrites, live models and checkpoints; run, and explained."""

from __future__ import annotations

from typing import Any

from attnedit._calibrate import train
from attnedit._stages import Job, Stage, said
from attnedit.compiler.capture.capture import as_captured
from attnedit.compiler.capture.kept_exports import keeping
from attnedit.compiler.capture.probe import sees_ahead
from attnedit.compiler.compatibility.transformers_names import repeated_heads
from attnedit.compiler.data.lengths import record_lengths
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.compiler.evaluation.positions import loss_curve
from attnedit.compiler.execution.model_inputs import giving
from attnedit.compiler.execution.verify import decode_error, decode_note, logits_of, same_decode, same_logits
from attnedit.compiler.graph.modules import evaluating, set_modes
from attnedit.compiler.model_io.heads import has_language_head
from attnedit.compiler.reporting.records import PipelineStage
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.options import CompileOptions, SourceOptions
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.site_sample import effort_on
from attnedit.passes.target import AttentionTarget
from attnedit.passes.targets import OWN
from attnedit.result import CompileResult
from attnedit.rows import compile_report, engine_notes, site_graphs
from attnedit.targets.attention.kinds import config_of
from attnedit.targets.runtime.eager import splice, to_attnedit, use_captured_implementation
from attnedit.targets.runtime.hf.towards import check_form

FITTED_ON = "calibration windows, on which it was fitted"


def _load(job: Job, entry: PipelineStage) -> None:
    job.source = job.opens(job.options)
    job.options = job.source.options
    entry.did = f"{type(job.source.model).__name__} in {str(job.source.model.dtype).removeprefix('torch.')}"


def _capture(job: Job, entry: PipelineStage) -> None:
    source, model, closing = job.source, job.source.model, job.closing
    closing.enter_context(repeated_heads())
    job.modes = evaluating(model)
    closing.callback(set_modes, model, job.modes)
    closing.enter_context(keeping(job.options.capture_cache))
    job.sites = source.capture()
    closing.enter_context(as_captured(model, job.sites))
    job.plan = source.plan(job.sites, kv_usage(model))
    entry.did = f"{len(job.sites)} attention sites, {len(job.plan.chosen)} of them to change"
    _ = job.plan.exact  # a budget that cannot be met is refused here
    source.left = job.plan.chosen
    source.ready(job.plan)


def _data(job: Job, entry: PipelineStage) -> None:
    source, notes = job.source, job.plan.notes
    job.data = data = source.data()
    entry.did = f"{data} windows, {data.tokens:,} tokens"
    notes += data.notes
    job.closing.enter_context(giving(data.inputs, source.model, source.result))
    if data.inputs.by_ids and sees_ahead(source.model):
        notes.append("tokens of an image see each other both ways; fits take them as looking back only")


def _refer(job: Job, entry: PipelineStage) -> None:
    source, model = job.source, job.source.model
    with source.reading():
        job.expected = logits_of(model, job.ids) if job.plan.exact else None
        job.own_error = 0.0 if source.few_passes else decode_error(model, job.ids, len(job.sites))
    entry.did = f"{job.ids.shape[1]} tokens"


def _lower(job: Job, entry: PipelineStage) -> None:
    source, plan, options, fitted = job.source, job.plan, job.options, job.fitted
    source.lower(job)
    graphs = fitted.graphs
    job.configs = {site.name: config_of(graphs[site.name]) for site in plan.chosen if site.name in graphs}
    job.drawn = site_graphs(source.model, plan, graphs, job.configs)
    splice(source.result, graphs)
    job.result = to_attnedit(source.result, job.configs)
    record_lengths(job.result, calibration=None if job.data is None else job.data.length)
    if options.form is not None:
        check_form(job.result, options.form)
    entry.did = f"{len(job.configs)} sites"


def _verify(job: Job, entry: PipelineStage) -> None:
    source, options, ids, data = job.source, job.options, job.ids, job.data
    few, model = source.few_passes, source.model
    with source.reading(job.result):
        held = [] if job.expected is None else [same_logits(job.expected, job.result, ids)]
        held.append(same_decode(job.result, ids, job.fitted.rounding, own=job.own_error, few_passes=few))
        two = job.result is not model and has_language_head(model) and not few
        if options.planned and options.alternations > 1 and two and data is not None and not data.inputs.by_ids:
            rows = data.parts[0][: effort_on(model).measured_long]
            job.curve = loss_curve(model, job.result, rows, FITTED_ON, options.progress)
    entry.did, entry.checked = f"{ids.shape[1]} tokens", [said(check) for check in held]
    job.checks = held


def _train(job: Job, entry: PipelineStage) -> None:
    job.closing.close()
    job.done = train(outcome(job), job.source.model, job.options)
    entry.did = ", ".join(each.name for each in job.done.report.stages)


def outcome(job: Job) -> CompileResult:
    """What a job gives, once its stages ran: the result in the source's modes, and the report."""
    if job.done is not None:
        return job.done
    result, plan, options = job.result, job.plan, job.options
    job.closing.close()
    use_captured_implementation(result, job.sites)
    set_modes(result, job.modes)
    notes = [*plan.notes, *job.fitted.notes, *engine_notes(result, plan, job.configs), *decode_note(job.own_error)]
    report = compile_report(
        result,
        plan,
        job.configs,
        job.fitted,
        job.data,
        source=job.source.name,
        verification=[*job.fitted.checks, *job.checks],
        seconds=job.log.seconds,
        pipeline=job.log.entries,
        notes=notes,
        graphs=job.drawn,
        loss_curve=job.curve,
    )
    job.done = CompileResult(result, report, options.tokenizer, processor=options.processor)
    return job.done


LOADING, TRAINING = tuple(SourceOptions.model_fields), tuple(CalibrationOptions.model_fields)
PLANNING = ("target", "kv_budget", "full_layers", "profile", "kernel_dims", "engine")
CAPTURE = (*PLANNING, "capture_cache")
DATA = ("calibration", "calibration_tokens", "calibration_length", "seed")
EDITING = ("fuel", "dump_graphs")
HIDDEN = ("tokenizer", "processor", "progress")
"""Fields that are objects, not settings."""


def every_stage(options: CompileOptions, parts: bool) -> list[Stage]:
    """The list: what runs and is explained is those of it that are listed."""
    fitted = options.planned or any(one.fit is not None for one in options.rewrites)
    find = "find attention by running it, read facts off its graph, plan what each site becomes"
    return [
        Stage("load", "read the source, and refuse what cannot be rewritten", LOADING, _load),
        Stage("capture", find, CAPTURE, _capture, bar=True),
        Stage("data", "cut calibration windows", DATA, _data, fitted, lambda job: job.plan.needs_data),
        *_fitting(options, parts),
        Stage(
            "reference",
            "run the source on what the result is held to",
            ("verify",),
            _refer,
            options.verify,
            lambda job: job.plan.exact or not job.source.few_passes,
        ),
        Stage("lower", "put the new attention in place", ("in_place", *EDITING), _lower),
        Stage("verify", "hold the result to its contract", ("verify",), _verify, options.verify, bar=True),
        Stage("train", "fit by gradient steps, then distil", TRAINING, _train, options.steps > 0),
    ]


def stages_of(options: CompileOptions, *, parts: bool = False) -> list[Stage]:
    """The stages of a compilation in order, for `attnedit._stages.run`; layer by layer where it goes in parts."""
    return [each for each in every_stage(options, parts) if each.listed]


def explained(options: CompileOptions, *, parts: bool = False) -> list[dict[str, Any]]:
    """The same before anything is done: of each stage its name, what it does, and the options that it reads.

    Those of the whole job are with the first.
    """
    placed = {name for each in every_stage(options, parts) for name in each.options}
    placed = placed.union(Target.reads, *(target.reads for target in OWN.values()))
    whole = tuple(name for name in CompileOptions.model_fields if name not in placed and name not in HIDDEN)
    first, *others = stages_of(options, parts=parts)
    return [
        {"stage": each.name, "does": each.what, "options": {name: getattr(options, name) for name in names}}
        for each, names in ((first, whole + first.options), *((each, each.options) for each in others))
    ]


def _fitting(options: CompileOptions, parts: bool) -> list[Stage]:
    """What the targets do one after another, or all in one walk through the layers."""
    if parts:
        every = tuple(dict.fromkeys(name for target in options.configured for name in _own(target)))
        return [_fit_stage(None, "fit", "read, fit and write layer by layer", every)]
    found = []
    for target in options.configured or options.targets:
        if isinstance(target, AttentionTarget) and "allocation" in target.reads and target.allocation != "even":
            what = "measure what each layer alone costs, where shares go by it"
            found.append(_fit_stage(target, "allocation", what, ("allocation",), measured=True))
        found.append(_fit_stage(target, target.stage, target.does, _own(target)))
    return found


def _fit_stage(
    target: Target | None, name: str, what: str, options: tuple[str, ...], *, measured: bool = False
) -> Stage:
    def do(job: Job, entry: PipelineStage) -> None:
        # As it was planned: towards a profile's class it is another one of the same name.
        planned = next((one for one in job.plan.targets if target is not None and one.name == target.name), target)
        (job.source.measure if measured else job.source.fit)(job, planned, entry)

    return Stage(name, what, options, do, needed=lambda job: bool(job.source.left))


def _own(target: Target) -> tuple[str, ...]:
    """Options that a target reads as it fits."""
    others = {*PLANNING, *DATA, "allocation"}
    own = tuple(name for name in CompileOptions.model_fields if name in target.reads and name not in others)
    return (*own, *EDITING) if target.rewrites else own

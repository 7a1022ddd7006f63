"""`attnedit.calibrate`: train a rewritten model against the one that it came from."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit._stages import Log, said
from attnedit.arguments import CalibrateArguments, check_known, shown
from attnedit.compiler.capture.capture import as_captured, capture
from attnedit.compiler.data.lengths import record_lengths
from attnedit.compiler.data.sampling import own_windows
from attnedit.compiler.data.token_windows import context_length, shares_of, token_windows
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.positions import loss_curve
from attnedit.compiler.execution.verify import check_tokens, decode_error, same_decode
from attnedit.compiler.graph.modules import evaluation_mode
from attnedit.compiler.model_io.devices import device_failures
from attnedit.compiler.model_io.heads import has_language_head
from attnedit.compiler.model_io.source_checks import model_name
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import stage
from attnedit.compiler.reporting.records import PipelineStage, StageReport
from attnedit.compiler.reporting.report import Report, used_memory
from attnedit.options import CalibrateOptions
from attnedit.passes.calibration.batches import Batches, hold_out, mix
from attnedit.passes.calibration.cuda_graphs import check_graphs
from attnedit.passes.calibration.journal import LOG_FILE, PLOT_FILE
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.parameters import share
from attnedit.passes.calibration.run import DISTILL
from attnedit.passes.calibration.run import calibrate as run_training
from attnedit.passes.calibration.state import StageState
from attnedit.passes.calibration.training import DivergedError
from attnedit.passes.site_sample import effort_on
from attnedit.planning import check_head
from attnedit.result import CompileResult
from attnedit.rows import calibration_name

START_DIRECTORY = "start"
"""In a run directory: the model before training."""
BEST_DIRECTORY = "best"
"""In a run directory whose training broke down: the best state."""

BY_HEART = 1.8
"""Held-out loss of distillation, of that on the text learned from, above which the report says so."""

LESS_MEMORY = (
    "raise accumulation, keep no activations (activation_checkpointing), train less of the model, or fit few layers "
    "at a time (memory_limit)"
)
ASCEND = "npu"
"""Type of Ascend's devices, to torch."""


@shown(CalibrateArguments)
def calibrate(result: CompileResult, teacher: PreTrainedModel, **options: Unpack[CalibrateArguments]) -> CompileResult:
    """Train the rewritten attention: each layer on the source's own hidden states, then the model as a whole.

    `fit_steps` says how long each layer learns the output of the source's attention, `distill_steps` how long the whole
    model then learns the source's next-token distributions. One of them must be given.

    Args:
        result: a rewritten model; trained in place, and moved to where the teacher is.
        teacher: the model that it came from; not changed. What is not trained is shared between the two.
        **options: the fields of `attnedit.options.CalibrateOptions`. `result.tokenizer` is used unless one is given.

    Returns:
        The same model, with the training in its report.

    Raises:
        UsageError: wrong arguments or input, or the teacher is another model.
        VerificationError: decoding from the trained model's cache differs from a prefill.
        DivergedError: training broke down; the best state is in `result.model`, and in the run directory.
        AttneditError: the device ran out of memory or failed. The two before are AttneditErrors too.

    Example:
        >>> result = attnedit.load("qwen3-mla")  # doctest: +SKIP
        >>> attnedit.calibrate(result, source, calibration="notes.txt", distill_steps=500)  # doctest: +SKIP
    """
    check_known({**options}, CalibrateArguments, "is for compiling, and the model is compiled; leave it out")
    return train(result, teacher, CalibrateOptions.of(**options))


def train(result: CompileResult, teacher: PreTrainedModel, options: CalibrateOptions) -> CompileResult:
    """`calibrate` with options that are checked."""
    if not options.steps:
        raise UsageError("nothing to train: give fit_steps or distill_steps")
    if options.batch_size < processes().count:
        raise UsageError(
            f"batch_size {options.batch_size} leaves some of {processes().count} processes without windows"
        )
    if not isinstance(result, CompileResult):
        raise UsageError(f"result must be what attnedit.compile or attnedit.load returns, got {type(result).__name__}")
    model, tokenizer, progress = result.model, options.tokenizer or result.tokenizer, options.progress
    names = list(model.config.attnedit["sites"])
    _check_teacher(model, teacher, names)
    check_head(teacher, options)
    check_training(options, teacher)
    model.to(next(teacher.parameters()).device)  # type: ignore[arg-type]  # transformers wraps it
    share(model, teacher)
    directory = None if options.run_directory is None else Path(options.run_directory)
    log = Log(progress)
    implementation = contextlib.ExitStack()
    for part in (teacher, model):
        implementation.enter_context(evaluation_mode(part))
    try:
        with stage("capture teacher", progress):
            sites = [site for site in capture(teacher) if site.name in names]
            implementation.enter_context(as_captured(teacher, sites))
        # Own samples are made once, by the main process, and read from the disk by the others.
        with log("training data"), processes().main_first():
            batches = training_batches(teacher, options, tokenizer)
        again = "try again" if directory is None else "the same command goes on from its last checkpoint"
        with log("training"), _kernels(teacher, model), device_failures("training", LESS_MEMORY, again):
            try:
                done = run_training(model, teacher, sites, batches, options, directory=directory, progress=progress)
            except DivergedError as error:
                if directory is None:
                    raise
                if processes().main:
                    result.save(directory / BEST_DIRECTORY, overwrite=True)
                raise DivergedError(f"{error}; its best state is saved in {directory / BEST_DIRECTORY}") from error
        checks, curve = list(result.report.verification), None
        if options.verify:
            with log("verify", bar=True):
                ids = check_tokens([batches.held_out], model)
                own = decode_error(teacher, ids, result.report.sites_matched)
                checks.append(same_decode(model, ids, own=own))
                held = batches.held_out[: effort_on(model).measured_long]
                if has_language_head(model):
                    curve = loss_curve(teacher, model, held, "windows that training has not seen", progress)
    finally:
        implementation.close()
    length = batches.held_out.shape[1]
    record_lengths(model, training=length)
    seconds, spent = result.report.seconds, log.seconds
    entry = PipelineStage(name="train", seconds=spent["training data"] + spent["training"])
    entry.did = ", ".join(f"{state.name}: loss {state.first:.4g} -> {state.best:.4g}" for state in done.stages)
    entry.checked = [said(check) for check in checks[len(result.report.verification) :]]
    stages = [_stage_report(state) for state in done.stages]
    report = result.report.model_copy(
        update={
            "training_length": max(length, result.report.training_length or 0),
            "stages": [*result.report.stages, *stages],
            "notes": [*result.report.notes, *_learned_notes(stages)],
            "perplexity": done.perplexity,
            "verification": checks,
            "seconds": {**seconds, **{name: seconds.get(name, 0.0) + more for name, more in spent.items()}},
            "pipeline": [*result.report.pipeline, entry],
            "loss_curve": curve,
            "calibration": calibration_name(options.calibration),
            **used_memory(),
        }
    )
    files = [] if directory is None else [directory / name for name in (LOG_FILE, PLOT_FILE)]
    processor = options.processor or result.processor
    return CompileResult(model, Report.model_validate(report.model_dump()), tokenizer, files, processor)


def _kernels(*models: PreTrainedModel) -> AbstractContextManager[None]:
    """Attention by an operator of the device for as long as it trains, where there is one that torch does not call."""
    kind = next(models[0].parameters()).device.type
    if kind != ASCEND:
        return nullcontext()
    from attnedit.targets.runtime.npu.training import training_attention  # costs a second, which few need

    return training_attention(kind, *models)


def check_training(options: CalibrationOptions, model: PreTrainedModel) -> None:
    """Refuse training that cannot be, before anything is computed; the default length is shortened to the context.

    Raises:
        UsageError: windows beyond the context were asked for, or CUDA graphs where there can be none.
    """
    context = context_length(model)
    if options.seq_len > context and "seq_len" in options.model_fields_set:
        raise UsageError(
            f"seq_len {options.seq_len} is beyond the model's context of {context} tokens; ask for at most that"
        )
    if options.cuda_graphs:
        device = next(model.parameters()).device
        check_graphs(device, accumulation=options.accumulation, in_turn=options.memory_limit is not None)


def training_batches(
    teacher: PreTrainedModel, options: CalibrateOptions, tokenizer: PreTrainedTokenizerBase | None
) -> Batches:
    """Windows of the data and of the teacher's own samples, mixed."""
    calibration, seed, progress = options.calibration, options.seed, options.progress
    length = min(options.seq_len, context_length(teacher))
    count = options.steps * options.batch_size
    fraction = 1.0 if calibration is None else options.self_generated
    sources, weights = [], []
    if fraction < 1:
        parts = shares_of(calibration).items() if isinstance(calibration, Mapping) else [(calibration, 1.0)]
        for part, share_of_data in parts:
            weights.append((1 - fraction) * share_of_data)
            wanted = {"tokens": max(2, round(count * weights[-1])) * length, "window": length, "seed": seed}
            sources.append(token_windows(part, tokenizer, teacher, **wanted, progress=progress))
    if fraction > 0:
        text = torch.cat([hold_out(source)[1] for source in sources]) if sources else None
        wanted = {"count": max(2, round(count * fraction)), "length": length, "seed": seed}
        sources.append(own_windows(teacher, tokenizer, **wanted, text=text, progress=progress))
        weights.append(fraction)
    size = options.batch_size
    lengths = options.lengths(length)
    return mix(
        sources, weights, steps=options.steps, batch_size=size, repeats=options.repeats, lengths=lengths, seed=seed
    )


def _check_teacher(model: PreTrainedModel, teacher: PreTrainedModel, names: list[str]) -> None:
    model_name(teacher)  # refuses what is no model
    if getattr(teacher.config, "attnedit", None):
        raise UsageError("the teacher is a rewritten model itself; give the model that the result came from")
    inside = tuple(f"{name}." for name in names)
    theirs = dict(teacher.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith(inside):
            continue
        if name not in theirs or theirs[name].shape != parameter.shape:
            raise UsageError(f"the teacher is not the model that the result came from: {name} does not fit")
    if missing := [name for name in names if not isinstance(_submodule(teacher, name), torch.nn.Module)]:
        raise UsageError(f"the teacher is not the model that the result came from: it has no {missing[0]}")


def _submodule(model: torch.nn.Module, name: str) -> Any:
    return dict(model.named_modules()).get(name)


def _stage_report(state: StageState) -> StageReport:
    return StageReport(
        name=state.name,
        steps=state.step,
        tokens=state.tokens,
        seconds=state.seconds,
        learning_rate=state.rate,
        before=state.first,
        best=state.best,
        best_step=state.best_step,
        trained_on=statistics.median(state.losses) if state.losses else None,
        skipped=state.skipped,
        backed_off=state.backed_off,
    )


def _learned_notes(stages: Sequence[StageReport]) -> list[str]:
    """What a user should know of how distillation went."""
    return [
        f"{done.name}: the text is learned by heart (loss {done.trained_on:.3g} on it, {done.best:.3g} held out); more "
        "text, or self_generated, may take the result further"
        for done in stages
        if done.name == DISTILL and done.trained_on and done.best > BY_HEART * done.trained_on
    ]

"""`attnedit.compile`: the pipeline from a live model to a rewritten, verified one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias, Unpack

from transformers import PreTrainedModel

from attnedit._calibrate import START_DIRECTORY, check_training
from attnedit._live import LiveSource
from attnedit._pipeline import outcome, stages_of
from attnedit._rewrite import RewriteSource
from attnedit._stages import Job, Source, run
from attnedit.arguments import FOR_CHECKPOINTS, CompileArguments, check_known, shown
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.devices import device_failures
from attnedit.compiler.model_io.remote_code import is_own_class
from attnedit.compiler.processes import processes
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.options import CompileOptions
from attnedit.passes.kept_fits import KeptFits
from attnedit.recipe import with_recipe
from attnedit.result import CompileResult, load

FITS_DIRECTORY = "fits"
"""In a run directory: closed-form fits."""
Reader: TypeAlias = Callable[[CompileOptions], tuple[PreTrainedModel, CompileOptions]]
"""Reads a model by the options of a compilation, and adds to these what comes with it."""


@shown(CompileArguments)
def compile(model: PreTrainedModel, target: str | Target = "mla", **options: Unpack[CompileArguments]) -> CompileResult:
    """Rewrite the attention of a trained model so that it caches less: in closed form, then trained if asked for.

    The model is captured as graphs, each attention is replaced and fitted on calibration text, and the result is run to
    check that it keeps what was promised. With `fit_steps` or `distill_steps` it is then trained against its source.

    Args:
        model: a transformers causal language model; not changed unless `in_place`.
        target: what attention becomes: "mla", latent attention; "gateswa", a sliding window in most layers; or
            "gateswa+mla", where the layers without window become latent. Or a `Target`, or names that other packages
            register, which go through `attnedit.rewrite`.
        **options: the fields of `attnedit.options.CompileOptions`, but for those of reading a checkpoint.

    Returns:
        The rewritten model, which shares with its source the tensors that were not edited, and the report.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        RewriteError: a rewrite of a `Target` is written wrongly; addressed to its author.
        VerificationError: the result broke its contract.
        DivergedError: training broke down; its best state is in the run directory, where one is given.
        AttneditError: the device ran out of memory or failed, or the run directory cannot be written. The three before
            are AttneditErrors too.

    Example:
        >>> result = attnedit.compile(model, "mla", kv_budget=0.25, calibration="notes.txt")  # doctest: +SKIP
        >>> result.model.generate(**prompt, max_new_tokens=20)  # doctest: +SKIP
    """
    check_known({**options}, CompileArguments, FOR_CHECKPOINTS)
    return compile_live(lambda asked: (model, asked), CompileOptions.of(target=target, **options))


@device_failures(
    "compile",
    "load it in bfloat16, give fewer calibration_tokens, or go layer by layer (--low-memory, compile_checkpoint)",
)
def compile_live(read: Reader, options: CompileOptions, name: str | None = None) -> CompileResult:
    """`compile` with options that are checked, of a model that is read first; the recipe names it so."""
    if options.steps and options.in_place:
        raise UsageError("in_place leaves no source to learn from; leave it out, or train no steps")
    if options.steps and options.run_directory is None and processes().count > 1:
        raise UsageError("several processes meet in a directory; give run_directory")
    directory = None if options.run_directory is None else Path(options.run_directory).expanduser()
    kept = None if directory is None else KeptFits(directory / FITS_DIRECTORY)

    def opens(asked: CompileOptions) -> Source:
        model, asked = read(asked)
        source = LiveSource(model, asked, kept) if asked.planned else RewriteSource(model, asked)
        if asked.steps:
            check_training(asked, source.model)
        return source

    job, stages = Job(options, opens), stages_of(options)
    if options.steps and directory is not None:
        start = directory / START_DIRECTORY
        run(stages[:1], job)
        with processes().main_first():  # whose result the others read
            if not start.is_dir():
                run(stages[1:-1], job)
                outcome(job).save(start)
        source, asked, job = job.source, job.options, Job(job.options, opens)
        source.result = source.model  # what was made and saved is not kept beside what is loaded and trained
        job.source, job.done = source, load(start, trust_remote_code=is_own_class(type(source.model)))
        job.done.tokenizer, job.done.processor = asked.tokenizer, asked.processor
        run(stages[-1:], job)
    else:
        run(stages, job)
    result = outcome(job)
    return dataclasses.replace(result, report=with_recipe(result.report, job.options, name))

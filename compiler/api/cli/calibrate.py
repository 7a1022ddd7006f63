"""``attnedit calibrate``: train a saved result further."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import attnedit
from attnedit._calibrate import train
from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    OutputOption,
    ProgressBars,
    check_tokenizer_there,
    open_run,
    print_json,
    show,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import load_source
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import stage
from attnedit.options import CalibrateOptions, SourceOptions
from attnedit.passes.calibration.options import CalibrationOptions


class CalibrateCommand(CalibrateOptions, SourceOptions):
    """Flags of this command."""


@takes(CalibrateCommand)
def calibrate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What compile saved.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="The model that it came from.")],
    output: OutputOption,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output directory holds.")] = False,
    json: JsonOption = False,
    **given: Any,
) -> None:
    """Train a saved result against its source, and save it again."""
    reading = SourceOptions.of(**{name: given.pop(name) for name in SourceOptions.model_fields if name in given})
    options = CalibrateOptions.of(**given)
    if not options.steps:
        raise UsageError("nothing to train: give --fit-steps or --distill-steps")
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory; give one that attnedit compile saved a model in")
    if output.resolve() == directory.resolve():
        raise UsageError(f"{output} is the model to train itself; give another output directory")
    with ProgressBars() as progress:
        with stage("load model", progress):
            result = attnedit.load(directory, trust_remote_code=reading.trust_remote_code)
            source = load_source(teacher, **reading.loading)
        if options.calibration is not None:
            check_tokenizer_there(source, "calibration text")
        recipe: dict[str, Any] = {"command": "calibrate", "model": str(directory), "teacher": teacher}
        recipe |= {"calibration": given.get("calibration"), "seed": options.seed}
        recipe |= {name: given.get(name, field.default) for name, field in CalibrationOptions.model_fields.items()}
        recipe |= {"dtype": reading.dtype, "revision": reading.revision}
        open_run(output, recipe, overwrite=overwrite)
        work = {"tokenizer": source.tokenizer, "processor": source.processor, "progress": progress}
        work |= {"run_directory": output.expanduser()}
        result = train(result, source.model, options.model_copy(update=work))
        if not processes().main:
            return
        with stage("save", progress):
            result.save(output, overwrite=True)
    if json:
        print_json({"output": str(output), **result.report.to_dict()})
    else:
        show(result.report)
        show(f"saved in {output}")

"""``attnedit compile``: rewrite a model and save it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from attnedit._checkpoint import compile_in_parts
from attnedit._compile import compile_live
from attnedit._pipeline import explained
from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    OutputOption,
    ProgressBars,
    check_output,
    check_tokenizer_there,
    open_run,
    print_json,
    show,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import load_source
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import stage
from attnedit.compiler.reporting.report import Report
from attnedit.options import CompileOptions
from attnedit.recipe import RECIPE_FILE, Recipe
from attnedit.run_directory import check_run, run_with_fits
from attnedit.targets.runtime.eager.checkpoint import HTML_FILE, RUN_FILE, check_free

OptionalModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="As for every command; a recipe may name it instead.", show_default=False),
]
RecipeOption = Annotated[
    Path | None, typer.Option(help="Recipe (YAML) with any of these options; what is given beside it counts first.")
]
LowMemoryOption = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Read, rewrite and write layer by layer: memory for a layer, not for the model; killed, the same command "
        "goes on. Needs safetensors and --calibration.",
    ),
]

ExplainOption = Annotated[
    bool, typer.Option("--explain", help="Show the stages of this compilation with their options, and do nothing.")
]


@takes(CompileOptions)
def compile_model(
    output: OutputOption,
    model: OptionalModelArgument = None,
    recipe: RecipeOption = None,
    *,
    low_memory: LowMemoryOption = False,
    explain: ExplainOption = False,
    json: JsonOption = False,
    **given: Any,
) -> None:
    """Rewrite the attention of a model, verify the result, and save it as a transformers model."""
    base = Recipe() if recipe is None else Recipe.load(recipe)
    model = model or base.model
    if model is None:
        raise UsageError("no model is named; give MODEL, or a recipe that names it")
    options = CompileOptions.of(**{**base.arguments(), "revision": base.revision, "dtype": base.dtype, **given})
    if explain:
        return _explain(options, parts=low_memory, json=json)
    overwrite, trained = options.overwrite, options.steps > 0
    if low_memory:
        if overwrite or not (output.expanduser() / RUN_FILE).exists():
            check_output(output, overwrite=overwrite)
        with ProgressBars() as progress:
            report = compile_in_parts(model, output, options.model_copy(update={"progress": progress}))
        return _show(output, report, json=json)
    run = {"command": "compile", **Recipe.from_options(options, model=model).model_dump(mode="json")}
    unfinished = (output.expanduser() / RUN_FILE).exists()
    if trained:
        open_run(output, run, overwrite=overwrite)
    elif unfinished:
        check_run(output.expanduser(), run, overwrite=overwrite)
    else:
        check_output(output, overwrite=overwrite)
        check_free(output.expanduser(), overwrite)
    place = output.expanduser()
    # An earlier result stays until the new one is whole, so there is no place beside it to keep fits.
    keeps = trained or unfinished or not place.exists() or not any(place.iterdir())
    with ProgressBars() as progress, contextlib.ExitStack() as closing:

        def read(asked: CompileOptions) -> tuple[PreTrainedModel, CompileOptions]:
            with stage("load model", progress):
                source = load_source(model, **asked.loading)
            if asked.calibration is not None:
                check_tokenizer_there(source, "calibration text")
            found = {"tokenizer": source.tokenizer, "processor": source.processor}
            return source.model, asked.model_copy(update=found)

        directory = place if trained else None
        if keeps and not trained:
            directory = closing.enter_context(run_with_fits(place, run, overwrite=overwrite))
        # Untrained, the source is not used again, so the memory for a second attention is spared.
        work = {"in_place": not trained, "run_directory": directory, "progress": progress}
        result = compile_live(read, options.model_copy(update=work), model)
        if not processes().main:
            return
        with stage("save", progress):
            result.save(output, overwrite=overwrite or trained or unfinished)
    _show(output, result.report, json=json)


def _explain(options: CompileOptions, *, parts: bool, json: bool) -> None:
    stages = explained(options, parts=parts)
    if json:
        return print_json({"stages": stages})
    for number, each in enumerate(stages, 1):
        show(f"{number}. {each['stage']}: {each['does']}")
        show("\n".join(f"     {name}: {'' if value is None else value}" for name, value in each["options"].items()))


def _show(output: Path, report: Report, *, json: bool) -> None:
    if json:
        print_json({"output": str(output), **report.to_dict()})
    else:
        show(report)
        show(f"saved in {output}, with {HTML_FILE} to look at and {RECIPE_FILE}:")
        show(Recipe.model_validate(report.recipe).to_yaml().rstrip())

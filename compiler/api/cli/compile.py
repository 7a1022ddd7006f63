"""``attnedit compile``: rewrite a model and save it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

import attnedit
from attnedit.cli.terminal import (
    AllocationOption,
    AllowPickleOption,
    AlternationsOption,
    BudgetOption,
    CalibrationLengthOption,
    CalibrationOption,
    CalibrationTokensOption,
    DequantizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    OutputOption,
    OverwriteOption,
    ProgressBars,
    RevisionOption,
    SeedOption,
    TrustRemoteCodeOption,
    calibration_source,
    check_output,
    check_tokenizer_there,
    print_json,
    show,
)
from attnedit.cli.training import (
    DEFAULTS,
    AccumulationOption,
    ActivationCheckpointingOption,
    BatchSizeOption,
    CheckpointEveryOption,
    DistillOptimizerOption,
    DistillRateOption,
    DistillStepsOption,
    FeatureLayersOption,
    FeatureWeightOption,
    FitRateOption,
    FitStepsOption,
    MemoryLimitOption,
    RepeatsOption,
    SelfGeneratedOption,
    TorchCompileOption,
    TrainingLengthOption,
    TrainOption,
    open_run,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.models import load_source
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import stage
from attnedit.compiler.report import Report
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.gateswa.options import DEFAULT_GATE, DEFAULT_SINKS, DEFAULT_WINDOW
from attnedit.passes.mla.fit import FitOptions
from attnedit.planning import check_arguments
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
TargetOption = Annotated[
    str,
    typer.Option(help="What attention becomes: mla, gateswa or gateswa+mla, or targets and passes of other packages."),
]
FuelOption = Annotated[
    int | None, typer.Option(min=0, help="Stop after so many rewrites, to find the one that breaks something.")
]
DumpOption = Annotated[Path | None, typer.Option(help="Directory for graphs before and after, as text and SVG.")]
WindowOption = Annotated[
    int | None, typer.Option(min=1, help=f"GateSWA: tokens each query sees, itself included; {DEFAULT_WINDOW}.")
]
FullLayersOption = Annotated[
    str | None,
    typer.Option(help="GateSWA: how many layers stay full (chosen by measured loss), every:N, or 3,7,11; a quarter."),
]
GateOption = Annotated[str | None, typer.Option(help=f"GateSWA: output gate, head, element or none; {DEFAULT_GATE}.")]
SinksOption = Annotated[
    str | None,
    typer.Option(
        help=f"GateSWA: for tokens outside the window: none, or logit, value, keep:N with commas; {DEFAULT_SINKS}."
    ),
]
ProfileOption = Annotated[
    str | None,
    typer.Option(help="Compile towards a checkpoint of this form (docs/export-hf.md), so that export changes nothing."),
]
KernelDimsOption = Annotated[
    bool,
    typer.Option("--kernel-dims", help="With a latent profile: the sizes of engines' kernels, in place of a budget."),
]
EngineOption = Annotated[
    str | None,
    typer.Option(
        help="What will serve the result: vllm, sglang or llama.cpp; implies profile and sizes (docs/engines)."
    ),
]

LowMemoryOption = Annotated[
    bool,
    typer.Option(
        "--low-memory",
        help="Read, rewrite and write layer by layer: memory for a layer, not for the model; killed, the same command "
        "goes on. Needs safetensors and --calibration.",
    ),
]


def compile_model(
    context: typer.Context,
    output: OutputOption,
    model: OptionalModelArgument = None,
    recipe: RecipeOption = None,
    target: TargetOption = "mla",
    kv_budget: BudgetOption = None,
    window: WindowOption = None,
    full_layers: FullLayersOption = None,
    gate: GateOption = None,
    sinks: SinksOption = None,
    profile: ProfileOption = None,
    kernel_dims: KernelDimsOption = False,
    engine: EngineOption = None,
    allocation: AllocationOption = "even",
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = None,
    calibration_length: CalibrationLengthOption = None,
    alternations: AlternationsOption = FitOptions.alternations,
    fit_steps: FitStepsOption = 0,
    distill_steps: DistillStepsOption = 0,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    seq_len: TrainingLengthOption = DEFAULTS.seq_len,
    accumulation: AccumulationOption = DEFAULTS.accumulation,
    fit_learning_rate: FitRateOption = DEFAULTS.fit_learning_rate,
    distill_learning_rate: DistillRateOption = DEFAULTS.distill_learning_rate,
    distill_optimizer: DistillOptimizerOption = DEFAULTS.distill_optimizer,
    train: TrainOption = DEFAULTS.train,
    feature_weight: FeatureWeightOption = DEFAULTS.feature_weight,
    feature_layers: FeatureLayersOption = DEFAULTS.feature_layers,
    self_generated: SelfGeneratedOption = DEFAULTS.self_generated,
    repeats: RepeatsOption = DEFAULTS.repeats,
    checkpoint_every: CheckpointEveryOption = DEFAULTS.checkpoint_every,
    memory_limit: MemoryLimitOption = None,
    activation_checkpointing: ActivationCheckpointingOption = False,
    torch_compile: TorchCompileOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    dequantize: DequantizeOption = False,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    low_memory: LowMemoryOption = False,
    overwrite: OverwriteOption = False,
    fuel: FuelOption = None,
    dump_graphs: DumpOption = None,
    json: JsonOption = False,
) -> None:
    """Rewrite the attention of a model, verify the result, and save it as a transformers model."""
    wanted = _recipe(context, recipe, calibration_source(calibration))
    if wanted.model is None:
        raise UsageError("no model is named; give MODEL, or a recipe that names it")
    arguments = wanted.arguments()
    check_arguments(**{name: arguments[name] for name in inspect.signature(check_arguments).parameters})
    trained = CalibrationOptions.of(**wanted.training).steps > 0
    if low_memory:
        _refuse_with_low_memory(
            {
                "training": trained,
                "--dequantize": dequantize,
                "--profile": wanted.profile is not None or wanted.kernel_dims,
                "--engine": wanted.engine is not None,
                "--allocation loss": wanted.allocation != "even",
                "--fuel": fuel is not None,
                "--dump-graphs": dump_graphs is not None,
            }
        )
        _show(
            output,
            _compile_in_parts(wanted, output, device=device, overwrite=overwrite, trust_remote_code=trust_remote_code),
            json=json,
        )
        return
    run = {"command": "compile", **wanted.model_dump(mode="json")}
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
        with stage("load model", progress):
            source = load_source(
                wanted.model,
                revision=wanted.revision,
                dtype=wanted.dtype,
                device=device,
                dequantize=dequantize,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )
        if wanted.calibration is not None:
            check_tokenizer_there(source, "calibration text")
        directory = place if trained else None
        if keeps and not trained:
            directory = closing.enter_context(run_with_fits(place, run, overwrite=overwrite))
        result = attnedit.compile(
            source.model,
            **arguments,
            tokenizer=source.tokenizer,
            # Untrained, the source is not used again, so the memory for a second attention is spared.
            in_place=not trained,
            fuel=fuel,
            dump_graphs=dump_graphs,
            run_directory=directory,
            progress=progress,
        )
        if not processes().main:
            return
        named = wanted.model_dump(include={"model", "revision", "dtype"}, exclude_defaults=True)
        result.report = result.report.model_copy(update={"recipe": {**result.report.recipe, **named}})
        with stage("save", progress):
            result.save(output, overwrite=overwrite or trained or unfinished)
    _show(output, result.report, json=json)


def _refuse_with_low_memory(asked: Mapping[str, bool]) -> None:
    for name, given in asked.items():
        if given:
            raise UsageError(f"{name} needs the whole model in memory; leave it out, or --low-memory")


def _compile_in_parts(wanted: Recipe, output: Path, *, overwrite: bool, **options: Any) -> Report:
    if overwrite or not (output.expanduser() / RUN_FILE).exists():
        check_output(output, overwrite=overwrite)
    whole = {*wanted.training, "profile", "kernel_dims", "engine", "allocation"}
    arguments = {name: value for name, value in wanted.arguments().items() if name not in whole}
    with ProgressBars() as progress:
        return attnedit.compile_checkpoint(
            str(wanted.model),
            output,
            **arguments,
            dtype=wanted.dtype,
            revision=wanted.revision,
            overwrite=overwrite,
            progress=progress,
            **options,
        )


def _show(output: Path, report: Report, *, json: bool) -> None:
    if json:
        print_json({"output": str(output), **report.to_dict()})
    else:
        show(report)
        show(f"saved in {output}, with {HTML_FILE} to look at and {RECIPE_FILE}:")
        show(Recipe.model_validate(report.recipe).to_yaml().rstrip())


def _recipe(context: typer.Context, file: Path | None, calibration: str | dict[str, float] | None) -> Recipe:
    """What the file says, and over it what the command line says.

    Raises:
        UsageError: either makes no sense.
    """
    base = Recipe() if file is None else Recipe.load(file)
    values, training = base.model_dump(), dict(base.training)
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is None or source.name == "DEFAULT":
            continue
        if name in Recipe.model_fields:
            values[name] = calibration if name == "calibration" else value
        elif name in CalibrationOptions.__dataclass_fields__:
            training[name] = value
    CalibrationOptions.of(**training)
    return Recipe.model_validate({**values, "training": training})

"""``attnedit compile``: rewrite a model and save it."""

from __future__ import annotations

from typing import Annotated, Any

import typer

import attnedit
from attnedit.cli.terminal import (
    AlternationsOption,
    BudgetOption,
    CalibrationOption,
    CalibrationTokensOption,
    DequantizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    OutputOption,
    OverwriteOption,
    ProgressBars,
    RevisionOption,
    SeedOption,
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
    DistillRateOption,
    DistillStepsOption,
    FeatureWeightOption,
    FitRateOption,
    FitStepsOption,
    MemoryLimitOption,
    SelfGeneratedOption,
    TrainingLengthOption,
    TrainOption,
    open_run,
)
from attnedit.compiler.models import load_source
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import stage
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.gateswa.options import DEFAULT_GATE, DEFAULT_SINKS, DEFAULT_WINDOW
from attnedit.passes.mla.fit import FitOptions
from attnedit.planning import check_arguments
from attnedit.targets.runtime.eager.checkpoint import check_free

TargetOption = Annotated[str, typer.Option(help="What attention becomes: mla, gateswa or gateswa+mla.")]
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


def compile_model(
    model: ModelArgument,
    output: OutputOption,
    target: TargetOption = "mla",
    kv_budget: BudgetOption = None,
    window: WindowOption = None,
    full_layers: FullLayersOption = None,
    gate: GateOption = None,
    sinks: SinksOption = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = None,
    alternations: AlternationsOption = FitOptions.alternations,
    fit_steps: FitStepsOption = 0,
    distill_steps: DistillStepsOption = 0,
    batch_size: BatchSizeOption = DEFAULTS.batch_size,
    seq_len: TrainingLengthOption = DEFAULTS.seq_len,
    accumulation: AccumulationOption = DEFAULTS.accumulation,
    fit_learning_rate: FitRateOption = DEFAULTS.fit_learning_rate,
    distill_learning_rate: DistillRateOption = DEFAULTS.distill_learning_rate,
    train: TrainOption = DEFAULTS.train,
    feature_weight: FeatureWeightOption = DEFAULTS.feature_weight,
    self_generated: SelfGeneratedOption = DEFAULTS.self_generated,
    checkpoint_every: CheckpointEveryOption = DEFAULTS.checkpoint_every,
    memory_limit: MemoryLimitOption = None,
    activation_checkpointing: ActivationCheckpointingOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    dequantize: DequantizeOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Rewrite the attention of a model, verify the result, and save it as a transformers model."""
    form: dict[str, Any] = {
        "target": target,
        "kv_budget": kv_budget,
        "window": window,
        "full_layers": full_layers,
        "gate": gate,
        "sinks": sinks,
    }
    training: dict[str, Any] = {
        "fit_steps": fit_steps,
        "distill_steps": distill_steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "accumulation": accumulation,
        "fit_learning_rate": fit_learning_rate,
        "distill_learning_rate": distill_learning_rate,
        "train": train,
        "feature_weight": feature_weight,
        "self_generated": self_generated,
        "checkpoint_every": checkpoint_every,
        "memory_limit": memory_limit,
        "activation_checkpointing": activation_checkpointing,
    }
    check_arguments(**form)
    trained = CalibrationOptions.of(**training).steps > 0
    if not trained:
        check_output(output, overwrite=overwrite)
        check_free(output.expanduser(), overwrite)
    texts = calibration_source(calibration)
    data: dict[str, Any] = {
        "calibration": texts,
        "calibration_tokens": calibration_tokens,
        "alternations": alternations,
    }
    if trained:
        recipe: dict[str, Any] = {
            "command": "compile",
            "model": model,
            **form,
            **data,
            **training,
            "seed": seed,
            "dtype": dtype,
        }
        open_run(output, {**recipe, "revision": revision}, overwrite=overwrite)
    with ProgressBars() as progress:
        with stage("load model", progress):
            source = load_source(model, revision=revision, dtype=dtype, device=device, dequantize=dequantize)
        if texts is not None:
            check_tokenizer_there(source, "calibration text")
        result = attnedit.compile(
            source.model,
            **form,
            **data,
            **(training if trained else {}),
            tokenizer=source.tokenizer,
            seed=seed,
            # Untrained, the source is not used again, so the memory for a second attention is spared.
            in_place=not trained,
            run_directory=output.expanduser() if trained else None,
            progress=progress,
        )
        if not processes().main:
            return
        with stage("save", progress):
            result.save(output, overwrite=overwrite or trained)
    if json:
        print_json({"output": str(output), **result.report.to_dict()})
    else:
        show(result.report)
        show(f"saved in {output}")

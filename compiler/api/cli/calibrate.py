"""``attnedit calibrate``: train a saved result further."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import attnedit
from attnedit.cli.terminal import (
    AllowPickleOption,
    CalibrationOption,
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
from attnedit.passes.calibration.options import CalibrationOptions


def calibrate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What compile saved.", show_default=False)],
    teacher: Annotated[str, typer.Option(help="The model that it came from.")],
    output: OutputOption,
    calibration: CalibrationOption = None,
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
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Train a saved result against its source, and save it again."""
    training: dict[str, Any] = {
        "fit_steps": fit_steps,
        "distill_steps": distill_steps,
        "batch_size": batch_size,
        "seq_len": seq_len,
        "accumulation": accumulation,
        "fit_learning_rate": fit_learning_rate,
        "distill_learning_rate": distill_learning_rate,
        "distill_optimizer": distill_optimizer,
        "train": train,
        "feature_weight": feature_weight,
        "feature_layers": feature_layers,
        "self_generated": self_generated,
        "repeats": repeats,
        "checkpoint_every": checkpoint_every,
        "memory_limit": memory_limit,
        "activation_checkpointing": activation_checkpointing,
        "torch_compile": torch_compile,
    }
    if not CalibrationOptions.of(**training).steps:
        raise UsageError("nothing to train: give --fit-steps or --distill-steps")
    texts = calibration_source(calibration)
    if not directory.is_dir():
        raise UsageError(f"{directory} is no directory; give one that attnedit compile saved a model in")
    if output.resolve() == directory.resolve():
        raise UsageError(f"{output} is the model to train itself; give another output directory")
    with ProgressBars() as progress:
        with stage("load model", progress):
            result = attnedit.load(directory, trust_remote_code=trust_remote_code)
            source = load_source(
                teacher,
                revision=revision,
                dtype=dtype,
                device=device,
                dequantize=dequantize,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )
        if texts is not None:
            check_tokenizer_there(source, "calibration text")
        recipe: dict[str, Any] = {
            "command": "calibrate",
            "model": str(directory),
            "teacher": teacher,
            "calibration": texts,
        }
        recipe |= {**training, "seed": seed, "dtype": dtype, "revision": revision}
        open_run(output, recipe, overwrite=overwrite)
        result = attnedit.calibrate(
            result,
            source.model,
            calibration=texts,
            tokenizer=source.tokenizer,
            seed=seed,
            run_directory=output.expanduser(),
            progress=progress,
            **training,
        )
        if not processes().main:
            return
        with stage("save", progress):
            result.save(output, overwrite=True)
    if json:
        print_json({"output": str(output), **result.report.to_dict()})
    else:
        show(result.report)
        show(f"saved in {output}")

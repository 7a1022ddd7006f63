"""Options and run directory of the commands that train."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from attnedit import run_directory
from attnedit.cli.terminal import check_output
from attnedit.compiler.processes import processes
from attnedit.passes.calibration.options import CalibrationOptions as Defaults
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE

FitStepsOption = Annotated[
    int, typer.Option(min=0, help="Steps of layer-wise fitting: each attention learns the source attention's output.")
]
DistillStepsOption = Annotated[
    int, typer.Option(min=0, help="Steps of distillation: the model learns the source's next-token distributions.")
]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Training: windows per step.")]
TrainingLengthOption = Annotated[int, typer.Option("--seq-len", min=2, help="Training: tokens per window.")]
AccumulationOption = Annotated[
    int, typer.Option(min=1, help="Training: parts that a batch is computed in, to save memory.")
]
FitRateOption = Annotated[
    float | None,
    typer.Option(
        "--fit-learning-rate",
        help="Highest rate of fitting, relative to the size of each weight; unless told, by how far each layer is off.",
    ),
]
DistillRateOption = Annotated[
    float | None, typer.Option("--distill-learning-rate", help="The same of distillation, by how far the model is off.")
]
DistillOptimizerOption = Annotated[
    str, typer.Option(help="Distillation: adamw, or muon, which learns more of each token and takes more time.")
]
TrainOption = Annotated[str, typer.Option(help="What distillation changes: attention, norms (and attention) or all.")]
FeatureWeightOption = Annotated[
    float, typer.Option(help="Distillation: weight of matching hidden states, beside the distributions.")
]
FeatureLayersOption = Annotated[
    int, typer.Option(min=0, help="Distillation: how many layers' hidden states are matched, evenly spread.")
]
SelfGeneratedOption = Annotated[
    float, typer.Option(help="Training: fraction of the windows that the source samples itself.")
]
RepeatsOption = Annotated[
    float,
    typer.Option(help="Training: fraction of the first windows in which passages come again; falls to none."),
]
CheckpointEveryOption = Annotated[int, typer.Option(min=1, help="Training: steps between two checkpoints.")]
MemoryLimitOption = Annotated[
    str | None,
    typer.Option(help="Fitting: memory for weights and optimiser, such as 20GiB; layers are then fitted in turn."),
]
ActivationCheckpointingOption = Annotated[
    bool, typer.Option("--activation-checkpointing", help="Distillation: keep no activations, compute them again.")
]
TorchCompileOption = Annotated[
    bool | None,
    typer.Option(
        "--torch-compile/--no-torch-compile",
        help="Training: layers through torch.compile; unless told, on a GPU and for runs long enough.",
    ),
]

DEFAULTS = Defaults()


def open_run(output: Path, recipe: Mapping[str, Any], *, overwrite: bool) -> None:
    """Make the output directory a run directory, or go on with the run of the same recipe that it holds.

    Raises:
        UsageError: it holds something else, or the run of another recipe, and is not to be overwritten.
    """
    output = output.expanduser()
    if not processes().main:  # it comes here second
        return
    if overwrite or not (output / RUN_FILE).exists():
        check_output(output, overwrite=overwrite)
    run_directory.open_run(output, recipe, overwrite=overwrite)

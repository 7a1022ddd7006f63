"""``attnedit compile``: rewrite a model and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    ProgressBars,
    RevisionOption,
    SeedOption,
    check_output,
    check_readable,
    check_tokenizer_there,
    print_json,
    show,
)
from attnedit.compiler.models import load_source
from attnedit.compiler.progress import stage
from attnedit.passes.gateswa.options import DEFAULT_GATE, DEFAULT_SINKS, DEFAULT_WINDOW
from attnedit.passes.mla.fit import FitOptions
from attnedit.planning import check_arguments
from attnedit.targets.runtime.eager.checkpoint import check_free

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to save the result in.")]
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
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the output directory holds.")]


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
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    dequantize: DequantizeOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Rewrite the attention of a model, verify the result, and save it as a transformers model."""
    check_arguments(target, kv_budget, window, full_layers, gate, sinks)
    check_output(output, overwrite=overwrite)
    check_free(output.expanduser(), overwrite)
    if calibration is not None:
        check_readable(calibration, "calibration text")
    with ProgressBars() as progress:
        with stage("load model", progress):
            source = load_source(model, revision=revision, dtype=dtype, device=device, dequantize=dequantize)
        if calibration is not None:
            check_tokenizer_there(source, "calibration text")
        result = attnedit.compile(
            source.model,
            target=target,
            kv_budget=kv_budget,
            window=window,
            full_layers=full_layers,
            gate=gate,
            sinks=sinks,
            calibration=calibration,
            tokenizer=source.tokenizer,
            calibration_tokens=calibration_tokens,
            alternations=alternations,
            seed=seed,
            in_place=True,  # the source is not used again, so the memory for a second attention is spared
            progress=progress,
        )
        with stage("save", progress):
            result.save(output, overwrite=overwrite)
    if json:
        print_json({"output": str(output), **result.report.to_dict()})
    else:
        show(result.report)
        show(f"saved in {output}")

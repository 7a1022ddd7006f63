"""``attnedit compile``: rewrite a model and save it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import attnedit
from attnedit.cli.terminal import (
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
    check_budget,
    check_output,
    check_readable,
    print_json,
    show,
)
from attnedit.compiler.models import load_source

OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Directory to save the result in.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace what the output directory holds.")]


def compile_model(
    model: ModelArgument,
    output: OutputOption,
    target: Annotated[str, typer.Option(help="What attention becomes.")] = "mla",
    kv_budget: BudgetOption = None,
    calibration: CalibrationOption = None,
    calibration_tokens: CalibrationTokensOption = None,
    seed: SeedOption = 0,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    dequantize: DequantizeOption = False,
    overwrite: OverwriteOption = False,
    json: JsonOption = False,
) -> None:
    """Rewrite the attention of a model, verify the result, and save it as a transformers model."""
    check_budget(kv_budget)
    check_output(output, overwrite=overwrite)
    if calibration is not None:
        check_readable(calibration, "calibration text")
    with ProgressBars() as progress:
        source = load_source(model, revision=revision, dtype=dtype, device=device, dequantize=dequantize)
        result = attnedit.compile(
            source.model,
            target=target,
            kv_budget=kv_budget,
            calibration=calibration,
            tokenizer=source.tokenizer,
            calibration_tokens=calibration_tokens,
            seed=seed,
            in_place=True,  # the source is not used again, so the memory for a second attention is spared
            progress=progress,
        )
        result.save(output, overwrite=overwrite)
    if json:
        print_json({"output": str(output), **result.report.to_dict()})
    else:
        show(result.report)
        show(f"saved in {output}")

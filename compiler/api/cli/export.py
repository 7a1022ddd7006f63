"""``attnedit export``: a model for another runtime."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    ModelArgument,
    ProgressBars,
    check_output,
    print_json,
    remark,
    show,
)
from attnedit.compiler.data.lengths import beyond
from attnedit.compiler.data.token_windows import context_length
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import load_source
from attnedit.compiler.progress import stage
from attnedit.options import SourceOptions
from attnedit.result import BUILT_IN, CompileResult, find_runtime, read_report
from attnedit.targets.runtime.eager.checkpoint import REPORT_FILE


@takes(SourceOptions, without=("device", "dtype"))
def export(
    model: ModelArgument,
    to: Annotated[str, typer.Option(help="Runtime: onnx, hf, gguf or npu.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Directory to write, missing or empty; gguf: a new .gguf file too.")
    ],
    flavor: Annotated[
        str | None, typer.Option(help="ort: for ONNX Runtime; genai: for onnxruntime-genai; atc: for Ascend's ATC.")
    ] = None,
    cache: Annotated[
        str | None, typer.Option(help="dynamic: grows with every call; static: buffers of a fixed capacity.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, float16 or (npu, gguf) bfloat16; the model's own unless given."),
    ] = None,
    quantize: Annotated[str | None, typer.Option(help="onnx: int8 or int4 in linear layers; gguf: q8_0.")] = None,
    opset: Annotated[int | None, typer.Option(help="ONNX opset; chosen by what the runtime can run.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="atc, npu: rows.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="atc: tokens of one prefill call.")] = None,
    capacity: Annotated[int | None, typer.Option(help="atc, npu: tokens that the cache holds.")] = None,
    profile: Annotated[
        str | None, typer.Option(help="hf: deepseek_v3, youtu, laguna, lfm3, native or remote (docs/export-hf.md).")
    ] = None,
    kernel_dims: Annotated[
        bool, typer.Option("--kernel-dims", help="hf: sizes and norms that engines' kernels for latent attention want.")
    ] = False,
    gguf: Annotated[
        bool,
        typer.Option("--gguf", help="hf: a latent profile for llama.cpp's converter; better is --to gguf."),
    ] = False,
    engine: Annotated[
        str | None, typer.Option(help="What will serve it: vllm or sglang (--to hf), llama.cpp (--to gguf).")
    ] = None,
    soc: Annotated[str | None, typer.Option(help="npu: 910b, 910_93 or 310p; its limits decide.")] = None,
    *,
    json: JsonOption = False,
    **reading: Any,
) -> None:
    """Write a model, rewritten or not, for another runtime, and check it against the live one."""
    check_output(output, overwrite=False)
    lower = find_runtime(to)
    given: dict[str, Any] = {"flavor": flavor, "cache": cache, "dtype": dtype, "quantize": quantize, "opset": opset}
    given |= {"batch_size": batch_size, "seq_len": seq_len, "capacity": capacity}
    given |= {
        "profile": profile,
        "kernel_dims": kernel_dims or None,
        "gguf": gguf or None,
        "engine": engine,
        "soc": soc,
    }
    options = {name: value for name, value in given.items() if value is not None}
    check_options(to, lower, options)
    with ProgressBars() as progress:
        with stage("load model", progress):
            loading = SourceOptions.of(dtype="auto", device="cpu", **reading).loading
            loaded = load_source(model, **loading, logits_for=f"export to {to}" if to in BUILT_IN else None)
        source: Any = loaded
        if (Path(model).expanduser() / REPORT_FILE).exists():
            source = CompileResult(loaded.model, read_report(model), loaded.tokenizer)
        remark(beyond(loaded.model.config, context_length(loaded.model)))
        manifest = lower(source, output, progress=progress, **options)
    checks = getattr(manifest, "checks", [])
    decisions = list(getattr(manifest, "summary", []))
    worst = max((check["deviation"] for check in checks), default=None)
    size = sum(file.stat().st_size for file in (output, *output.rglob("*")) if file.is_file())
    if json:
        facts = {"model": model, "to": to, "output": str(output), "bytes": size, "checks": checks, **options}
        print_json({**facts, "decisions": decisions} if decisions else facts)
        return
    for decision in decisions:
        show(decision)
    found = f", {len(checks)} comparisons with the live model: deviation at most {worst:.1e}" if checks else ""
    show(f"{output}: {size / 2**20:,.1f} MiB{found}")


def check_options(runtime: str, lower: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Refuse options that a runtime does not have.

    Raises:
        UsageError: names the first, and those that there are.
    """
    known = inspect.signature(lower).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in known.values()):
        return
    for name in options:
        if name not in known:
            own = ", ".join(f"--{other.replace('_', '-')}" for other in list(known)[2:] if other != "progress")
            raise UsageError(f"--to {runtime} has no option --{name.replace('_', '-')}; it has {own}")

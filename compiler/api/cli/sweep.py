"""``attnedit sweep``: quality against cache over several budgets."""

from __future__ import annotations

import json as json_format
from collections.abc import Sequence
from io import BytesIO
from time import perf_counter
from typing import Annotated, Any

import typer
from rich.table import Table
from transformers import PreTrainedModel

from attnedit._compile import compile_live
from attnedit.cli.evaluate import SeqLenOption, TextOption, WindowsOption, measure
from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    ModelArgument,
    OutputOption,
    ProgressBars,
    check_output,
    check_readable,
    check_tokenizer_there,
    print_json,
    show,
)
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.data.token_windows import text_tokens
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.compiler.formats import FORMAT_KEY
from attnedit.compiler.model_io.models import load_source
from attnedit.compiler.model_io.source_checks import model_name
from attnedit.compiler.progress import stage
from attnedit.options import CompileOptions
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.planning import calibration_windows, check_fresh, plan_sites

FORMAT_VERSION = 1
"""Of sweep.json."""


@takes(
    CompileOptions,
    without={"kv_budget", "verify", "in_place", "partial", "fuel", "dump_graphs", "overwrite"}
    | CalibrationOptions.model_fields.keys(),
)
def sweep(
    model: ModelArgument,
    text: TextOption,
    output: OutputOption,
    kv_budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "0.5,0.25,0.125",
    seq_len: SeqLenOption = 1024,
    windows: WindowsOption = 40,
    *,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what the output directory holds.")] = False,
    json: JsonOption = False,
    **given: Any,
) -> None:
    """Compile at several budgets, evaluate each, and write sweep.json and sweep.png."""
    budgets = parse_budgets(kv_budgets)
    asked = [CompileOptions.of(**given, kv_budget=budget) for budget in budgets]
    options = min(asked, key=lambda each: each.kv_budget or 0)
    check_output(output, overwrite=overwrite)
    check_readable(text, "evaluation text")
    rows: list[dict[str, Any]] = []
    with ProgressBars() as progress:
        with stage("load model", progress):
            source = load_source(model, **options.loading, logits_for="evaluation")
        tokenizer = check_tokenizer_there(source, "evaluation text")
        with stage("tokenise", progress):
            tokens = text_tokens(text, tokenizer)
        with stage("capture", progress):
            check_smallest(source.model, options)
        # Once for all budgets: samples take long to make, and equal data is what makes the rows comparable.
        work = {"tokenizer": tokenizer, "progress": progress}
        data = calibration_windows(source.model, options.model_copy(update=work))
        figures = measure(source.model, tokens, seq_len=seq_len, windows=windows, progress=progress)
        rows.append({"kv_budget": None, "kv_budget_achieved": 1.0, "seconds": 0.0, **figures})
        for each in asked:
            start = perf_counter()
            result = compile_live(
                lambda asked: (source.model, asked), each.model_copy(update={**work, "calibration": data.parts})
            )
            seconds = perf_counter() - start
            figures = measure(result.model, tokens, seq_len=seq_len, windows=windows, progress=progress)
            achieved = result.report.kv_budget_achieved
            rows.append({"kv_budget": each.kv_budget, "kv_budget_achieved": achieved, "seconds": seconds, **figures})
    summary = {
        FORMAT_KEY: FORMAT_VERSION,
        "model": model,
        "target": options.target_name,
        "allocation": options.allocation,
        "text": text,
        "calibration_tokens": data.tokens,
        "calibration_length": data.length,
        "rows": rows,
    }
    picture = plot(rows, title=f"{model} to {options.target_name}")
    output.mkdir(parents=True, exist_ok=True)
    (output / "sweep.json").write_text(json_format.dumps(summary, indent=2) + "\n", encoding="utf-8")
    (output / "sweep.png").write_bytes(picture)
    if json:
        print_json(summary)
    else:
        show(_table(model, rows))
        show(f"written: {output / 'sweep.json'}, {output / 'sweep.png'}")


def parse_budgets(text: str) -> list[float]:
    """Read ``"0.5,0.25"``.

    >>> parse_budgets("0.5, 0.25")
    [0.5, 0.25]

    Raises:
        UsageError: not numbers above 0 and at most 1.
    """
    try:
        budgets = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"--kv-budgets {text!r} is not numbers separated by commas; give e.g. 0.5,0.25") from error
    for budget in budgets:
        CompileOptions.of(kv_budget=budget)
    return budgets


def check_smallest(model: PreTrainedModel, options: CompileOptions) -> None:
    """Refuse a model or a budget that cannot be done before the others have taken their time.

    Raises:
        UsageError: no attention that can be rewritten, or a budget that cannot be met.
    """
    check_fresh(model, model_name(model))
    plan_sites(model, capture(model), kv_usage(model), options).claims()


def plot(rows: Sequence[dict[str, Any]], *, title: str) -> bytes:
    """PNG of perplexity over cached values per token and layer; the first row is the source."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, and only this command draws
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    points = sorted((row["kv_values_per_token_layer"], row["perplexity"]) for row in rows[1:])
    axes.plot([x for x, _ in points], [y for _, y in points], marker="o", label="result")
    axes.axhline(rows[0]["perplexity"], linestyle="--", color="gray", label="source")
    axes.set(xscale="log", yscale="log", title=title)
    axes.set(xlabel="cached values per token and layer", ylabel="perplexity")
    axes.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
    axes.minorticks_off()
    axes.legend()
    png = BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    return png.getvalue()


def _table(model: str, rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title=model)
    for column in ("kv budget", "achieved", "values per token and layer", "bytes per token", "perplexity", "seconds"):
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            "source" if row["kv_budget"] is None else f"{row['kv_budget']:g}",
            f"{row['kv_budget_achieved']:.4g}",
            f"{row['kv_values_per_token_layer']:g}",
            f"{row['kv_bytes_per_token']:,.0f}",
            f"{row['perplexity']:.3f}",
            f"{row['seconds']:.1f}",
        )
    return table

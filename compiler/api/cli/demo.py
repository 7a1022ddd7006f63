"""``attnedit demo``: the main job on a real small model, offline."""

from __future__ import annotations

from typing import Any

import torch
from rich.table import Table
from transformers import PreTrainedModel

import attnedit
from attnedit.cli.evaluate import measure
from attnedit.cli.generate import complete
from attnedit.cli.terminal import JsonOption, ProgressBars, check_tokenizer_there, print_json, show
from attnedit.compiler.data.token_windows import demo_text
from attnedit.compiler.model_io.demo_model import SMOLLM2
from attnedit.compiler.model_io.models import Source, load_source
from attnedit.compiler.progress import stage

KV_BUDGET = 0.5
CALIBRATION_TOKENS = 16_384
ALTERNATIONS = 1  # two more than double the time
EVALUATION_WINDOWS = 10
SEQ_LEN = 1024
PROMPT = "A list in Python is"
NEW_TOKENS = 30


def demo(json: JsonOption = False) -> None:
    """Halve the KV cache of SmolLM2-135M-Instruct, compare it with the source, and let both write."""
    with ProgressBars() as progress:
        with stage("load model", progress):
            source = load_source(SMOLLM2)
        outcome, result = run(source, progress=progress)
    if json:
        print_json({**outcome, "report": result.report.to_dict()})
        return
    show(result.report)
    table = Table(title=f"{SMOLLM2}, {EVALUATION_WINDOWS} held-out windows of the Python language reference")
    for column in ("", "perplexity", "values per token and layer", "bytes per token", f"{PROMPT!r} goes on"):
        table.add_column(column)
    for name in ("source", "result"):
        row = outcome[name]
        table.add_row(
            name,
            f"{row['perplexity']:.2f}",
            f"{row['kv_values_per_token_layer']:g}",
            f"{row['kv_bytes_per_token']:,.0f}",
            row["text"].strip(),
        )
    show(table)


def run(
    source: Source,
    *,
    progress: ProgressBars | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    windows: int = EVALUATION_WINDOWS,
    seq_len: int = SEQ_LEN,
) -> tuple[dict[str, Any], attnedit.CompileResult]:
    """Compile a source at half budget and measure both; the text is Python's own language reference.

    Raises:
        UsageError: the source has no tokenizer.
    """
    tokenizer = check_tokenizer_there(source, "the demo")
    calibration, evaluation = demo_text()
    ids = tokenizer(evaluation, add_special_tokens=False, verbose=False)["input_ids"]
    tokens = torch.tensor(ids, dtype=torch.int64)

    def figures(model: PreTrainedModel) -> dict[str, Any]:
        measured = measure(model, tokens, seq_len=seq_len, windows=windows, progress=progress)
        return measured | {"text": complete(model, tokenizer, PROMPT, NEW_TOKENS)[0]}

    before = figures(source.model)
    result = attnedit.compile(
        source.model,
        target="mla",
        kv_budget=KV_BUDGET,
        calibration=[calibration],
        tokenizer=tokenizer,
        calibration_tokens=calibration_tokens,
        alternations=ALTERNATIONS,
        progress=progress,
    )
    return {"model": source.name, "source": before, "result": figures(result.model)}, result

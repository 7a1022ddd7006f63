"""``attnedit eval``: perplexity and cache of a model as it stands."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from attnedit.cli.terminal import (
    DequantizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ProgressBars,
    RevisionOption,
    check_readable,
    check_tokenizer_there,
    print_json,
    show,
)
from attnedit.compiler.data import text_tokens
from attnedit.compiler.evaluate import kv_usage, perplexity
from attnedit.compiler.models import load_source
from attnedit.compiler.progress import Progress, stage

TextOption = Annotated[str, typer.Option(help="Text, jsonl or parquet file to evaluate on.")]
SeqLenOption = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
WindowsOption = Annotated[int, typer.Option(min=1, help="How many windows, from the start of the text.")]


def evaluate(
    model: ModelArgument,
    text: TextOption,
    seq_len: SeqLenOption = 1024,
    windows: WindowsOption = 40,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    dequantize: DequantizeOption = False,
    json: JsonOption = False,
) -> None:
    """Measure perplexity on consecutive windows of a text, and what the cache really holds per token."""
    check_readable(text, "evaluation text")
    with ProgressBars() as progress:
        with stage("load model", progress):
            source = load_source(model, revision=revision, dtype=dtype, device=device, dequantize=dequantize)
        tokenizer = check_tokenizer_there(source, "evaluation text")
        with stage("tokenise", progress):
            tokens = text_tokens(text, tokenizer)
        figures = measure(source.model, tokens, seq_len=seq_len, windows=windows, batch=batch, progress=progress)
    if json:
        print_json({"model": model, **figures})
        return
    show(
        f"perplexity {figures['perplexity']:.3f} on {figures['tokens']:,} tokens "
        f"({figures['windows']} windows of {seq_len})"
    )
    show(
        f"KV cache   {figures['kv_values_per_token_layer']:g} values per token and layer, "
        f"{figures['kv_bytes_per_token']:,.0f} bytes per token"
    )


def measure(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    seq_len: int,
    windows: int,
    batch: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quality and cost of one model, as ``eval --json`` prints them."""
    quality = perplexity(model, tokens, seq_len=seq_len, windows=windows, batch=batch, progress=progress)
    usage = kv_usage(model)
    return {
        **asdict(quality),
        "seq_len": seq_len,
        "kv_values_per_token_layer": usage.values_per_token_layer,
        "kv_bytes_per_token": usage.bytes_per_token,
    }

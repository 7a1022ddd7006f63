"""``attnedit eval``: perplexity and cache of a model as it stands."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import torch
import typer
from rich.table import Table
from transformers import PreTrainedModel

from attnedit.cli.terminal import (
    AllowPickleOption,
    DequantizeOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ProgressBars,
    RevisionOption,
    SeedOption,
    TrustRemoteCodeOption,
    check_readable,
    check_tokenizer_there,
    print_json,
    show,
)
from attnedit.compiler.data import demo_text, text_tokens
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluate import kv_usage, perplexity
from attnedit.compiler.models import load_source
from attnedit.compiler.progress import Progress, stage
from attnedit.compiler.retrieval import LENGTHS, OPTIONS, TRIALS, RetrievalScore, retrieval

TextOption = Annotated[str, typer.Option(help="Text, jsonl, json or parquet file to evaluate on.")]
SeqLenOption = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
WindowsOption = Annotated[int, typer.Option(min=1, help="How many windows, from the start of the text.")]


def evaluate(
    model: ModelArgument,
    text: Annotated[
        str | None, typer.Option(help="Text, jsonl, json or parquet file to evaluate on; --retrieval can do without.")
    ] = None,
    seq_len: SeqLenOption = 1024,
    windows: WindowsOption = 40,
    batch: Annotated[int, typer.Option(min=1, help="Windows per forward pass.")] = 1,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "float32",
    revision: RevisionOption = None,
    dequantize: DequantizeOption = False,
    allow_pickle: AllowPickleOption = False,
    trust_remote_code: TrustRemoteCodeOption = False,
    retrieve: Annotated[
        bool, typer.Option("--retrieval", help="Ask for a fact planted in a long text, in place of perplexity.")
    ] = False,
    lengths: Annotated[str, typer.Option(help="Tokens per prompt of --retrieval.")] = ",".join(map(str, LENGTHS)),
    trials: Annotated[int, typer.Option(min=1, help="Prompts per length and depth of --retrieval.")] = TRIALS,
    seed: SeedOption = 0,
    json: JsonOption = False,
) -> None:
    """Measure perplexity on consecutive windows of a text, and what the cache really holds per token."""
    if text is None and not retrieve:
        raise UsageError("eval needs --text FILE, or --retrieval")
    tested = _lengths(lengths)
    if text is not None:
        check_readable(text, "evaluation text")
    with ProgressBars() as progress:
        with stage("load model", progress):
            source = load_source(
                model,
                revision=revision,
                dtype=dtype,
                device=device,
                dequantize=dequantize,
                allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )
        tokenizer = check_tokenizer_there(source, "evaluation text")
        if retrieve:
            ids = tokenizer(demo_text()[1], add_special_tokens=False)["input_ids"] if text is None else None
            filler = torch.tensor(ids) if ids is not None else text_tokens(str(text), tokenizer)
            scores = retrieval(
                source.model, tokenizer, filler, lengths=tested, trials=trials, seed=seed, progress=progress
            )
            _show_retrieval(model, scores, json)
            return
        with stage("tokenise", progress):
            tokens = text_tokens(str(text), tokenizer)
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


def _lengths(listed: str) -> list[int]:
    try:
        return [int(part) for part in listed.split(",")]
    except ValueError:
        raise UsageError(f"lengths {listed!r}: give numbers with commas between") from None


def _show_retrieval(model: str, scores: list[RetrievalScore], json: bool) -> None:
    if json:
        print_json({"model": model, "retrieval": [asdict(score) for score in scores]})
        return
    depths = sorted({score.depth for score in scores})
    table = Table(title=f"{model}: facts found, by length of the text and depth of the fact (chance {1 / OPTIONS:.0%})")
    table.add_column("tokens", justify="right")
    for heading in [*(f"{depth:.0%}" for depth in depths), "all", "probability"]:
        table.add_column(heading, justify="right")
    for length in dict.fromkeys(score.length for score in scores):
        row = {score.depth: score for score in scores if score.length == length}
        accuracy = [row[depth].accuracy for depth in depths]
        mean = sum(score.probability for score in row.values()) / len(row)
        cells = [f"{value:.0%}" for value in [*accuracy, sum(accuracy) / len(row)]]
        table.add_row(f"{length:,}", *cells, f"{mean:.2f}")
    show(table)


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

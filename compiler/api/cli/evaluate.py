"""``attnedit eval``: perplexity, by position too, facts found in long texts, and the cache of a model as it stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from attnedit.cli.evaluation_tables import (
    perplexity_figures,
    perplexity_table,
    position_figures,
    position_table,
    retrieval_figures,
    retrieval_table,
)
from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    ModelArgument,
    ProgressBars,
    SeedOption,
    check_readable,
    check_tokenizer_there,
    print_json,
    remark,
    show,
)
from attnedit.compiler.data.lengths import beyond
from attnedit.compiler.data.token_windows import demo_text, served_length, text_tokens
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.evaluate import kv_usage, text_windows, window_losses
from attnedit.compiler.evaluation.positions import WINDOWS as LONG_WINDOWS
from attnedit.compiler.evaluation.retrieval import (
    TRIALS,
    answers,
    check_lengths,
    check_prompts,
    default_lengths,
    retrieval_prompts,
)
from attnedit.compiler.model_io.models import Source, load_source
from attnedit.compiler.progress import Progress, stage
from attnedit.options import SourceOptions

SEQ_LEN = 1024
WINDOWS = 40
FARTHEST = "up to 8,192 on a CPU, else 32,768"
TextOption = Annotated[str, typer.Option(help="Text, jsonl, json or parquet file to evaluate on.")]
SeqLenOption = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
WindowsOption = Annotated[int, typer.Option(min=1, help="How many windows, from the start of the text.")]


@takes(SourceOptions)
def evaluate(
    model: ModelArgument,
    text: Annotated[
        str | None, typer.Option(help="Text, jsonl, json or parquet file to evaluate on; --retrieval can do without.")
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="MODEL to compare with on the same windows or prompts: the source, say.")
    ] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="Perplexity by position inside long windows.")
    ] = False,
    seq_len: Annotated[
        int | None,
        typer.Option(min=2, help=f"Tokens per window; {SEQ_LEN}; with --by-position the context, {FARTHEST}."),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(
            min=1, help=f"How many windows, from the start of the text; {WINDOWS}, {LONG_WINDOWS} with --by-position."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Windows or prompts per forward pass.")] = 1,
    retrieve: Annotated[
        bool, typer.Option("--retrieval", help="Ask for a fact planted in a long text, in place of perplexity.")
    ] = False,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Tokens per prompt of --retrieval, commas between; 1,024 and its doubles to the context, "
            + FARTHEST
            + "."
        ),
    ] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help=f"Prompts per length and depth of --retrieval; {TRIALS}.")
    ] = None,
    seed: SeedOption = 0,
    *,
    json: JsonOption = False,
    **given: Any,
) -> None:
    """Measure perplexity on windows of a text and what the cache holds, or what is found far back in long texts."""
    if by_position and retrieve:
        raise UsageError("--by-position and --retrieval measure two things; give one of them at a time")
    if text is None and not retrieve:
        raise UsageError("eval needs --text FILE, or --retrieval")
    if retrieve and (seq_len is not None or windows is not None):
        raise UsageError("--seq-len and --windows are of perplexity; --retrieval has --lengths and --trials")
    if not retrieve and (lengths is not None or trials is not None):
        raise UsageError("--lengths and --trials are of --retrieval; perplexity has --seq-len and --windows")
    tested = None if lengths is None else _lengths(lengths)
    if text is not None:
        check_readable(text, "evaluation text")
    with ProgressBars() as progress:
        with stage("load model", progress):
            loading = {**SourceOptions.of(**given).loading, "logits_for": "evaluation"}
            sources = [load_source(model, **loading)]
            if against is not None:
                sources.append(load_source(against, **{**loading, "revision": None}))
        models = [source.model for source in sources]
        tested = tested or default_lengths(models[0])
        for each in models if retrieve else ():
            check_lengths(each, tested)
        with stage("tokenise", progress):
            tokens = _same_tokens(text, sources)
        if retrieve:
            tokenizer = check_tokenizer_there(sources[0], "evaluation text")
            farthest = max(tested)
            prompts = retrieval_prompts(tokenizer, tokens, lengths=tested, trials=trials or TRIALS, seed=seed)
            for each in models:
                check_prompts(each, prompts)
            found = [answers(each, prompts, batch=batch, progress=progress) for each in models]
            figures, shown = retrieval_figures(found), retrieval_table
        else:
            farthest = length = seq_len or (served_length(models[0]) if by_position else SEQ_LEN)
            count = windows or (LONG_WINDOWS if by_position else WINDOWS)
            rows, *_ = [text_windows(each, tokens, seq_len=length, windows=count) for each in models]
            losses = [window_losses(each, rows, batch=batch, progress=progress) for each in models]
            figures, shown = position_figures(losses), position_table
            if not by_position:
                figures, shown = perplexity_figures(losses, kv_usage(models[0])), perplexity_table
    remark(beyond(models[0].config, farthest))
    names = {"model": model, **({} if against is None else {"against": against})}
    if json:
        print_json({**names, **figures})
    else:
        show(shown(names, figures))


def _lengths(listed: str) -> list[int]:
    try:
        return [int(part) for part in listed.split(",")]
    except ValueError:
        raise UsageError(f"lengths {listed!r}: give numbers with commas between") from None


def _same_tokens(text: str | None, sources: Sequence[Source]) -> torch.Tensor:
    """Token ids [M] of a text, or of one that is at hand everywhere, in which all models must agree."""
    found = []
    for source in sources:
        tokenizer = check_tokenizer_there(source, "evaluation text")
        if text is None:
            ids = tokenizer(demo_text()[1], add_special_tokens=False, verbose=False)["input_ids"]
            found.append(torch.tensor(ids, dtype=torch.int64))
        else:
            found.append(text_tokens(text, tokenizer))
        if not torch.equal(found[0], found[-1]):
            raise UsageError(
                f"{sources[0].name} and {source.name} have different tokenizers, so their figures cannot be compared; "
                f"give a model and the source it was made from"
            )
    return found[0]


def measure(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    seq_len: int,
    windows: int,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Quality and cost of one model, as ``eval --json`` prints them."""
    rows = text_windows(model, tokens, seq_len=seq_len, windows=windows)
    return perplexity_figures([window_losses(model, rows, progress=progress)], kv_usage(model))

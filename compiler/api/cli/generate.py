"""``attnedit generate``: text out of a model."""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.cli.exported import generate_exported, is_exported
from attnedit.cli.flags import takes
from attnedit.cli.terminal import (
    JsonOption,
    ModelArgument,
    ProgressBars,
    SeedOption,
    check_tokenizer_there,
    print_json,
    remark,
    show,
)
from attnedit.compiler.data.lengths import beyond
from attnedit.compiler.data.token_windows import position_limit
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import load_source
from attnedit.compiler.progress import stage
from attnedit.options import SourceOptions


@takes(SourceOptions)
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Option(help="Text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens to add at most.")] = 20,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    seed: SeedOption = 0,
    *,
    json: JsonOption = False,
    **given: Any,
) -> None:
    """Continue a prompt."""
    if is_exported(model):
        if unread := sorted(given.keys() - {"device", "dtype"}):
            raise UsageError(f"{model} is an exported model; {unread[0]} is for others")
        generate_exported(model, prompt, max_new_tokens, temperature, seed, json=json)
        return
    with ProgressBars() as progress, stage("load model", progress):
        source = load_source(model, **SourceOptions.of(**given).loading, logits_for="generation")
    tokenizer = check_tokenizer_there(source, "a prompt")
    torch.manual_seed(seed)
    remark(beyond(source.model.config, len(tokenizer(prompt)["input_ids"]) + max_new_tokens))
    text, count = complete(source.model, tokenizer, prompt, max_new_tokens, temperature)
    if json:
        print_json({"model": model, "prompt": prompt, "text": text, "new_tokens": count})
    else:
        show(prompt + text)


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> tuple[str, int]:
    """The continuation of a prompt and its number of tokens.

    Raises:
        UsageError: the prompt has no token, or prompt and continuation are too long for the model.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    length, limit = inputs["input_ids"].shape[1], position_limit(model)
    if not prompt or length == 0:
        raise UsageError("the prompt is empty; give at least one word")
    if limit is not None and length + max_new_tokens > limit:
        raise UsageError(
            f"{length} tokens of prompt and {max_new_tokens} new ones are too many: the model has {limit} positions; "
            + (f"ask for at most {limit - length} new tokens" if length < limit else "shorten the prompt")
        )
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    generate_tokens: Any = model.generate  # typed as a tensor or module, like every attribute of a module
    output = generate_tokens(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        num_return_sequences=1,  # one is shown, whatever the model's generation config says
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    new = output[0, length:]
    return str(tokenizer.decode(new, skip_special_tokens=True)), int(new.numel())

"""The model's own samples: calibration data where the user gives none."""

from __future__ import annotations

import inspect

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.errors import UsageError
from attnedit.compiler.progress import Progress, silent
from attnedit.compiler.source_checks import embedding_weight

#: Sequences sampled side by side: a decoding step of a small model costs little more for 32 than for 1.
_BATCH = 32


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int = 0,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Sample windows at temperature 1 from the beginning-of-sequence token, going on after an end of sequence.

    Decoding is one step per token whatever the batch, so few long windows are replaced by more and shorter ones
    of at least 256 tokens when that fills the batch.

    Args:
        model: any causal language model that takes ``past_key_values``.
        tokenizer: for the first token, where the configuration names none.
        count: N windows.
        length: L tokens each, the first token counted.
        seed: same seed, same model, same device: same samples.
        progress: told after every token.

    Returns:
        int64 [N', L'] on the CPU with N' * L' about N * L.

    Raises:
        UsageError: the model's logits are not finite.
    """
    report = progress or silent
    while count * 2 <= _BATCH and length >= 512:
        count, length = count * 2, length // 2
    device = embedding_weight(model).device
    generator = torch.Generator(device).manual_seed(seed)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    total, done, rows = length * -(-count // _BATCH), 0, []
    for start in range(0, count, _BATCH):
        tokens = torch.full((min(_BATCH, count - start), 1), _first_token(model, tokenizer), device=device)
        cache = DynamicCache(config=model.config)
        row = [tokens]
        for position in range(length - 1):
            report("sample calibration text", done, total)
            call = {**keep, **position_ids(model, tokens, position)}
            logits = model(tokens, past_key_values=cache, use_cache=True, **call).logits[:, -1].float()
            if not bool(torch.isfinite(logits.sum())):
                raise UsageError("the model's logits are not finite, so it cannot be sampled; give calibration text")
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            row.append(tokens)
            done += 1
        done += 1
        rows.append(torch.cat(row, dim=1).cpu())
    report("sample calibration text", total, total)
    return torch.cat(rows).clone()


def position_ids(model: PreTrainedModel, ids: torch.Tensor, start: int) -> dict[str, torch.Tensor]:
    """The argument of that name for tokens [B, T] after `start` others, where the model takes it.

    Most models count what is in the cache; some always start at 0 unless told.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)
    return {"position_ids": positions.expand(ids.shape)}


def _first_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> int:
    config = model.config.get_text_config(decoder=True)
    rows = embedding_weight(model).shape[0]
    for candidate in (
        getattr(tokenizer, "bos_token_id", None),
        getattr(config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
        getattr(config, "eos_token_id", None),
    ):
        first = candidate[0] if isinstance(candidate, list) and candidate else candidate
        if isinstance(first, int) and 0 <= first < rows:
            return first
    return 0

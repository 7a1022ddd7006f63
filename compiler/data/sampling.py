"""The model's own samples: calibration data where the user gives none."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.model_inputs import position_ids
from attnedit.compiler.files import cache_directory, replaced
from attnedit.compiler.model_io.heads import SAMPLING, need_language_head
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.compiler.progress import Progress, silent

#: Sequences sampled side by side: a decoding step of a small model costs little more for 32 than for 1.
_BATCH = 32
#: The most on an accelerator with room for their cache.
_LARGE_BATCH = 2048

SAMPLE_LENGTH = 512
"""Longer windows are packed from samples of about this length: decoding takes a step per token, however many side by
side."""
MOST_TOKENS = 1 << 21
"""Of own samples for training; later epochs see them again."""
PROMPT = 32
"""Tokens of the text that a sample goes on from."""
CHUNK = 512
"""Windows that are sampled and kept together: who was stopped, or asks for more, samples only what is missing."""


@torch.inference_mode()
def sample_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int = 0,
    starts: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """Sample windows at temperature 1 from the beginning-of-sequence token, going on after an end of sequence.

    Decoding is one step per token whatever the batch, so few long windows are replaced by more and shorter ones
    of at least 256 tokens when that fills the batch.

    Args:
        model: any causal language model that takes a cache.
        tokenizer: for the first token, where the configuration names none.
        count: N windows.
        length: L tokens each, the first token counted.
        seed: same seed, same model, same device: same samples.
        starts: what the windows begin with in place of that token, int64 [N, K], K at most L; below 0 where sampled.
        progress: told after every token.

    Returns:
        int64 [N', L'] on the CPU with N' * L' about N * L.

    Raises:
        UsageError: the model's logits are not finite, or it has no head that gives them.
    """
    need_language_head(model, SAMPLING, "give calibration text")
    report = progress or silent
    while starts is None and count * 2 <= _BATCH and length >= 512:
        count, length = count * 2, length // 2
    device = embedding_weight(model).device
    generator = torch.Generator(device).manual_seed(seed)
    keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    if starts is None:
        starts = torch.full((count, 1), _first_token(model, tokenizer))
    size = _batch_size(model, length)
    sampled = _half(model) if device.type in ("cuda", "npu") else model
    total, done, rows = length * -(-count // size), 0, []
    for start in range(0, count, size):
        given = starts[start : start + size].to(device)
        tokens = given[:, :1]
        cache = DynamicCache(config=model.config)
        row = [tokens]
        for position in range(length - 1):
            report("sample calibration text", done, total)
            call = {**keep, **position_ids(model, tokens, position)}
            logits = sampled(tokens, **with_cache(sampled, cache), **call).logits[:, -1].float()
            if not bool(torch.isfinite(logits.sum())):
                raise UsageError("the model's logits are not finite, so it cannot be sampled; give calibration text")
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            if position + 1 < given.shape[1]:
                wanted = given[:, position + 1 : position + 2]
                tokens = torch.where(wanted < 0, tokens, wanted)
            row.append(tokens)
            done += 1
        done += 1
        rows.append(torch.cat(row, dim=1).cpu())
    report("sample calibration text", total, total)
    return torch.cat(rows).clone()


def own_windows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    count: int,
    length: int,
    seed: int = 0,
    text: torch.Tensor | None = None,
    progress: Progress | None = None,
) -> torch.Tensor:
    """`sample_windows` for training: at most `MOST_TOKENS` [N, L], kept on disk by model, seed and text.

    Samples of `SAMPLE_LENGTH` or less are packed into longer windows. They are varied by what they begin with: in turn
    the first token alone, that and a random token (LLM-QAT, arXiv 2305.17888), and twice `PROMPT` tokens of the text
    (ids [N, L]).
    """
    count = max(1, min(count, MOST_TOKENS // length))
    whose = _fingerprint(model) + ("" if text is None else hashlib.sha256(text.numpy().tobytes()).hexdigest())
    chunks = range(0, count, CHUNK)
    parts = []
    for index, first in enumerate(chunks):
        size = min(CHUNK, count - first)
        key = hashlib.sha256(f"{whose} {size} {length} {seed} {index}".encode()).hexdigest()[:32]
        file = cache_directory("samples") / f"{key}.safetensors"
        if file.exists():
            windows = load_file(file)["windows"]
        else:
            # Far from the seeds of other runs, so that no two of them sample the same text.
            told = _part(progress, index, len(chunks))
            windows = _packed(model, tokenizer, size, length, (seed << 20) + index, text, told)
            _keep(windows, file)
        parts.append(windows.to(torch.int64))
    return torch.cat(parts)


def _part(progress: Progress | None, index: int, parts: int) -> Progress:
    """Progress of one of several equal parts, told as progress of the whole."""
    report = progress or silent
    return lambda name, done, total: report(name, index * total + done, parts * total)


def _keep(windows: torch.Tensor, file: Path) -> None:
    """Write windows into the cache; one that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        with replaced(file, shared=True) as part:
            save_file({"windows": windows.to(torch.int32)}, part)


def _packed(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    count: int,
    length: int,
    seed: int,
    text: torch.Tensor | None,
    progress: Progress | None,
) -> torch.Tensor:
    """Windows [N, L] of samples one after the other."""
    pieces = -(-length // SAMPLE_LENGTH)
    size = -(-length // pieces)
    count *= pieces
    starts = _starts(_first_token(model, tokenizer), embedding_weight(model).shape[0], count, size, seed, text)
    samples = sample_windows(model, tokenizer, count=count, length=size, seed=seed, starts=starts, progress=progress)
    return samples.view(-1, pieces * size)[:, :length].contiguous()


def _starts(first: int, vocabulary: int, count: int, size: int, seed: int, text: torch.Tensor | None) -> torch.Tensor:
    """What each of `count` samples of `size` tokens begins with, for `sample_windows`."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.full((count, min(PROMPT, size)), -1)
    starts[:, 0] = first
    starts[1::2, 1:2] = torch.randint(vocabulary, starts[1::2, 1:2].shape, generator=generator)
    if text is not None:
        prompted = torch.arange(count) % 4 >= 2
        length = min(starts.shape[1], text.shape[1])
        rows = torch.randint(len(text), (int(prompted.sum()), 1), generator=generator)
        places = torch.randint(text.shape[1] - length + 1, rows.shape, generator=generator) + torch.arange(length)
        starts[prompted, :length] = text[rows, places]
        if bool((text[:, 0] == first).all()):  # as the tokenizer begins every text
            starts[prompted, 0] = first
    return starts


def _fingerprint(model: PreTrainedModel) -> str:
    """A digest of the configuration and of some numbers of every weight."""
    digest = hashlib.sha256(model.config.to_json_string().encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, flat.numel() // 16)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _half(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in bfloat16, where casting float32 weights anew at every token would take most of the time."""
    if embedding_weight(model).dtype != torch.float32:
        return model
    half: PreTrainedModel = copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[arg-type]  # transformers wraps it
    return half


def _batch_size(model: PreTrainedModel, length: int) -> int:
    """Sequences side by side: as many as a quarter of an accelerator's free memory holds the caches of."""
    weight = embedding_weight(model)
    if weight.device.type != "cuda":
        return _BATCH
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    cache = (
        2 * config.num_hidden_layers * heads * head_dim * length * min(2, weight.element_size())
    )  # bytes, in bfloat16
    free, _ = torch.cuda.mem_get_info(weight.device)
    # Growing a cache makes a copy of a layer's, logits are in float32: a quarter leaves room for that.
    return max(_BATCH, min(_LARGE_BATCH, int(free // 4 // cache)))


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

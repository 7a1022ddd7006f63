"""Quality and cost of a model as it stands: perplexity, and what its cache really holds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import given_cache, with_cache
from attnedit.compiler.data.token_windows import context_length, position_limit
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.evaluation.intervals import Interval, exponential, interval_of_exponential
from attnedit.compiler.evaluation.logits import token_losses
from attnedit.compiler.graph.meta import runnable_on_meta
from attnedit.compiler.graph.modules import evaluation_mode
from attnedit.compiler.model_io.heads import need_language_head, runner
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.compiler.progress import Progress, track
from attnedit.compiler.reporting.records import KVUsage


@dataclass(frozen=True)
class Perplexity:
    """Result of `perplexity`.

    Attributes:
        perplexity: exp of ``loss``.
        loss: mean negative log-likelihood in nats.
        tokens: how many were predicted.
        windows: how many windows they come from.
        interval: 95 % bootstrap interval of ``perplexity`` over the windows; None for one window.
    """

    perplexity: float
    loss: float
    tokens: int
    windows: int
    interval: Interval


def perplexity(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    *,
    seq_len: int = 1024,
    windows: int = 40,
    batch: int = 1,
    progress: Progress | None = None,
) -> Perplexity:
    """Perplexity over consecutive windows, each on its own.

    The text is cut into windows of ``seq_len`` from its start, without any special token, and tokens 2 to
    ``seq_len`` of each of the first ``windows`` are predicted.

    Args:
        model: causal language model.
        tokens: int64 [number of tokens], the whole text in order.
        seq_len: window length, at least 2.
        windows: how many; the text must be long enough for all.
        batch: windows per forward pass; more than one costs memory for their hidden states.
        progress: told after every forward pass.

    Returns:
        The perplexity with its interval, and what it was measured on.

    Raises:
        UsageError: the text is too short, the windows too long for the model, or an argument makes no sense.
        AttneditError: the model's loss is not finite.
    """
    rows = text_windows(model, tokens, seq_len=seq_len, windows=windows)
    return mean_perplexity(window_losses(model, rows, batch=batch, progress=progress))


def mean_perplexity(losses: Tensor) -> Perplexity:
    """Perplexity of what `window_losses` returned, float32 [N, T - 1]."""
    means = losses.to(torch.float64).mean(1)
    loss = float(means.mean())
    return Perplexity(exponential(loss), loss, losses.numel(), len(losses), interval_of_exponential(means))


def text_windows(model: PreTrainedModel, tokens: Tensor, *, seq_len: int, windows: int) -> Tensor:
    """The windows of `perplexity`, int64 [N, T]: N is ``windows``, T ``seq_len``.

    Raises:
        UsageError: the text is too short, the windows too long for the model, or an argument makes no sense.
    """
    if seq_len < 2 or windows < 1:
        raise UsageError(f"seq_len {seq_len}, windows {windows}: at least 2 and 1 are needed")
    limit = position_limit(model)
    if limit is not None and seq_len > limit:
        raise UsageError(
            f"windows of {seq_len} tokens are too long: the model has {limit} positions; ask for at most that"
        )
    available = tokens.numel() // seq_len
    if available < windows:
        raise UsageError(
            f"the evaluation text has {tokens.numel()} tokens, and {windows} windows of {seq_len} need "
            f"{windows * seq_len}; give a longer text, or ask for "
            + (f"at most {available} windows" if available else "shorter windows")
        )
    count = len(embedding_weight(model))
    rows = tokens.flatten()[: windows * seq_len].view(windows, seq_len)
    if int(rows.max()) >= count or int(rows.min()) < 0:
        raise UsageError(
            f"the evaluation text holds token id {int(rows.max())}, and the model has {count} embeddings; "
            f"give the tokenizer the model was trained with"
        )
    return rows


def window_losses(model: PreTrainedModel, rows: Tensor, *, batch: int = 1, progress: Progress | None = None) -> Tensor:
    """Negative log-likelihoods in nats of tokens 2 to T of windows [N, T], float32 [N, T - 1] on the CPU.

    Raises:
        UsageError: batch is less than 1, or the model has no language-model head.
        AttneditError: a loss is not finite.
    """
    need_language_head(model, "perplexity", "give a causal language model")
    if batch < 1:
        raise UsageError(f"batch {batch}: at least 1 window goes through the model at once")
    device = embedding_weight(model).device
    chunks = track(rows.split(batch), "evaluate", progress)
    losses = torch.cat([token_losses(model, chunk.to(device)).cpu() for chunk in chunks])
    broken = losses[~losses.isfinite()]
    if len(broken):
        raise AttneditError(f"the model's loss on the evaluation text is {float(broken[0])}; its outputs are broken")
    return losses


@torch.inference_mode()
def kv_usage(model: PreTrainedModel, *, length: int | None = None) -> KVUsage:
    """Run a few tokens and count what the cache holds.

    Args:
        model: causal language model; on meta too, where only buffers may need values.
        length: context length to account for; the model's own by default.

    Returns:
        Cached values and bytes per token.

    Raises:
        UsageError: the model keeps no key-value cache.
    """
    length = length or context_length(model)
    cache = DynamicCache(config=model.config)
    tokens = 2
    device = embedding_weight(model).device
    ids = torch.zeros((1, tokens), dtype=torch.int64, device=device)
    try:
        # In training, checkpointed layers keep no cache.
        with evaluation_mode(model), runnable_on_meta(model):
            run = runner(model)
            used = given_cache(run(ids, **with_cache(run, cache)))
    except ValueError as error:  # some families accept a cache class of their own only
        raise UsageError(f"{type(model).__name__} does not work with a transformers DynamicCache: {error}") from error
    config = model.config.get_text_config(decoder=True)
    per_layer = [0.0] * int(config.num_hidden_layers)
    total_bytes = 0.0
    for index, layer in enumerate(getattr(used, "layers", ())):
        share = 1.0
        bound = layer.sliding_window if getattr(layer, "is_sliding", False) else getattr(layer, "max_tokens", None)
        if bound is not None:
            share = min(1.0, float(bound) / length)
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if part is not None and part.dim() > 1:
                width = part.shape[:-2].numel() * part.shape[-1]
                per_layer[index] += width * share
                total_bytes += width * share * part.element_size()
    if not any(per_layer):
        raise UsageError("the model keeps no key-value cache, so there is nothing to measure")
    return KVUsage(tuple(per_layer), total_bytes, length)

"""What authors of rewrites and targets test with, and attnedit's own tests too: tiny models, and what must hold.

A check raises AssertionError with what is wrong; none of it needs pytest, or data from anywhere.

Letters in shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedConfig, PreTrainedModel, set_seed

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.verify import TOLERANCE
from attnedit.result import CompileResult, load

VOCABULARY = 64
PIECES = (9, 1, 1, 4, 1)
"""Tokens of successive calls on one cache, in which `check_decode` decodes."""


@torch.no_grad()
def tiny_model(config: PreTrainedConfig | None = None, **sizes: int | float | bool | str | None) -> PreTrainedModel:
    """A small causal language model whose random weights are large enough for a mistake in any of them to show.

    Args:
        config: of its class and sizes; a Llama of two layers, four heads and two key/value heads unless given.
        **sizes: in which that Llama differs.

    Returns:
        The model in float32, on the CPU, in evaluation mode.

    >>> tiny_model(num_hidden_layers=3).config.num_hidden_layers
    3
    """
    own: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    own |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    set_seed(0)
    asked = config or LlamaConfig(**{**own, "vocab_size": VOCABULARY, **sizes})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(asked).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model


def tokens(rows: int, length: int, seed: int = 1, vocabulary: int = VOCABULARY) -> Tensor:
    """Random token ids, without the first three, which may be special.

    Args:
        rows: B.
        length: T.
        seed: same seed, same ids.
        vocabulary: V; ids are below it.

    Returns:
        [B, T], int64.

    >>> tokens(2, 5).shape
    torch.Size([2, 5])
    """
    return torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Logits of a prefill.

    Args:
        model: a causal language model; run as it is, so in evaluation mode if it has dropout.
        ids: token ids, int64 [B, T].
        mask: int64 [B, T], 0 for padding and 1 elsewhere; None where there is none.

    Returns:
        [B, T, V] in the model's dtype.
    """
    result: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return result


@torch.no_grad()
def in_pieces(model: PreTrainedModel, ids: Tensor, mask: Tensor, sizes: Iterable[int]) -> tuple[Tensor, DynamicCache]:
    """Logits of successive calls on one cache.

    Args:
        model: a causal language model.
        ids: token ids, int64 [B, T].
        mask: int64 [B, T], 0 for padding, which stands on the left.
        sizes: tokens of each call; T in all.

    Returns:
        Logits [B, T, V] in the model's dtype and the order of the tokens, and the cache after the last call.

    Raises:
        AssertionError: the sizes do not add up to T.
    """
    cache = DynamicCache(config=model.config)
    parts, seen = [], 0
    for size in sizes:
        span = slice(seen, seen + size)
        seen += size
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, span]
        call = {"attention_mask": mask[:, :seen], "position_ids": positions, **with_cache(model, cache)}
        parts.append(model(ids[:, span], **call).logits)
    assert seen == ids.shape[1], f"{seen} of {ids.shape[1]} tokens were asked for"
    return torch.cat(parts, 1), cache


def deviation(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference as a fraction of the largest expected value.

    Args:
        found: values [B, T, ...].
        expected: the same shape.
        mask: [B, T]: only places where it is not 0 are compared.

    Returns:
        0 for equal values.

    Raises:
        AssertionError: the shapes differ.
    """
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert found.shape == expected.shape, f"{tuple(found.shape)} is compared with {tuple(expected.shape)}"
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same weights, to the bit.

    Args:
        one: any module.
        other: the same.

    Returns:
        False also where their names differ.
    """
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def check_exact(result: CompileResult, source: PreTrainedModel, tolerance: float | None = None) -> None:
    """The result computes what its source does, padded rows too: what a rewrite with contract `exact` owes its user.

    Args:
        result: of a rewrite that loses nothing, or of a compilation at ``kv_budget=1``.
        source: the model that it came from.
        tolerance: of the largest logit; by dtype unless given, as `verify` has it.

    Raises:
        AssertionError: it does not; the message says by how much.
    """
    ids, mask = _padded(source)
    found = deviation(logits(result.model, ids, mask), logits(source, ids, mask), mask)
    allowed = TOLERANCE[source.dtype] if tolerance is None else tolerance
    assert found <= allowed, f"logits are off by {found:.1e} of the largest, and {allowed:.0e} is allowed"


def check_decode(result: CompileResult, tolerance: float | None = None) -> None:
    """Decoding from the cache gives what a prefill gives: one token at a time, several at once, and with padding.

    Args:
        result: of any rewrite.
        tolerance: of the largest logit; by dtype unless given. What rounds its cache needs more.

    Raises:
        AssertionError: it does not; the message says by how much.
    """
    ids, mask = _padded(result.model)
    # The prefill goes through a cache too: without one some families count positions from padding.
    pieces, prefill = (in_pieces(result.model, ids, mask, sizes)[0] for sizes in (PIECES, (ids.shape[1],)))
    found = deviation(pieces, prefill, mask)
    allowed = TOLERANCE[result.model.dtype] if tolerance is None else tolerance
    assert found <= allowed, f"decoding is off the prefill by {found:.1e}, and {allowed:.0e} is allowed"


def check_saved(result: CompileResult, directory: str | PathLike[str]) -> CompileResult:
    """Saved and loaded, the result has the same weights, logits and report, to the bit.

    Args:
        result: of any rewrite; one of a class inside a function cannot be loaded.
        directory: a missing or empty one.

    Returns:
        What was loaded.

    Raises:
        AssertionError: something differs; the message says what.
        UsageError: it cannot be saved or loaded at all.
    """
    result.save(directory)
    loaded = load(directory)
    assert same_weights(loaded.model, result.model), "other weights were loaded than were saved"
    ids, mask = _padded(result.model)
    found, expected = (logits(each.model.eval(), ids, mask)[mask.bool()] for each in (loaded, result))
    assert torch.equal(found, expected), "what was loaded computes something else"
    same = result.report.model_copy(update={"license": loaded.report.license})
    assert loaded.report == same, "another report was loaded than was saved"
    return loaded


@contextmanager
def refused(words: str, *models: nn.Module) -> Iterator[None]:
    """Inside, something must be refused: by a UsageError of one line with these words, and no weight may change.

    Args:
        words: what the message must hold.
        *models: that must stay as they are.

    Yields:
        Nothing.

    Raises:
        AssertionError: nothing was refused, in other words, in more than a line, or a weight was changed.
    """
    before = [{name: value.clone() for name, value in model.state_dict().items()} for model in models]
    said = None
    try:
        yield
    except UsageError as error:
        said = str(error)
    assert said is not None, f"nothing was refused, where {words!r} was to be said"
    assert words in said, f"{words!r} is not in: {said}"
    assert "\n" not in said, f"more than one line: {said}"
    for model, values in zip(models, before, strict=True):
        for name, value in model.state_dict().items():
            assert torch.equal(value, values[name]), f"{name} was changed before the refusal"


def _padded(model: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """Token ids and mask [2, T], the second row padded on the left."""
    words = int(model.config.get_text_config(decoder=True).vocab_size)
    ids = tokens(2, sum(PIECES), vocabulary=min(words, VOCABULARY)).to(model.device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return ids, mask

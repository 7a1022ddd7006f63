"""Tiny models of every family, compiled: shared by the tests of `attnedit.compile`."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterable
from typing import Any
from unittest import mock

import torch
from families import build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import attnedit
from attnedit.compiler.capture import capture
from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.sites import AttentionSite

torch.set_num_threads(1)
VOCABULARY = 64
CONTEXT = 128
MODULE: Any = importlib.import_module("attnedit._compile")

_SITES: dict[tuple[str, str], list[AttentionSite]] = {}


def _remembered(model: PreTrainedModel) -> list[AttentionSite]:
    """Sites do not depend on weights, and tracing is 19 parts in 20 of what compiling a tiny model costs."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in ("dtype", "torch_dtype")}
    key = (type(model).__name__, json.dumps(config, sort_keys=True, default=str))
    if key not in _SITES:
        _SITES[key] = capture(model)
    return _SITES[key]


def compile_tiny(model: PreTrainedModel, kv_budget: float, **options: Any) -> attnedit.CompileResult:
    """`attnedit.compile` on random tokens, each kind of model captured once."""
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(model, "mla", kv_budget=kv_budget, **{"calibration": tokens(4, 32), **options})


def tokens(rows: int, length: int, seed: int = 1) -> Tensor:
    """Token ids without the special ones."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


@functools.cache
def source(name: str) -> PreTrainedModel:
    """The model that `exact` and `half` compile, apart from what other tests share."""
    return build(name)


@functools.cache
def exact(name: str) -> attnedit.CompileResult:
    return compile_tiny(source(name), 1.0)


@functools.cache
def half(name: str) -> attnedit.CompileResult:
    return compile_tiny(source(name), 0.5)


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    result: Tensor = model(ids, attention_mask=mask, use_cache=False).logits
    return result


@torch.no_grad()
def in_pieces(model: PreTrainedModel, ids: Tensor, mask: Tensor, sizes: Iterable[int]) -> tuple[Tensor, DynamicCache]:
    """Logits of successive calls on one cache, and that cache."""
    cache = DynamicCache(config=model.config)
    parts, seen = [], 0
    for size in sizes:
        span = slice(seen, seen + size)
        seen += size
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, span]
        call = {"attention_mask": mask[:, :seen], "position_ids": positions, **with_cache(model, cache)}
        parts.append(model(ids[:, span], **call).logits)
    assert seen == ids.shape[1]
    return torch.cat(parts, 1), cache


def cached_values(cache: DynamicCache) -> dict[int, tuple[int, int]]:
    """Layer -> (values per token, tokens held), of every layer that holds keys and values."""
    held = {}
    for index, layer in enumerate(cache.layers):
        parts = [getattr(layer, name, None) for name in ("keys", "values")]
        parts = [part for part in parts if isinstance(part, Tensor) and part.dim() == 4]
        if parts:
            held[index] = (sum(part.shape[1] * part.shape[3] for part in parts), max(part.shape[2] for part in parts))
    return held


def deviation(found: Tensor, expected: Tensor, mask: Tensor | None = None) -> float:
    """Largest difference, as a fraction of the largest expected value, where `mask` is set."""
    if mask is not None:
        found, expected = found[mask.bool()], expected[mask.bool()]
    assert found.shape == expected.shape
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max())

"""Tiny models of every family, compiled: shared by the tests of `attnedit.compile`."""

from __future__ import annotations

import functools
import importlib
import json
from typing import Any
from unittest import mock

import torch
from families import build
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.testing import VOCABULARY, deviation, in_pieces, logits, same_weights, tokens

__all__ = ["VOCABULARY", "deviation", "in_pieces", "logits", "same_weights", "tokens"]

torch.set_num_threads(1)
CONTEXT = 128
MODULE: Any = importlib.import_module("attnedit._live")

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


def cached_values(cache: DynamicCache) -> dict[int, tuple[int, int]]:
    """Layer -> (values per token, tokens held), of every layer that holds keys and values."""
    held = {}
    for index, layer in enumerate(cache.layers):
        parts = [getattr(layer, name, None) for name in ("keys", "values")]
        parts = [part for part in parts if isinstance(part, Tensor) and part.dim() == 4]
        if parts:
            held[index] = (sum(part.shape[1] * part.shape[3] for part in parts), max(part.shape[2] for part in parts))
    return held

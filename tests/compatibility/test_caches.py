"""The cache of a model: found under any of its names, and refused where a rewritten layer does not know it."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from compiled import tokens
from families import build
from torch import fx, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

import attnedit
from attnedit.compiler.compatibility.caches import cache_parameter, given_cache, known_cache, with_cache
from attnedit.compiler.errors import UsageError

TARGETS = ["mla", "gateswa", "gateswa+mla"]


@functools.cache
def rewritten(target: str) -> PreTrainedModel:
    options: dict[str, Any] = {"window": 4} if target.startswith("gateswa") else {}
    return attnedit.compile(build("llama"), target, calibration=tokens(4, 32), verify=False, **options).model


def layer_of(model: PreTrainedModel) -> fx.GraphModule:
    """The first layer whose attention is a new one."""
    return next(module for module in model.modules() if isinstance(module, fx.GraphModule))


class Named(nn.Module):
    """Takes its cache under the name that transformers gave it from 5.24 on, and under an older one."""

    def forward(self, ids: torch.Tensor, cache: Any = None, past_key_values: Any = None) -> Any: ...


class Older(nn.Module):
    def forward(self, ids: torch.Tensor, past_key_values: Any = None, **kwargs: Any) -> Any: ...


class PassesOn(Older):
    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class Wraps(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Older()

    def forward(self, *args: Any, **kwargs: Any) -> Any: ...


class Attention(nn.Module):
    def forward(self, hidden: torch.Tensor, layer_past: Any = None) -> Any: ...


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Named, "cache"),
        (Older, "past_key_values"),
        (PassesOn, "past_key_values"),
        (Wraps, "past_key_values"),
        (Attention, "layer_past"),
    ],
)
def test_the_name_is_the_one_in_the_signature(module: type[nn.Module], name: str) -> None:
    assert cache_parameter(module()) == name
    cache = DynamicCache()
    assert with_cache(module(), cache) == {name: cache, "use_cache": True}


def test_a_compiled_model_takes_what_it_was_made_from_takes() -> None:
    model = build("llama")
    assert cache_parameter(torch.compile(model, backend="eager")) == cache_parameter(model)


def test_a_model_without_a_cache_is_refused() -> None:
    assert cache_parameter(nn.Linear(1, 1)) is None
    with pytest.raises(UsageError, match="Linear keeps no key-value cache"):
        with_cache(nn.Linear(1, 1), DynamicCache())


def test_what_a_model_returns_holds_the_cache_that_it_was_given() -> None:
    model = build("llama")
    cache = DynamicCache(config=model.config)
    assert given_cache(model(tokens(1, 4), **with_cache(model, cache))) is cache
    assert given_cache(model(tokens(1, 4), use_cache=False)) is None


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past", "anything"])
def test_a_cache_among_the_other_arguments_is_refused(name: str) -> None:
    cache = DynamicCache()
    assert known_cache(cache, {name: None, "use_cache": True}) is cache
    assert known_cache(cache, {name: cache}) is cache
    for taken in (cache, None):
        with pytest.raises(UsageError, match=f"a DynamicCache as {name}, which it does not take"):
            known_cache(taken, {name: DynamicCache()})


class Paged:
    """Has what layers call, and keeps something else than they think."""

    def update(self, keys: torch.Tensor, values: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return keys, values

    def get_seq_length(self, layer: int = 0) -> int:
        return 0


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_an_unknown_cache_is_refused_under_every_name(target: str) -> None:
    model = rewritten(target)
    layer = layer_of(model)
    hidden = torch.zeros(1, 3, model.config.hidden_size)
    places = model.get_submodule("model.rotary_emb")(hidden, torch.arange(3)[None])
    layer(hidden, places, None, **{str(cache_parameter(layer)): DynamicCache()})  # one that it knows
    for unknown in (Paged(), EncoderDecoderCache(DynamicCache(), DynamicCache()), ((hidden, hidden),)):
        for name in ("cache", "past_key_values"):
            with pytest.raises(UsageError, match="a rewritten attention layer was given a"):
                layer(hidden, places, None, **{name: unknown})


@torch.no_grad()
@pytest.mark.parametrize("target", TARGETS)
def test_two_caches_are_refused_before_a_token(target: str) -> None:
    model = rewritten(target)
    layer = layer_of(model)
    name = str(cache_parameter(layer))
    (other,) = {"cache", "past_key_values"} - {name}
    hidden = torch.zeros(1, 3, model.config.hidden_size)
    places = model.get_submodule("model.rotary_emb")(hidden, torch.arange(3)[None])
    with pytest.raises(UsageError, match=f"a DynamicCache as {other}"):
        layer(hidden, places, None, **{name: DynamicCache(), other: DynamicCache()})

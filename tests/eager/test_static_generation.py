"""Generation over static caches: the same tokens as over dynamic ones, in one compiled graph."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from gateswa_models import WINDOW, batch
from mixed_models import TARGETS, arguments, rewritten
from torch._dynamo import lookup_backend
from transformers import StaticCache
from transformers.generation import CompileConfig

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.targets.attention.gateswa.ring import RingLayer
from attnedit.targets.runtime.eager.cache import bind_cache

graphs: list[torch.fx.GraphModule] = []


def counting(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
    """A backend that remembers what it compiled; a plain function, as `generate` copies its configuration."""
    graphs.append(graph)
    return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_same_tokens(family: str, target: str, padded: bool) -> None:
    if family == "gpt2" and "mla" in target:
        target = "gateswa"  # it has no rotary embedding for the slots
    model, call = rewritten(family, target), arguments(padded)
    expected = model.generate(**call)
    assert torch.equal(model.generate(**call, cache_implementation="static", disable_compile=True), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_steps_share_one_graph(target: str) -> None:
    model, call = rewritten("qwen3", target), arguments(padded=True)
    expected = model.generate(**call)
    graphs.clear()
    config = CompileConfig(fullgraph=True, backend=counting, mode=None)
    config._compile_all_devices = True
    found = model.generate(**call, cache_implementation="static", compile_config=config)
    assert torch.equal(found, expected)
    assert len(graphs) == 1
    # A second call, with a cache of its own, compiles nothing.
    assert torch.equal(model.generate(**call, cache_implementation="static", compile_config=config), expected)
    assert len(graphs) == 1


def test_beams_take_their_rows_along() -> None:
    model, call = rewritten("llama", "gateswa+mla"), {**arguments(padded=True), "num_beams": 3}
    expected = model.generate(**call)
    assert torch.equal(model.generate(**call, cache_implementation="static", disable_compile=True), expected)


def test_a_ring_is_as_small_as_the_window() -> None:
    model = rewritten("llama", "gateswa")
    cache = bind_cache(model, StaticCache(config=model.config, max_cache_len=40))
    inputs = batch()
    first = model(**inputs, **with_cache(model, cache)).logits
    for layer in cache.layers:
        assert isinstance(layer, RingLayer)
        assert layer.keys.shape[2] == layer.values.shape[2] == WINDOW + 2
    places = [layer.keys.data_ptr() for layer in cache.layers]
    cache.reset()
    assert torch.equal(model(**inputs, **with_cache(model, cache)).logits, first)
    assert places == [layer.keys.data_ptr() for layer in cache.layers]


@pytest.mark.parametrize("sizes", [(13,), (2, 2, 9), (6, 1, 6), (1,) * 13])
def test_pieces_of_any_size(sizes: tuple[int, ...]) -> None:
    model, inputs = rewritten("llama", "gateswa+mla"), batch()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    position = (mask.cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=position, use_cache=False).logits
    cache, parts, stop = StaticCache(config=model.config, max_cache_len=20), [], 0
    for size in sizes:
        start, stop = stop, stop + size
        span = slice(start, stop)
        call = {"attention_mask": mask[:, :stop], "position_ids": position[:, span], **with_cache(model, cache)}
        parts.append(model(ids[:, span], **call).logits)
    torch.testing.assert_close(torch.cat(parts, 1)[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)

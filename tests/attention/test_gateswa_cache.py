"""The bounded cache layer under a GateSWA module: beams, batches, taking back, memory."""

from itertools import pairwise
from unittest import mock

import pytest
import torch
from gateswa_modules import (
    FULL,
    assert_equal_where_real,
    causal,
    in_pieces,
    inputs,
    make,
    reference,
    source_sinks,
    span,
)
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, StaticCache

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention import GateSWA, gateswa_values
from attnedit.targets.attention.gateswa.ring import RingLayer


@pytest.mark.parametrize("changes", [{}, FULL, {"sliding_window": 20}])
def test_beam_reordering(changes: dict[str, object]) -> None:
    """Rows change places between steps; each goes on as if it had always been where it is."""
    module = make(**changes)
    padding = [0, 3, 1]
    arguments = inputs(module, 3, 12)
    order = torch.tensor([2, 2, 0])
    for method in ("reorder_cache", "batch_select_indices"):
        cache = DynamicCache()
        mask = causal(12, padding)
        module(*span(arguments, 0, 9), mask[:, :, :9, :9], cache)
        getattr(cache, method)(order)
        mixed = tuple(
            torch.cat(
                (x[order][:, :, :9] if x.dim() == 4 else x[order][:, :9], x[:, :, 9:] if x.dim() == 4 else x[:, 9:]),
                2 if x.dim() == 4 else 1,
            )
            for x in arguments
        )
        moved = [padding[i] for i in order]
        mask = causal(12, moved)
        out = torch.cat(
            [module(*span(mixed, t, t + 1), mask[:, :, t : t + 1, : t + 1], cache) for t in range(9, 12)], 1
        )
        torch.testing.assert_close(out, reference(module, mixed, moved)[:, 9:], rtol=1e-9, atol=1e-9)


def test_batch_repeat_interleave() -> None:
    module = make(**FULL)
    arguments = inputs(module, 2, 9)
    cache, mask = DynamicCache(), causal(9, [2, 0])
    module(*span(arguments, 0, 8), mask[:, :, :8, :8], cache)
    cache.batch_repeat_interleave(3)
    arguments = tuple(x.repeat_interleave(3, 0) for x in arguments)
    out = module(*span(arguments, 8, 9), mask[:, :, 8:].repeat_interleave(3, 0), cache)
    expected = reference(module, arguments, [2, 2, 2, 0, 0, 0])[:, 8:]
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    window=st.integers(1, 6),
    sink_tokens=st.integers(0, 3),
    first=st.integers(1, 9),
    drafts=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 5)), min_size=1, max_size=5),
)
@example(window=2, sink_tokens=3, first=1, drafts=[(4, 4), (5, 0), (2, 1)])  # kept sinks are taken back too
def test_crop_with_recording_is_exact(window: int, sink_tokens: int, first: int, drafts: list[tuple[int, int]]) -> None:
    """Assisted decoding: tokens are tried, some taken back, others put in their place."""
    module = make(sliding_window=window, **{**FULL, "sink_tokens": sink_tokens})
    cache, history, padding = DynamicCache(), inputs(module, 2, first), [0, 1 if first > 1 else 0]
    module(*history, causal(first, padding), cache)
    cache.activate_past_recording()
    for seed, (size, undone) in enumerate(drafts):
        draft = inputs(module, 2, size, seed=10 + seed)
        history = tuple(torch.cat(pair, 2 if pair[0].dim() == 4 else 1) for pair in zip(history, draft, strict=True))
        length = history[0].shape[2]
        mask = causal(length, padding)
        out = module(*draft, mask[:, :, -size:], cache)
        expected = reference(module, history, padding)[:, -size:]
        torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
        undone = min(undone, size)
        cache.crop(-undone)
        history = span(history, 0, length - undone)
        assert cache.get_seq_length() == length - undone
        assert cache.layers[0].keys.shape[2] == min(length - undone, window - 1)


def test_crop_without_recording() -> None:
    """Exact while nothing has left the window, an error afterwards."""
    module = make(sliding_window=5, sink_tokens=1)
    arguments = inputs(module, 1, 9)
    expected = reference(module, arguments, [0])
    cache = DynamicCache()
    module(*span(arguments, 0, 4), None, cache)
    cache.crop(-3)
    out = module(*span(arguments, 1, 9), None, cache)
    torch.testing.assert_close(out, expected[:, 1:], rtol=1e-9, atol=1e-9)
    cache.crop(0)
    with pytest.raises(UsageError, match="activate_past_recording"):
        cache.crop(-1)
    with pytest.raises(UsageError, match="minus the number"):
        cache.crop(3)
    cache.activate_past_recording()
    module(*span(arguments, 0, 2), None, cache)
    with pytest.raises(UsageError, match="activate_past_recording"):
        cache.crop(-3)


def test_reset_starts_again() -> None:
    module = make(**FULL)
    arguments = inputs(module, 2, 9)
    cache = DynamicCache()
    first = in_pieces(module, arguments, [1, 0], "bool", [5], cache)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert torch.equal(in_pieces(module, arguments, [1, 0], "bool", [5], cache), first)


@pytest.mark.parametrize("pieces", [[], [1000], list(range(1000, 1003))])
def test_memory_kept_is_bounded(pieces: list[int]) -> None:
    """Counted in the storages that stay alive, not in the shapes of views on them."""
    module = make(torch.float32, sliding_window=16, sink_tokens=4)
    cache = DynamicCache()
    in_pieces_float(module, 2000, pieces, cache)
    layer = cache.layers[0]
    tensors = (layer.keys, layer.values, layer.sinks.keys, layer.sinks.values)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in tensors}
    assert sum(storages.values()) <= gateswa_values(module.config) * layer.max_tokens
    assert layer.max_tokens == module.config.cached_tokens == layer.get_max_length()


def in_pieces_float(module: GateSWA, length: int, pieces: list[int], cache: object) -> None:
    arguments = tuple(x.float() for x in inputs(module, 1, length))
    for a, b in pairwise([0, *pieces, length]):
        module(*span(arguments, a, b), None, cache)


def test_static_cache_is_masked() -> None:
    """It keeps everything, so nothing is gained, but nothing is wrong either."""
    module = make(sinks=True, **FULL)
    arguments = inputs(module, 2, 11)
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1), max_cache_len=14)
    mask = torch.nn.functional.pad(causal(11, [2, 0]), (0, 3))
    edges = [0, 6, 7, 9, 10, 11]
    out = [module(*span(arguments, a, b), mask[:, :, a:b], cache, source_sinks(module)) for a, b in pairwise(edges)]
    assert_equal_where_real(torch.cat(out, 1), reference(module, arguments, [2, 0]), [2, 0])


def test_a_cache_with_other_tokens_in_it_is_masked() -> None:
    module = make(**FULL)
    arguments = inputs(module, 2, 11)
    cache = DynamicCache()
    cache.update(arguments[1][:, :, :5], arguments[2][:, :, :5], 0)
    out = module(*span(arguments, 5, 11), causal(11, [2, 0])[:, :, 5:], cache)
    torch.testing.assert_close(out, reference(module, arguments, [2, 0])[:, 5:], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("sink_tokens", [0, 2, 9])
@pytest.mark.parametrize("prompt", [0, 1, 4, 11])
def test_steps_of_a_ring_without_padding(window: int, sink_tokens: int, prompt: int) -> None:
    """Token after token into the ring of a static cache: each is one short step, from an empty cache on too."""
    module = make(sliding_window=window, **{**FULL, "sink_tokens": sink_tokens})
    arguments = inputs(module, 2, 30)
    cache = StaticCache(config=LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1), max_cache_len=30)
    with torch.no_grad(), mock.patch.object(RingLayer, "step", autospec=True, side_effect=RingLayer.step) as steps:
        out = in_pieces(module, arguments, [0, 0], "none", list(range(prompt, 30)), cache)
    assert steps.call_count == 30 - prompt + (prompt == 1)
    assert_equal_where_real(out, reference(module, arguments, [0, 0]), [0, 0])
    assert int(cache.layers[0].get_seq_length()) == 30

"""The GateSWA module and its cache against an independent float64 reference made of plain loops."""

import copy
import math
import pickle
from itertools import pairwise
from unittest import mock

import pytest
import torch
from gateswa_modules import (
    FULL,
    assert_equal_where_real,
    cases,
    causal,
    given_mask,
    in_pieces,
    inputs,
    make,
    reference,
    span,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention import GateSWA, GateSWAConfig, attention_cost, gateswa_cost
from attnedit.targets.attention.gateswa.cache import GateSWALayer
from attnedit.targets.attention.gateswa.documents import EMPTY


@settings(max_examples=150, deadline=None)
@given(
    case=cases(),
    cuts=st.lists(st.integers(1, 11), max_size=6),
    length=st.integers(1, 12),
    padding=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    form=st.sampled_from(("bool", "lowest", "inf", "padding")),
)
def test_equals_the_reference(
    case: dict[str, object], cuts: list[int], length: int, padding: list[int], form: str
) -> None:
    padding = [min(pad, length - 1) for pad in padding]
    module = make(**case)
    arguments = inputs(module, len(padding), length)
    expected = reference(module, arguments, padding)
    for cache in (DynamicCache(), None):
        out = in_pieces(module, arguments, padding, form, cuts if cache else [], cache)
        assert_equal_where_real(out, expected, padding)


@pytest.mark.parametrize("window", [1, 3, 5])
@pytest.mark.parametrize("past", ["0", "1", "W-1", "W", "W+1", "2W+3"])
@pytest.mark.parametrize("new", [1, 2, 7])
@pytest.mark.parametrize("sink_tokens", [0, 2])
@pytest.mark.parametrize("form", ["none", "padding", "bool"])
def test_every_past_length(window: int, past: str, new: int, sink_tokens: int, form: str) -> None:
    before = {"0": 0, "1": 1, "W-1": window - 1, "W": window, "W+1": window + 1, "2W+3": 2 * window + 3}[past]
    module = make(sliding_window=window, **{**FULL, "sink_tokens": sink_tokens})
    padding = [0, 0] if form == "none" else [0, min(3, before + new - 1)]
    arguments = inputs(module, 2, before + new)
    cache = DynamicCache()
    out = in_pieces(module, arguments, padding, form, [before] if before else [], cache)
    assert_equal_where_real(out, reference(module, arguments, padding), padding)
    layer = cache.layers[0]
    assert isinstance(layer, GateSWALayer)
    assert layer.keys.shape[2] == min(before + new, window - 1)
    assert layer.get_seq_length() == before + new


def test_padding_decides_which_tokens_are_kept() -> None:
    module = make(sliding_window=2, sink_tokens=3)
    cache = DynamicCache()
    in_pieces(module, inputs(module, 3, 6), [0, 2, 4], "bool", [1, 3], cache)
    assert cache.layers[0].sinks.positions.tolist() == [[0, 1, 2], [2, 3, 4], [4, 5, EMPTY]]


@pytest.mark.parametrize("window", [3, 70, 600])
@pytest.mark.parametrize("sink_tokens", [0, 4])
def test_blocks_change_nothing(window: int, sink_tokens: int) -> None:
    module = make(sliding_window=window, **{**FULL, "sink_tokens": sink_tokens})
    arguments = inputs(module, 2, 1300)
    mask = causal(1300, [0, 90])
    for given_to_both in (None, mask):
        blocked = module(*arguments, given_to_both)
        module.blocks = False
        at_once = module(*arguments, given_to_both)
        module.blocks = True
        torch.testing.assert_close(blocked, at_once)


@pytest.mark.parametrize("held", [1 << 28, 1 << 14])
def test_gradients_of_blocks_are_those_of_all_at_once(held: int) -> None:
    module = make(sliding_window=70, **{**FULL, "sink_tokens": 4})
    arguments = tuple(x.requires_grad_() for x in inputs(module, 2, 700))
    found = []
    with mock.patch("attnedit.targets.attention.gateswa.blocks.HELD_BYTES", held):
        for blocks in (True, False):
            module.blocks = blocks
            out = module(*arguments)
            wanted = [*arguments, *module.parameters()]
            found.append([out.detach(), *torch.autograd.grad(out.sin().sum(), wanted)])
    for fused, plain in zip(*found, strict=True):
        torch.testing.assert_close(fused, plain)


def test_memory_of_a_prefill_is_linear() -> None:
    module = make(torch.float32, sliding_window=16, sink_tokens=2)
    peaks = []
    for length in (1024, 4096):
        arguments = tuple(x.float() for x in inputs(module, 1, length))
        with torch.no_grad(), torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
            module(*arguments)
        sizes = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
        peaks.append(max(sizes))
    assert peaks[1] <= 5 * peaks[0]


def test_masks_of_a_source_with_a_window() -> None:
    """They hide the kept sinks, and may be no wider than that window."""
    module = make(sliding_window=3, source_window=5, sink_tokens=2)
    arguments = inputs(module, 2, 14)
    expected = reference(module, arguments, [0, 3])
    mask = causal(14, [0, 3]) & torch.ones(14, 14).triu(-4).bool()
    for narrow in (False, True):
        cache, out = DynamicCache(), []
        for a, b in pairwise([0, 8, 9, 11, 14]):
            low = max(0, a - 4) if narrow else 0
            out.append(module(*span(arguments, a, b), mask[:, :, a:b, low:b], cache))
        assert_equal_where_real(torch.cat(out, 1), expected, [0, 3])
    assert_equal_where_real(module(*arguments, mask), expected, [0, 3])


@pytest.mark.parametrize("form", ["bool", "lowest"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_documents_have_sinks_of_their_own(form: str, compiled: bool) -> None:
    """What the mask hides stays hidden, and past the window each document sees its own first tokens."""
    module = make(**{**FULL, "sliding_window": 3})
    arguments = inputs(module, 2, 70)
    cuts = [[0, 7, 30, 31, 70], [0, 40, 70]]
    mask = causal(70, [0, 0])
    for row, edges in enumerate(cuts):
        for edge in edges[1:-1]:
            mask[row, :, edge:, :edge] = False
    parts = []
    for row, edges in enumerate(cuts):
        alone = tuple(x[row : row + 1] for x in arguments)
        parts.append(torch.cat([reference(module, span(alone, a, b), [0]) for a, b in pairwise(edges)], 1))
    given = given_mask(form, mask, 0, 70)
    if compiled:
        with mock.patch.object(torch.compiler, "is_compiling", return_value=True):
            found = module(*arguments, given)
    else:
        found = module(*arguments, given)
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_packed_documents_under_a_window_of_the_source(compiled: bool) -> None:
    """A mask of a window shows nothing of a document's start."""
    module = make(sliding_window=3, sink_tokens=2, source_window=5)
    arguments = inputs(module, 1, 24)
    mask = causal(24, [0]) & torch.ones(24, 24).triu(-4).bool()
    mask[:, :, 9:, :9] = False
    expected = torch.cat([reference(module, span(arguments, a, b), [0]) for a, b in ((0, 9), (9, 24))], 1)
    with mock.patch.object(torch.compiler, "is_compiling", return_value=compiled):
        torch.testing.assert_close(module(*arguments, mask), expected, rtol=1e-9, atol=1e-9)


def test_no_weight_no_change() -> None:
    """Fresh weights and a gate of one half: half of plain attention."""
    for gate in ("head", "element"):
        module = GateSWA(make(gate=gate, gate_bias=True, sliding_window=20).config, dtype=torch.float64)
        arguments = inputs(module, 2, 9)
        query, key, value, _ = arguments
        plain = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=0.4, enable_gqa=True
        )
        torch.testing.assert_close(2 * module(*arguments), plain.transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype) -> None:
    module = make(dtype, head_dim=16, v_head_dim=12, **FULL)
    exact = copy.deepcopy(module).double()
    arguments = tuple(x.to(dtype) for x in inputs(module, 2, 40))
    expected = exact(*(x.double() for x in arguments))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    cache = DynamicCache()
    decoded = torch.cat([module(*span(arguments, t, t + 1), None, cache) for t in range(40)], 1)
    for out in (module(*arguments), decoded):
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("gate", ["head", "element"])
def test_gradients_flow_to_weights_and_inputs(gate: str) -> None:
    module = make(**{**FULL, "gate": gate})
    arguments = tuple(x.requires_grad_() for x in inputs(module, 1, 7))
    assert torch.autograd.gradcheck(module, arguments)
    mask = torch.zeros(1, 1, 7, 7, dtype=torch.float64).masked_fill(~causal(7, [3]), -math.inf)
    module(*arguments, mask)[:, 3:].pow(2).sum().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in module.parameters())


def test_export_with_free_lengths() -> None:
    module = make(torch.float32, **FULL)
    arguments = tuple(x.float() for x in inputs(module, 2, 9))
    mask = torch.zeros(2, 1, 9, 9).masked_fill(~causal(9, [2, 0]), torch.finfo(torch.float32).min)
    auto = torch.export.Dim.AUTO
    dims = ({0: auto, 2: auto}, {0: auto, 2: auto}, {0: auto, 2: auto}, {0: auto, 1: auto}, {0: auto, 2: auto, 3: auto})
    with torch.no_grad():
        program = torch.export.export(module, (*arguments, mask), dynamic_shapes=dims, strict=False)
        other = tuple(x.float() for x in inputs(module, 3, 13))
        mask = torch.zeros(3, 1, 13, 13).masked_fill(~causal(13, [2, 0, 5]), torch.finfo(torch.float32).min)
        torch.testing.assert_close(program.module()(*other, mask), module(*other, mask))


def test_copies_and_state() -> None:
    module = make(**FULL)
    arguments = inputs(module, 1, 6)
    assert set(module.state_dict()) == {"g_proj.weight", "g_proj.bias", "sink_logit", "sink_value"}
    assert not make().state_dict()
    cache = DynamicCache()
    module(*span(arguments, 0, 5), None, cache)
    for copied in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        out = copied(module)(*span(arguments, 5, 6), None, copied(cache))
        assert torch.equal(out, module(*span(arguments, 5, 6), None, copy.deepcopy(cache)))


def test_config_round_trip_and_refusals() -> None:
    config = make(**FULL).config
    assert GateSWAConfig.from_dict(config.to_dict()) == config
    for changes, message in (
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"gate": "row"}, "gate must be one of"),
        ({"gate": "none"}, "no gate_bias"),
        ({"sink_logit": False}, "sink_value needs sink_logit"),
        ({"sink_tokens": -1}, "must not be negative"),
        ({"source_window": 2}, "exceeds the source's own window"),
        ({"colour": 1}, "no field colour"),
    ):
        with pytest.raises(UsageError, match=message):
            GateSWAConfig.from_dict({**config.to_dict(), **changes})
    values = config.to_dict()
    del values["scale"]
    with pytest.raises(UsageError, match="scale"):
        GateSWAConfig.from_dict(values)


def test_unusable_arguments_are_one_line_errors() -> None:
    module = make(gate="head", sink_tokens=1)
    query, key, value, hidden = inputs(module, 1, 3)
    with pytest.raises(UsageError, match="gate reads hidden states"):
        module(query, key, value)
    with pytest.raises(UsageError, match="attention mask"):
        module(query, key, value, hidden, torch.ones(1, 3, 3))
    with pytest.raises(UsageError, match="2 columns for 3 keys"):
        module(query, key, value, hidden, torch.ones(1, 2))
    with pytest.raises(UsageError, match="sinks were given"):
        module(query, key, value, hidden, None, None, torch.zeros(4))


def test_cost_counts_what_the_module_has() -> None:
    module = make(sinks=True, **FULL)
    config = module.config
    cost = gateswa_cost(config)
    around = 6 * (4 * (5 + 3) + 2 * (5 + 3))
    assert cost.parameters == sum(p.numel() for p in module.parameters()) + around + 4  # the source's own sinks
    assert cost.values_per_token == 2 * (5 + 3)
    assert cost.at(3)["cached_values"] == 16 * 3
    assert cost.at(1000, batch=2, dtype_bytes=4)["kv_bytes"] == 16 * (4 + 2) * 2 * 4
    others = 12 + 4 + 4 + 6
    assert cost.at(1000)["decode_flops"] == 2 * (cost.parameters - others + 4 * (5 + 3) * 6)
    plain = gateswa_cost(make().config)
    assert plain == attention_cost(6, 4, 2, 5, 3, window=4)

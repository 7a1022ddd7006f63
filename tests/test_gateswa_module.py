"""The GateSWA module and its cache against an independent float64 reference made of plain loops."""

import copy
import math
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention import GateSWA, GateSWAConfig, attention_cost, gateswa_cost, gateswa_values
from attnedit.targets.attention.gateswa_cache import EMPTY, GateSWALayer

torch.set_num_threads(1)
FULL = {"gate": "element", "gate_bias": True, "sink_logit": True, "sink_value": True, "sink_tokens": 2}


def make(dtype: torch.dtype = torch.float64, **changes: object) -> GateSWA:
    values = {
        "layer_idx": 0,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 5,
        "v_head_dim": 3,
        "hidden_size": 6,
        "sliding_window": 4,
        "scale": 0.4,
        **changes,
    }
    torch.manual_seed(0)
    module = GateSWA(GateSWAConfig(**values), dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module.to(dtype)


def inputs(module: GateSWA, batch: int, length: int, seed: int = 1) -> tuple[Tensor, ...]:
    """Query [B, H, T, d], key [B, G, T, d], value [B, G, T, dv], hidden [B, T, D]."""
    generator = torch.Generator().manual_seed(seed)
    c = module.config
    shapes = (
        (batch, c.num_attention_heads, length, c.head_dim),
        (batch, c.num_key_value_heads, length, c.head_dim),
        (batch, c.num_key_value_heads, length, c.v_head_dim),
        (batch, length, c.hidden_size),
    )
    return tuple(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)


def source_sinks(module: GateSWA) -> Tensor | None:
    heads = module.config.num_attention_heads
    return torch.linspace(-1, 1, heads, dtype=torch.float64) if module.config.sinks else None


def real_tokens(length: int, padding: list[int]) -> Tensor:
    """Bool [B, L], False for tokens at the left."""
    return torch.stack([torch.arange(length) >= pad for pad in padding])


def causal(length: int, padding: list[int]) -> Tensor:
    """Bool [B, 1, L, L] as transformers makes it for full attention; it knows of no window."""
    return (torch.ones(length, length).tril().bool() & real_tokens(length, padding)[:, None])[:, None]


@torch.no_grad()
def reference(module: GateSWA, arguments: tuple[Tensor, ...], padding: list[int]) -> Tensor:  # [B, L, H, dv]
    """One query, head and key at a time, from the definition."""
    query, key, value, hidden = arguments
    config = module.config
    batch, heads, length, _ = query.shape
    per_group = heads // config.num_key_value_heads
    out = torch.zeros(batch, length, heads, config.v_head_dim, dtype=query.dtype)
    for b in range(batch):
        kept = range(padding[b], min(length, padding[b] + config.sink_tokens))
        for t in range(padding[b], length):
            seen = [s for s in range(padding[b], t + 1) if t - s < config.sliding_window or s in kept]
            for h in range(heads):
                g = h // per_group
                total, mean = 0.0, torch.zeros(config.v_head_dim, dtype=query.dtype)
                for s in seen:
                    logit = config.scale * float(query[b, h, t] @ key[b, g, s])
                    if config.softcap is not None:
                        logit = config.softcap * math.tanh(logit / config.softcap)
                    total += math.exp(logit)
                    mean += math.exp(logit) * value[b, g, s]
                if config.sinks:
                    total += math.exp(source_sinks(module)[h])
                if config.sink_logit:
                    total += math.exp(module.sink_logit[h])
                    if config.sink_value:
                        mean += math.exp(module.sink_logit[h]) * module.sink_value[g]
                out[b, t, h] = mean / total
            if config.gate != "none":
                gate = 1 / (1 + torch.exp(-module.g_proj(hidden[b, t])))
                out[b, t] *= gate.view(heads, -1)
    return out


def span(arguments: tuple[Tensor, ...], start: int, stop: int) -> tuple[Tensor, ...]:
    query, key, value, hidden = arguments
    return query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], hidden[:, start:stop]


def given_mask(form: str, mask: Tensor, start: int, stop: int) -> Tensor | None:
    """The mask of queries start..stop, in one of the forms that transformers hands down."""
    if form == "none":
        return None
    if form == "padding":
        return mask[:, 0, -1, :stop]
    mask = mask[:, :, start:stop, :stop]
    if form == "bool":
        return mask
    value = {"lowest": torch.finfo(torch.float64).min, "inf": -math.inf}[form]
    return torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, value)


def in_pieces(
    module: GateSWA, arguments: tuple[Tensor, ...], padding: list[int], form: str, cuts: list[int], cache: object
) -> Tensor:
    length = arguments[0].shape[2]
    mask = causal(length, padding)
    edges = sorted({0, length, *(cut for cut in cuts if cut < length)})
    return torch.cat(
        [
            module(*span(arguments, a, b), given_mask(form, mask, a, b), cache, source_sinks(module))
            for a, b in pairwise(edges)
        ],
        dim=1,
    )


def assert_equal_where_real(out: Tensor, expected: Tensor, padding: list[int]) -> None:
    assert out.isfinite().all()
    real = real_tokens(out.shape[1], padding)
    torch.testing.assert_close(out[real], expected[real], rtol=1e-9, atol=1e-9)


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    groups = draw(st.integers(1, 3))
    gate = draw(st.sampled_from(("head", "element", "none")))
    sink_logit = draw(st.booleans())
    return {
        "num_attention_heads": groups * draw(st.integers(1, 2)),
        "num_key_value_heads": groups,
        "head_dim": draw(st.integers(1, 5)),
        "v_head_dim": draw(st.integers(1, 4)),
        "sliding_window": draw(st.integers(1, 6)),
        "gate": gate,
        "gate_bias": gate != "none" and draw(st.booleans()),
        "sink_logit": sink_logit,
        "sink_value": sink_logit and draw(st.booleans()),
        "sink_tokens": draw(st.integers(0, 3)),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "sinks": draw(st.booleans()),
    }


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


def test_memory_of_a_prefill_is_linear() -> None:
    module = make(torch.float32, sliding_window=16, sink_tokens=2)
    peaks = []
    for length in (1024, 4096):
        arguments = tuple(x.float() for x in inputs(module, 1, length))
        with torch.no_grad(), torch.profiler.profile(profile_memory=True) as profile:
            module(*arguments)
        sizes = [event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0]
        peaks.append(max(sizes))
    assert peaks[1] <= 5 * peaks[0]


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


def test_packed_sequences_do_not_see_each_other() -> None:
    """What the mask hides stays hidden, the first sequence's sinks included."""
    module = make(sliding_window=3, sink_tokens=2)
    arguments = inputs(module, 1, 12)
    mask = causal(12, [0])
    mask[:, :, 7:, :7] = False
    expected = torch.cat((reference(module, span(arguments, 0, 7), [0]), module(*span(arguments, 7, 10))), 1)
    torch.testing.assert_close(module(*arguments, mask)[:, :10], expected, rtol=1e-9, atol=1e-9)


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

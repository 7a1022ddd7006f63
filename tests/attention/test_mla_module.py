"""The MLA module against an independent float64 reference made of plain loops."""

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention import MLA, MLAConfig, attention_cost, choose_path, mla_cost, mla_values

torch.set_num_threads(1)
COLUMNS = 5


def make(dtype: torch.dtype = torch.float64, **changes: object) -> MLA:
    values = {
        "layer_idx": 0,
        "num_attention_heads": 3,
        "head_dim": 6,
        "v_head_dim": 4,
        "kv_lora_rank": 5,
        "rope_columns": (0, 2, 3),
        "qk_nope_head_dim": 6,
        "input_size": 8,
        "scale": 0.4,
        **changes,
    }
    torch.manual_seed(0)
    module = MLA(MLAConfig(**values), dtype=torch.float64)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.7)
    return module.to(dtype)


def inputs(module: MLA, batch: int, length: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    config = module.config
    dtype = module.kv_b_proj.weight.dtype
    shapes = ((batch, config.num_attention_heads, length, config.head_dim), (batch, length, config.input_size))
    query, kv_input = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    angle = torch.rand(batch, length, COLUMNS, generator=generator, dtype=torch.float64) * 6
    return query.to(dtype), kv_input.to(dtype), angle.cos().to(dtype), angle.sin().to(dtype)


def causal(length: int, padding: list[int], window: int | None = None) -> Tensor:
    """Bool [B, 1, L, L]; ``padding`` tokens at the left of each sequence are masked."""
    mask = torch.ones(length, length).tril().bool()
    if window is not None:
        mask &= torch.ones(length, length).triu(1 - window).bool()
    rows = [mask & (torch.arange(length) >= pad)[None, :] for pad in padding]
    return torch.stack(rows)[:, None]


@torch.no_grad()
def reference(
    module: MLA, query: Tensor, kv_input: Tensor, cos: Tensor, sin: Tensor, mask: Tensor
) -> Tensor:  # [B, L, H, dv]
    """One query, head and key at a time."""
    config = module.config
    heads, rank, slots = config.num_attention_heads, config.kv_lora_rank, config.num_slots
    nope, size = config.qk_nope_head_dim, config.v_head_dim
    batch, _, length, _ = query.shape
    up = module.kv_b_proj.weight.reshape(heads, nope + size, rank)
    out = torch.zeros(batch, length, heads, size, dtype=query.dtype)

    def turn(real: Tensor, imaginary: Tensor, b: int, t: int, j: int) -> complex:
        column = config.rope_columns[j]
        return complex(real, imaginary) * complex(cos[b, t, column], sin[b, t, column])

    for b in range(batch):
        cached = [module.kv_a_proj_with_mqa(kv_input[b, t]) for t in range(length)]
        for h in range(heads):
            for t in range(length):
                logits = {}
                for n in range(length):
                    if not mask[b, 0, t, n]:
                        continue
                    logit = float(query[b, h, t] @ up[h, :nope] @ cached[n][:rank]) if nope else 0.0
                    for j in range(slots):
                        q_real = module.q_rope_proj[h, j] @ query[b, h, t]
                        q_imaginary = module.q_rope_proj[h, slots + j] @ query[b, h, t]
                        key = turn(cached[n][rank + j], cached[n][rank + slots + j], b, n, j)
                        logit += (turn(q_real, q_imaginary, b, t, j) * key.conjugate()).real
                    logit *= config.scale
                    if config.softcap is not None:
                        logit = config.softcap * math.tanh(logit / config.softcap)
                    logits[n] = logit
                total = sum(math.exp(x) for x in logits.values())
                if config.sinks:
                    total += math.exp(module.sinks[h])
                for n, logit in logits.items():
                    out[b, t, h] += math.exp(logit) / total * (up[h, nope:] @ cached[n][:rank])
    return out


@st.composite
def cases(draw: st.DrawFn) -> dict[str, object]:
    head_dim = draw(st.integers(1, 7))
    slots = draw(st.integers(0, 4))
    nope = draw(st.sampled_from((0, head_dim))) if slots else head_dim
    return {
        "num_attention_heads": draw(st.integers(1, 4)),
        "head_dim": head_dim,
        "v_head_dim": draw(st.integers(1, 6)),
        "kv_lora_rank": draw(st.integers(1, 6)),
        "rope_columns": tuple(draw(st.lists(st.integers(0, COLUMNS - 1), min_size=slots, max_size=slots))),
        "qk_nope_head_dim": nope,
        "input_size": draw(st.integers(1, 7)),
        "kv_bias": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "softcap": draw(st.sampled_from((None, 2.0))),
        "window": draw(st.sampled_from((None, 1, 2))),
    }


@settings(max_examples=60, deadline=None)
@given(
    case=cases(),
    past=st.sampled_from((0, 1, 4)),
    new=st.integers(1, 3),
    padding=st.lists(st.integers(0, 2), min_size=1, max_size=3),
    path=st.sampled_from(("auto", "absorbed", "expanded")),
    form=st.sampled_from(("bool", "float", "padding")),
)
def test_equals_the_reference(
    case: dict[str, object], past: int, new: int, padding: list[int], path: str, form: str
) -> None:
    module = make(**case)
    module.path = path
    batch, length = len(padding), past + new
    query, kv_input, cos, sin = inputs(module, batch, length)
    mask = causal(length, padding, module.config.window)
    expected = reference(module, query, kv_input, cos, sin, mask)
    given_mask: Tensor = mask
    if form == "float":
        given_mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, torch.finfo(torch.float64).min)
    cache = DynamicCache()
    parts = []
    for start, stop in ((0, past), (past, length)):
        if start == stop:
            continue
        some = given_mask[:, :, start:stop]
        if form == "padding":  # the module adds causality itself; a single query has none to add, nor a window
            some = torch.stack([torch.arange(stop) >= pad for pad in padding])
            if stop - start == 1 and module.config.window is not None:
                some = mask[:, :, start:stop]
        span = slice(start, stop)
        parts.append(module(query[:, :, span], kv_input[:, span], cos[:, span], sin[:, span], some, cache))
    out = torch.cat(parts, dim=1)
    assert out.isfinite().all()
    seen = mask.any(-1).squeeze(1)
    torch.testing.assert_close(out[seen], expected[seen], rtol=1e-9, atol=1e-9)
    assert cache.layers[0].keys.shape == (batch, 1, length, module.config.kv_lora_rank)
    assert cache.layers[0].values.shape == (batch, 1, length, module.config.qk_rope_head_dim)


@pytest.mark.parametrize("changes", [{}, {"sinks": True}, {"softcap": 3.0}, {"window": 3}])
def test_no_mask_means_causal(changes: dict[str, object]) -> None:
    module = make(**changes)
    query, kv_input, cos, sin = inputs(module, 2, 6)
    expected = reference(module, query, kv_input, cos, sin, causal(6, [0, 0], module.config.window))
    for path in ("absorbed", "expanded"):
        module.path = path
        torch.testing.assert_close(module(query, kv_input, cos, sin), expected, rtol=1e-9, atol=1e-9)
    cache = DynamicCache()
    first = module(query[:, :, :2], kv_input[:, :2], cos[:, :2], sin[:, :2], None, cache)
    rest = module(query[:, :, 2:], kv_input[:, 2:], cos[:, 2:], sin[:, 2:], None, cache)
    torch.testing.assert_close(torch.cat((first, rest), 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", ["[1, T, c]", "[T, c]"])
def test_cos_and_sin_without_batch(shape: str) -> None:
    module = make()
    query, kv_input, cos, sin = inputs(module, 2, 4)
    cos, sin = cos[:1], sin[:1]
    expected = module(query, kv_input, cos.expand(2, -1, -1), sin.expand(2, -1, -1))
    if shape == "[T, c]":
        cos, sin = cos[0], sin[0]
    torch.testing.assert_close(module(query, kv_input, cos, sin), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"sinks": True, "softcap": 4.0}, {"rope_columns": ()}])
def test_lower_precision(dtype: torch.dtype, changes: dict[str, object]) -> None:
    exact = make(num_attention_heads=4, head_dim=16, v_head_dim=12, kv_lora_rank=24, qk_nope_head_dim=16, **changes)
    module = copy.deepcopy(exact).to(dtype)
    exact = copy.deepcopy(module).double()
    arguments = inputs(module, 2, 40)
    expected = exact(*(x.double() for x in arguments))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 8e-3}[dtype]
    for path in ("absorbed", "expanded"):
        module.path = path
        out = module(*arguments)
        assert out.dtype == dtype
        assert (out.double() - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", ["lowest", "inf"])
@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("sinks", [False, True])
def test_rows_without_keys_stay_finite(dtype: torch.dtype, value: str, path: str, sinks: bool) -> None:
    module = make(dtype, sinks=sinks)
    module.path = path
    allowed = causal(5, [3, 0])
    lowest = torch.finfo(dtype).min if value == "lowest" else -math.inf
    for mask in (allowed, torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, lowest)):
        out = module(*inputs(module, 2, 5), mask)
        assert out.isfinite().all()
        module.zero_grad()
        out[:, 3:].float().pow(2).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("path", ["absorbed", "expanded"])
@pytest.mark.parametrize("changes", [{}, {"sinks": True, "softcap": 3.0, "kv_bias": True}])
def test_gradients_flow_to_weights_and_inputs(path: str, changes: dict[str, object]) -> None:
    module = make(**changes)
    module.path = path
    query, kv_input, cos, sin = inputs(module, 1, 3)
    query.requires_grad_()
    kv_input.requires_grad_()
    assert torch.autograd.gradcheck(lambda q, x: module(q, x, cos, sin), (query, kv_input))
    module(query, kv_input, cos, sin).pow(2).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_static_cache_with_and_without_mask() -> None:
    module = make(torch.float32)
    query, kv_input, cos, sin = inputs(module, 2, 7)
    expected = module(query, kv_input, cos, sin)
    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    for explicit in (False, True):
        cache = StaticCache(config=config, max_cache_len=12)
        keys = torch.arange(12)
        first_mask = (keys[None, :] <= torch.arange(4)[:, None])[None, None] if explicit else None
        parts = [module(query[:, :, :4], kv_input[:, :4], cos[:, :4], sin[:, :4], first_mask, cache)]
        for t in range(4, 7):
            span = slice(t, t + 1)
            mask = (keys <= t)[None, None, None].expand(2, -1, -1, -1)
            parts.append(module(query[:, :, span], kv_input[:, span], cos[:, span], sin[:, span], mask, cache))
        torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-5, atol=1e-5)


class Adapted(nn.Linear):
    """A linear whose weight is not what it computes, as adapters and quantisers have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


def test_absorbed_path_sees_what_wraps_the_up_projection() -> None:
    module = make()
    wrapped = Adapted(5, 3 * 10, bias=False, dtype=torch.float64)
    wrapped.weight = module.kv_b_proj.weight
    module.kv_b_proj = wrapped
    arguments = inputs(module, 2, 5)
    module.path = "expanded"
    expected = module(*arguments)
    module.path = "absorbed"
    torch.testing.assert_close(module(*arguments), expected)


@pytest.mark.parametrize("length", [1, 6])
def test_export(length: int) -> None:
    module = make(torch.float32)
    arguments = inputs(module, 2, length)
    with torch.no_grad():
        program = torch.export.export(module, arguments)
        torch.testing.assert_close(program.module()(*arguments), module(*arguments))


def test_copies_and_state() -> None:
    module = make(sinks=True, kv_bias=True)
    arguments = inputs(module, 1, 4)
    expected = module(*arguments)
    assert set(module.state_dict()) == {
        "kv_a_proj_with_mqa.weight",
        "kv_a_proj_with_mqa.bias",
        "kv_b_proj.weight",
        "q_rope_proj",
        "sinks",
    }
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        torch.testing.assert_close(other(*arguments), expected, rtol=0, atol=0)
    assert "q_rope_proj" not in make(rope_columns=()).state_dict()


def test_path_choice() -> None:
    config = make(kv_lora_rank=32, head_dim=16, qk_nope_head_dim=16, v_head_dim=16).config
    assert choose_path(1, 1, config) == "absorbed"
    assert choose_path(1, 4096, config) == "absorbed"
    assert choose_path(8, 4096, config) == "absorbed"
    assert choose_path(8, 12, config) == "expanded"
    assert choose_path(512, 4096, config) == "expanded"
    wide = make(kv_lora_rank=512, head_dim=16, qk_nope_head_dim=16, v_head_dim=16).config
    assert choose_path(60, 4096, wide) == "expanded"


def test_config_round_trip_and_refusals() -> None:
    config = make(sinks=True, window=4).config
    assert MLAConfig.from_dict(config.to_dict()) == config
    for changes in ({"qk_nope_head_dim": 3}, {"kv_lora_rank": 0}, {"rope_columns": (), "qk_nope_head_dim": 0}):
        with pytest.raises(UsageError):
            MLAConfig.from_dict({**config.to_dict(), **changes})
    with pytest.raises(UsageError, match="no field colour"):
        MLAConfig.from_dict({**config.to_dict(), "colour": 1})
    values = config.to_dict()
    del values["scale"]
    with pytest.raises(UsageError, match="scale"):
        MLAConfig.from_dict(values)


def test_unusable_arguments_are_one_line_errors() -> None:
    module = make()
    query, kv_input, cos, sin = inputs(module, 1, 3)
    with pytest.raises(UsageError, match="need cos and sin"):
        module(query, kv_input, None, None)
    with pytest.raises(UsageError, match="attention mask"):
        module(query, kv_input, cos, sin, torch.ones(1, 3, 3))


def test_cost_counts_what_the_module_has() -> None:
    module = make(sinks=True, kv_bias=True, folded=True)
    config = module.config
    cost = mla_cost(config, hidden_size=8)
    around = 8 * 3 * (6 + 4)  # query and output projections
    assert cost.parameters == sum(p.numel() for p in module.parameters()) + around
    assert mla_values(config) == 5 + 6
    assert cost.at(100, batch=2, dtype_bytes=4)["kv_bytes"] == 11 * 100 * 2 * 4
    # one token over 100 keys: every product weight once, then latent twice and slots once per head and key
    products = cost.parameters - 3
    assert cost.at(100)["decode_flops"] == 2 * (products + 3 * (5 + 6 + 5) * 100)


def test_cost_of_a_window() -> None:
    full = attention_cost(576, 9, 3, 64, 64)
    window = attention_cost(576, 9, 3, 64, 64, window=128)
    assert full.at(64) == window.at(64)
    assert window.at(4096)["cached_values"] == 384 * 128
    assert full.at(4096)["cached_values"] == 384 * 4096
    assert full.parameters == 576 * 576 * 2 + 576 * 192 * 2

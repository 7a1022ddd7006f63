"""Random GateSWA modules and a plain reference for them."""

import math
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnedit.targets.attention import GateSWA, GateSWAConfig

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

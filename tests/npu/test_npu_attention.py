"""Lowered attention of every geometry against the trained modules, and what the legaliser decides of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from attnedit.targets.attention import MLA, GateSWA, GateSWAConfig, MLAConfig
from attnedit.targets.runtime.npu.attention import WindowAttention
from attnedit.targets.runtime.npu.cache import Step, calling, npu_cache
from attnedit.targets.runtime.npu.latent import LatentAttention
from attnedit.targets.runtime.npu.legalise import LayerPlan, Surveyed, advice, legalise
from attnedit.targets.runtime.npu.limits import BLOCK, SOCS
from attnedit.targets.runtime.npu.reference import register
from attnedit.targets.runtime.npu.reference_attention import float32_allowed

register()
SOC = SOCS["910b"]
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
GARBAGE = 50.0
"""What buffers hold before they are written: no unwritten place may have an effect."""


def steps(prompts: list[int], tokens: int, blocks: int) -> list[Step]:
    """A prompt of so many tokens per row, then so many tokens; the blocks of rows are not in order."""
    table = torch.arange(len(prompts) * blocks, dtype=torch.int32).flip(0).view(len(prompts), blocks)
    ids = torch.zeros(len(prompts), max(prompts), dtype=torch.int64)
    made = [Step.of_prompt(ids, torch.tensor(prompts), table, TRIANGLE)]
    for index in range(1, tokens + 1):
        lengths = [count + index for count in prompts]
        made.append(Step.of_token(torch.tensor(lengths), lengths, table, TRIANGLE))
    return made


def run(module: nn.Module, plan: LayerPlan, given: list[Tensor], prompts: list[int], tokens: int, order: Any) -> Any:
    """Outputs [B, T, ..] at every real token of each row, call by call; `given` are the inputs by position."""
    blocks = -(-(max(prompts) + tokens) // BLOCK)
    buffers = {name: torch.full(shape, GARBAGE) for name, shape in plan.caches(len(prompts), blocks).items()}
    rows: list[list[Tensor]] = [[] for _ in prompts]
    with torch.no_grad(), float32_allowed():
        for step in steps(prompts, tokens, blocks):
            cache = npu_cache([plan], buffers)
            index = step.positions.expand(len(prompts), -1)
            taken = [x.gather(axis, _index(x, index, axis)) for x, axis in given]  # type: ignore[misc]
            with calling(step, cache):
                out = module(*order(taken, cache))
            for row, count in enumerate(prompts):
                rows[row].append(out[row, :count] if step.prefill else out[row])
    return [torch.cat(parts) for parts in rows]


def _index(x: Tensor, index: Tensor, axis: int) -> Tensor:
    shape = [1] * x.dim()
    shape[0], shape[axis] = index.shape
    sizes = list(x.shape)
    sizes[axis] = index.shape[1]
    return index.view(shape).expand(sizes)


LATENT = {
    "split": {"kv_lora_rank": 300, "slots": 16},
    "heads": {"kv_lora_rank": 300, "slots": 16, "num_attention_heads": 3},
    "exact": {"kv_lora_rank": 512, "slots": 32, "num_attention_heads": 4},
    "overflow": {"kv_lora_rank": 400, "slots": 48},
    "joined": {"kv_lora_rank": 20, "slots": 4},
    "rotary": {"kv_lora_rank": 20, "slots": 8, "qk_nope_head_dim": 0},
    "plain": {"kv_lora_rank": 520, "slots": 40},
    "window": {"kv_lora_rank": 20, "slots": 4, "window": 3},
    "large window": {"kv_lora_rank": 500, "slots": 16, "window": 3},
    "no slots": {"kv_lora_rank": 300, "slots": 0},
    "sinks": {"kv_lora_rank": 300, "slots": 16, "sinks": True},
    "softcap": {"kv_lora_rank": 20, "slots": 4, "softcap": 2.0, "sinks": True},
}


def latent(name: str) -> MLA:
    options = dict(LATENT[name])
    slots = options.pop("slots")
    fixed = {"layer_idx": 0, "num_attention_heads": 4, "head_dim": 24, "v_head_dim": 20, "input_size": 32}
    values: dict[str, Any] = {"qk_nope_head_dim": 24, "scale": 0.2, **fixed, **options}
    config = MLAConfig(rope_columns=tuple(i % 6 for i in range(slots)), **values)
    torch.manual_seed(0)
    module = MLA(config)
    if module.sinks is not None:
        nn.init.normal_(module.sinks)
    return module


@pytest.mark.parametrize("soc", ["910b", "310p"])
@pytest.mark.parametrize("name", LATENT)
def test_latent_attention_is_the_trained_one(name: str, soc: str) -> None:
    mla = latent(name)
    config = mla.config
    plan = legalise(LatentAttention.describe(config), SOCS[soc], SOCS[soc].dtypes[0])
    prompts, tokens = [5, 2, 7], 3
    total = max(prompts) + tokens
    query = torch.randn(3, config.num_attention_heads, total, 24)
    hidden, angle = torch.randn(3, total, 32), torch.randn(3, total, 6)
    given: Any = [(query, 2), (hidden, 1), (angle.cos(), 1), (angle.sin(), 1)]
    found = run(LatentAttention(mla, plan), plan, given, prompts, tokens, lambda taken, cache: (*taken, None, cache))
    for row, count in enumerate(prompts):
        span = slice(0, count + tokens)
        one = (query[row : row + 1, :, span], *(x[row : row + 1, span] for x in (hidden, angle.cos(), angle.sin())))
        with torch.no_grad():
            want = mla(*one)[0]
        torch.testing.assert_close(found[row], want, atol=2e-5, rtol=1e-4)


WINDOW: dict[str, dict[str, Any]] = {
    "bare": {},
    "wide": {"sliding_window": 40},
    "one": {"sliding_window": 1},
    "sinks": {"sink_tokens": 2},
    "more sinks than tokens": {"sink_tokens": 4, "sliding_window": 2},
    "virtual": {"sink_logit": True, "sink_value": True, "sink_tokens": 3, "gate": "element", "gate_bias": True},
    "source's sinks": {"sinks": True, "sink_logit": True, "sink_value": True, "sink_tokens": 1, "gate": "head"},
    "softcap": {"softcap": 1.5, "sink_logit": True, "sink_value": True, "sink_tokens": 2},
}


@pytest.mark.parametrize("soc", ["910b", "310p"])
@pytest.mark.parametrize("name", WINDOW)
def test_windowed_attention_is_the_trained_one(name: str, soc: str) -> None:
    fixed = {"layer_idx": 0, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "v_head_dim": 20}
    config = GateSWAConfig(**{"hidden_size": 32, "sliding_window": 4, "scale": 0.3, **fixed, **WINDOW[name]})
    torch.manual_seed(0)
    module = GateSWA(config)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    plan = legalise(WindowAttention.describe(config), SOCS[soc], SOCS[soc].dtypes[0])
    assert plan.decode.fused == (soc == "910b" and name != "softcap")
    prompts, tokens = [5, 2, 9, 3], 12  # around the window, and around it again and again
    total = max(prompts) + tokens
    query, hidden = torch.randn(4, 4, total, 24), torch.randn(4, total, 32)
    key, value = torch.randn(4, 2, total, 24), torch.randn(4, 2, total, 20)
    sinks = torch.randn(4) if config.sinks else None
    given: Any = [(query, 2), (key, 2), (value, 2), (hidden, 1)]
    lowered = WindowAttention(module, plan)
    found = run(lowered, plan, given, prompts, tokens, lambda taken, cache: (*taken, None, cache, sinks))
    for row, count in enumerate(prompts):
        span = slice(0, count + tokens)
        one = [x[row : row + 1, :, span] for x in (query, key, value)]
        with torch.no_grad():
            want = module(*one, hidden[row : row + 1, span], sinks=sinks)[0]
        torch.testing.assert_close(found[row], want, atol=2e-5, rtol=1e-4)


def surveyed(**options: Any) -> Surveyed:
    fixed = {"heads": 32, "kv_heads": 1, "size": 128, "value_size": 128, "rank": 448, "rope": 64}
    return Surveyed(0, "latent", **{**fixed, **options})


@pytest.mark.parametrize(
    ("options", "fused", "words", "cached", "needed"),
    [
        ({}, True, "latent 448 to 512", 576, 512),
        ({"rank": 512}, True, "no padding", 576, 576),
        ({"heads": 9}, True, "9 heads to 16", 576, 512),
        ({"rope": 32}, True, "rotary part 32 to 64", 576, 480),
        ({"rope": 128}, True, "64 of 128 rotary values lie in the latent's padding", 576, 576),
        ({"rope": 130}, False, "do not fit into 512 + 64", 578, 578),
        ({"rank": 513, "rope": 0}, False, "do not fit", 513, 513),
        ({"heads": 129}, False, "129 heads are more than 128", 512, 512),
        ({"rank": 120, "rope": 32}, True, "padded: 152 to 160", 160, 152),
        ({"window": 64}, True, "the window is a mask", 512, 512),
        ({"window": 64, "rank": 449}, False, "under a window", 513, 513),
        ({"softcap": True}, False, "softcap", 512, 512),
    ],
)
def test_latent_decode(options: dict[str, Any], fused: bool, words: str, cached: int, needed: int) -> None:
    decision = legalise(surveyed(**options), SOC, "bfloat16").decode
    assert decision.fused == fused
    assert words in decision.reason
    assert (decision.cached, decision.needed) == (cached, needed)
    assert decision.work >= 1.0
    assert (decision.work == 1.0) == (not fused or options == {"rank": 512})


def test_work_counts_what_padding_adds() -> None:
    decision = legalise(surveyed(heads=9), SOC, "bfloat16").decode
    assert decision.work == pytest.approx(16 * (2 * 512 + 64) / (9 * (2 * 448 + 64)))
    assert dict(decision.pads) == {"latent": 512, "rope": 64, "heads": 16}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"form": "full", "heads": 300, "kv_heads": 300}, "300 heads are more than 256"),
        ({"form": "full", "size": 520}, "no multiple of 16 up to 512"),
        ({"form": "full", "heads": 130, "kv_heads": 2}, "more than 64 times"),
        ({"form": "window", "window": 8, "softcap": True}, "softcap"),
        ({"form": "held", "held": (1, 512, 64)}, "makes keys and values out of what is cached"),
    ],
)
def test_other_fallbacks(options: dict[str, Any], words: str) -> None:
    fixed = {"layer": 3, "heads": 8, "kv_heads": 2, "size": 64, "value_size": 64}
    plan = legalise(Surveyed(**{**fixed, **options}), SOC, "bfloat16")
    assert not plan.decode.fused
    assert words in plan.decode.reason
    assert plan.decode.layer == 3


@pytest.mark.parametrize("rank", [100, 400, 512])
@pytest.mark.parametrize("rope", [16, 64, 176])
@pytest.mark.parametrize("window", [None, 8])
def test_advice_is_what_the_legaliser_does(rank: int, rope: int, window: int | None) -> None:
    here = surveyed(rank=rank, rope=rope, window=window)
    limit = 512 if window else 576
    assert str(limit) in advice(here, SOC)
    assert legalise(here, SOC, "bfloat16").decode.fused == (rank + rope <= limit)
    assert advice(here, SOCS["310p"]).startswith("none")

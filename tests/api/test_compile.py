"""`attnedit.compile(target="mla")` on every family: exact at full budget, consistent and within budget at half."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch
from compiled import CONTEXT, cached_values, deviation, exact, half, in_pieces, logits, source, tokens
from families import FAMILIES, SUPPORTED
from torch import Tensor
from transformers import PreTrainedModel

CONVERTED = [name for name in SUPPORTED if not FAMILIES[name].mla]
LENGTH = 13
"""Not the length of tracing, calibration or verification; three times the tables' sliding window."""
PIECES = ([1] * LENGTH, [1, 5, 1, 6], [8, 1, 1, 3])
CLOSE = 1e-4


@pytest.fixture(scope="module", params=CONVERTED)
def family(request: pytest.FixtureRequest) -> str:
    """Module scope, so that the tests of one family run one after the other: each worker compiles only some."""
    return str(request.param)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Ids and mask of two sequences, the first with left padding."""
    ids = tokens(2, LENGTH, seed=3)
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return ids, mask


@functools.cache
def untouched(name: str) -> tuple[dict[str, Tensor], str, Tensor]:
    """What compiling must not change of a source, taken before."""
    model = source(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, model.config.to_json_string(), logits(model, tokens(2, LENGTH))


@pytest.fixture(autouse=True)
def _before(family: str) -> None:
    untouched(family)


def test_full_budget_computes_what_the_source_does(family: str, batch: tuple[Tensor, Tensor]) -> None:
    result, (ids, mask) = exact(family), batch
    assert deviation(logits(result.model, ids, mask), logits(source(family), ids, mask), mask) < CLOSE
    assert deviation(logits(result.model, ids), logits(source(family), ids)) < CLOSE
    against_source, decode = result.report.verification
    assert "source" in against_source.what
    assert against_source.error is not None
    assert against_source.error <= (against_source.tolerance or 0) <= CLOSE
    assert "decod" in decode.what
    assert result.report.kv_budget_achieved == 1


@pytest.mark.parametrize("sizes", PIECES, ids=["one by one", "long after short", "short after long"])
def test_full_budget_decodes_what_the_source_does(family: str, batch: tuple[Tensor, Tensor], sizes: list[int]) -> None:
    ids, mask = batch
    found, cache = in_pieces(exact(family).model, ids, mask, sizes)
    expected, source_cache = in_pieces(source(family), ids, mask, sizes)
    assert deviation(found, expected, mask) < CLOSE
    assert cached_values(cache) == cached_values(source_cache)


def test_half_budget_is_what_the_cache_holds(family: str, batch: tuple[Tensor, Tensor]) -> None:
    report = half(family).report
    held, before = (
        cached_values(in_pieces(model, *batch, [LENGTH])[1]) for model in (half(family).model, source(family))
    )
    assert {layer: length for layer, (_, length) in held.items()} == {
        layer: length for layer, (_, length) in before.items()
    }
    windows = dict(zip(before, FAMILIES[family].windows, strict=True))
    rotary = dict(zip(before, FAMILIES[family].rotary_dims, strict=True))
    share = {layer: min(CONTEXT, windows[layer] or CONTEXT) / CONTEXT for layer in before}
    total, asked = (sum(values[layer][0] * share[layer] for layer in share) for values in (held, before))
    rewritten = [row for row in report.layers if row.kind == "mla"]
    assert 0 <= 0.5 * asked - total < sum(share[row.layer] for row in rewritten)
    assert report.kv_budget_achieved == pytest.approx(total / asked, abs=1e-9)
    assert report.kv_bytes_after == pytest.approx(4 * total)
    assert report.kv_bytes_before == pytest.approx(4 * asked)
    assert (report.sites_matched, report.sites_rewritten) == (len(before), len(rewritten))
    for row in report.layers:
        width = held[row.layer][0]
        assert row.values_after == pytest.approx(width * share[row.layer])
        assert row.values_before == pytest.approx(before[row.layer][0] * share[row.layer])
        if row.kind == "mla":
            assert (row.kv_lora_rank or 0) + (row.qk_rope_head_dim or 0) == width
            assert bool(row.qk_rope_head_dim) == bool(rotary[row.layer])


def test_half_budget_report_is_finite(family: str) -> None:
    report = half(family).report
    for row in report.layers:
        if row.kind == "mla":
            assert row.output_error is not None
            assert row.energy_kept is not None
            assert 0 <= row.output_error < 0.5
            assert 0 < row.energy_kept <= 1 + 1e-6
    assert all(math.isfinite(number) for number in numbers(report.to_dict()))
    assert report.calibration_tokens == 128
    assert [check.what for check in report.verification] == ["decoding from the cache against prefill"]
    assert type(report).from_json(report.to_json()) == report


@torch.no_grad()
def test_half_budget_reports_the_error_that_the_result_has(family: str) -> None:
    """On the calibration data, with the weights as they are stored: folded, split, rounded."""
    rows = [row for row in half(family).report.layers if row.kind == "mla"]
    calls = attention_calls(source(family), [row.name for row in rows], tokens(4, 32))
    for row in rows:
        args, kwargs, expected = calls[row.name]
        found = half(family).model.get_submodule(row.name)(*args, **kwargs)[0]
        bias = [p for name, p in source(family).get_submodule(row.name).named_parameters() if name in OUTPUT_BIASES]
        expected, found = (states - (bias[0] if bias else 0) for states in (expected, found))
        error = float((found - expected).square().sum() / expected.square().sum())
        if FAMILIES[family].gate:  # fitted and reported without the gate
            assert error < 3 * (row.output_error or 0)
        else:
            assert error == pytest.approx(row.output_error, rel=0.02, abs=1e-6)


OUTPUT_BIASES = [f"{name}.bias" for name in ("o_proj", "out_proj", "c_proj", "dense")]


def attention_calls(model: PreTrainedModel, names: list[str], ids: Tensor) -> dict[str, tuple[Any, Any, Tensor]]:
    """Arguments and first output of attention modules in one forward pass."""
    calls: dict[str, tuple[Any, Any, Tensor]] = {}
    handles = []
    for name in names:

        def keep(_: Any, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
            calls[name] = args, kwargs, output[0]

        handles.append(model.get_submodule(name).register_forward_hook(keep, with_kwargs=True))
    logits(model, ids)
    for handle in handles:
        handle.remove()
    return calls


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        return list(itertools.chain.from_iterable(map(numbers, value.values())))
    if isinstance(value, list):
        return list(itertools.chain.from_iterable(map(numbers, value)))
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("sizes", PIECES, ids=["one by one", "long after short", "short after long"])
def test_half_budget_decode_equals_prefill(family: str, batch: tuple[Tensor, Tensor], sizes: list[int]) -> None:
    ids, mask = batch
    if FAMILIES[family].attention_layers < 2:  # linear attention, in the source too, needs padding in one piece
        sizes = [8, 1, 1, 1, 1, 1]
    found, _ = in_pieces(half(family).model, ids, mask, sizes)
    expected, _ = in_pieces(half(family).model, ids, mask, [LENGTH])
    assert deviation(found, expected, mask) < CLOSE


def test_half_budget_generates_the_same_with_and_without_cache(family: str, batch: tuple[Tensor, Tensor]) -> None:
    ids, mask = batch
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    with_cache, without = (half(family).model.generate(ids, use_cache=use, **arguments) for use in (True, False))
    assert with_cache.shape == (2, LENGTH + 6)
    assert torch.equal(with_cache, without)


def test_source_stays_and_shares_its_tensors(family: str) -> None:
    results = exact(family), half(family)
    model, (state, config, before) = source(family), untouched(family)
    now = model.state_dict()
    assert now.keys() == state.keys()
    assert all(torch.equal(now[name], value) for name, value in state.items())
    assert model.config.to_json_string() == config
    assert type(model).__name__.startswith("Attnedit") is False
    assert torch.equal(logits(model, tokens(2, LENGTH)), before)
    for result in results:
        inside = tuple(f"{row.name}." for row in result.report.layers if row.kind == "mla")
        mine = result.model.state_dict()
        fresh = {name for name in mine if name not in now or mine[name].data_ptr() != now[name].data_ptr()}
        assert fresh
        assert all(name.startswith(inside) for name in fresh)
        changed = {name for name in fresh if name in now}  # the output projection's weight is refitted, its bias not
        assert len(changed) == (0 if result is results[0] or FAMILIES[family].gate else len(inside))
        assert not any(name.endswith("bias") and not torch.equal(mine[name], now[name]) for name in changed)

"""The GateSWA pass: closed forms against brute force, choice of layers against brute force, arguments, budgets."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import CONTEXT, MODULE, _remembered, deviation, in_pieces, logits, source, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_samples import layer_sample
from torch import Tensor
from transformers import PreTrainedModel

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.execution.stream import Walk, decoder_layers
from attnedit.passes.gateswa.fit import WindowFit, build, fit_window
from attnedit.passes.gateswa.options import GateSWAOptions, Sinks, full_count, full_layers_of
from attnedit.passes.layer_loss import MEASURED, loss_increases, measured_rows
from attnedit.passes.sample import LayerSample
from attnedit.targets.attention import GateSWAConfig
from attnedit.targets.runtime.eager import share_copy, splice

FAMILIES = ["llama", "qwen3", "gemma2", "gpt_oss", "phi", "gpt2", "qwen3_next"]
WINDOW = 4
FORMS = {
    "kept": {"sinks": "keep:2"},
    "virtual": {"sinks": "logit,value", "gate": "head"},
    "all": {"sinks": "logit,keep:1", "gate": "element"},
    "plain": {"sinks": "none"},
}


def compile_windowed(model: PreTrainedModel, target: str = "gateswa", **options: Any) -> attnedit.CompileResult:
    settings = {"calibration": tokens(4, 32), "window": WINDOW, **options}
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(model, target, **settings)


def config_for(sample: LayerSample, window: int, **options: Any) -> GateSWAConfig:
    sizes = {"num_attention_heads": sample.heads, "num_key_value_heads": sample.groups, "hidden_size": 10}
    heads = {"head_dim": sample.query.shape[-1], "v_head_dim": sample.value.shape[-1]}
    return GateSWAConfig(layer_idx=0, sliding_window=window, scale=sample.scale, **sizes, **heads, **options)


def outputs(sample: LayerSample, config: GateSWAConfig, fit: WindowFit) -> tuple[Tensor, Tensor]:
    """New and old attention output [N, Q, D] in float64 from the definition, every key at once."""
    n, h, q, _ = sample.query.shape
    query, key = sample._rotated
    share = h // sample.groups
    logit = (query.double() @ key.double().repeat_interleave(share, 1).mT) * sample.scale
    value = sample.value.double().repeat_interleave(share, 1)
    behind = sample.positions[:, None] - torch.arange(key.shape[2])
    seen = behind >= 0
    near = seen & ((behind < config.sliding_window) | (torch.arange(key.shape[2]) < config.sink_tokens))
    old = logit.masked_fill(~seen, -torch.inf).softmax(-1) @ value
    new = logit.masked_fill(~near, -torch.inf)
    if fit.sink_logit is not None:
        new = torch.cat([new, fit.sink_logit.double().view(1, h, 1, 1).expand(n, h, q, 1)], -1)
        extra = torch.zeros(sample.groups, value.shape[-1]) if fit.sink_value is None else fit.sink_value
        extra = extra.double().repeat_interleave(share, 0)[None, :, None].expand(n, h, 1, -1)
        value = torch.cat([value, extra], 2)
    weight = (sample.output_weight if fit.output_weight is None else fit.output_weight).double()
    mixed = new.softmax(-1) @ value
    return (
        torch.einsum("nhqe,hDe->nqD", mixed, weight),
        torch.einsum("nhqe,hDe->nqD", old, sample.output_weight.double()),
    )


def error(sample: LayerSample, config: GateSWAConfig, fit: WindowFit) -> float:
    new, old = outputs(sample, config, fit)
    return float((new - old).square().sum() / old.square().sum())


def error_of_sinks(sample: LayerSample, config: GateSWAConfig, fit: WindowFit) -> float:
    """What sinks are chosen by: the first token counts as much as all others together."""
    new, old = outputs(sample, config, fit)
    weight = torch.ones(len(sample.positions), dtype=torch.float64)
    weight[0] = len(weight) - 1
    return float(((new - old).square().sum((0, 2)) * weight).sum() / old.square().sum())


@settings(max_examples=25, deadline=None)
@given(
    window=st.integers(1, 14),
    sink_tokens=st.integers(0, 3),
    virtual=st.sampled_from(["none", "logit", "value"]),
    refit=st.booleans(),
    queries=st.sampled_from([5, 12]),
    rotary=st.sampled_from([0, 4, 8]),
)
def test_reported_error_is_the_one_of_the_definition(
    window: int, sink_tokens: int, virtual: str, refit: bool, queries: int, rotary: int
) -> None:
    sample = layer_sample(queries=queries, rotary_dims=rotary)
    logit, value = virtual != "none", virtual == "value"
    config = config_for(sample, window, sink_tokens=sink_tokens, sink_logit=logit, sink_value=value)
    fit = fit_window([sample], config, refit)
    assert fit.output_error == pytest.approx(error(sample, config, fit), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("form", [{}, {"sink_tokens": 2}, {"sink_logit": True}])
def test_a_window_that_cuts_nothing_changes_nothing(form: dict[str, Any]) -> None:
    sample = layer_sample()
    fit = fit_window([sample], config_for(sample, 12, **form))
    assert fit.output_weight is not None
    assert torch.allclose(fit.output_weight, sample.output_weight, atol=1e-3)
    assert fit.output_error < 1e-6  # a sink logit can be low, not absent


def test_each_step_of_the_fit_lowers_the_error() -> None:
    sample = layer_sample(sequences=6, length=24)
    forms = [{}, {"sink_logit": True}, {"sink_logit": True, "sink_value": True}]
    raw = [fit_window([sample], config_for(sample, 3, **form), refit=False).output_error for form in forms]
    refit = [fit_window([sample], config_for(sample, 3, **form)).output_error for form in forms]
    assert raw[0] > raw[2]
    assert all(after < before for before, after in zip(raw, refit, strict=True))


def test_a_sink_leaves_the_first_token_of_a_window_alone() -> None:
    sample = layer_sample(sequences=6, length=24)
    config = config_for(sample, 3, sink_logit=True, sink_value=True)

    def of_the_first(fit: WindowFit) -> float:
        new, old = outputs(sample, config, fit)
        return float((new - old)[:, 0].square().sum() / old[:, 0].square().sum())

    weighed = of_the_first(fit_window([sample], config, refit=False))
    with mock.patch("attnedit.passes.gateswa.fit.FIRST_SHARE", 1 / 24):  # as any other
        assert weighed < of_the_first(fit_window([sample], config, refit=False)) / 4


@pytest.mark.parametrize("with_value", [False, True])
def test_no_other_sink_of_a_head_is_better(with_value: bool) -> None:
    """The errors of heads add up in the fit, so each head is checked alone: the others write nothing."""
    sample = layer_sample(sequences=5, length=20, heads=2, groups=2)
    config = config_for(sample, 3, sink_logit=True, sink_value=with_value)
    fit = fit_window([sample], config, refit=False)
    assert fit.sink_logit is not None
    for head in range(2):
        weight = sample.output_weight.clone()
        weight[1 - head] = 0
        alone = replace(sample, output_weight=weight)
        found = error_of_sinks(alone, config, replace(fit, output_weight=None))
        for step in (-0.5, -0.1, 0.1, 0.5):
            moved = fit.sink_logit.clone()
            moved[head] += step
            assert error_of_sinks(alone, config, replace(fit, sink_logit=moved)) > found - 1e-4
        if fit.sink_value is not None:
            for direction in torch.randn(4, 6, generator=torch.Generator().manual_seed(0)):
                other = fit.sink_value.clone()
                other[head] += 0.1 * direction
                assert error_of_sinks(alone, config, replace(fit, sink_value=other)) > found - 1e-4


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_next"])
@torch.no_grad()
def test_walk_ends_where_the_model_ends(family: str) -> None:
    model, ids = source(family), tokens(2, 12)
    layers, _ = decoder_layers(model, capture(model))
    expected = logits(model, ids)
    walk = Walk(model, layers, ids)
    for _ in layers:
        assert deviation(walk.logits(), expected) < 1e-6
        walk.advance()
    assert deviation(walk.logits(), expected) < 1e-6
    assert all("forward" not in vars(layer) for layer in layers)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@torch.no_grad()
def test_losses_are_those_of_models_with_one_layer_replaced(family: str) -> None:
    model = source(family)
    sites = [site for site in capture(model) if site.window is None]
    rows = [*tokens(2, 20).split(1), tokens(1, 33)]
    graphs = {
        site.name: build(model, site, GateSWAOptions(2, "none", Sinks()).config(site), WindowFit(None, None, None, 0.0))
        for site in sites
    }
    found = loss_increases(model, sites, graphs, rows)
    expected = [logits(model, row).double().log_softmax(-1) for row in rows]
    for site in sites:
        changed = share_copy(model)
        splice(changed, {site.name: copy.copy(graphs[site.name])})
        others = [logits(changed, row).double().log_softmax(-1) for row in rows]
        divergences = [
            float((wanted.exp() * (wanted - other)).sum(-1).mean())
            for wanted, other in zip(expected, others, strict=True)
        ]
        assert found[site.name] == pytest.approx(sum(divergences) / len(rows), rel=1e-3, abs=1e-7)
        assert found[site.name] > 0


def test_losses_are_measured_far_back_and_on_what_was_not_fitted() -> None:
    windows = [tokens(4, 256), tokens(30, 64)]
    left, rows = measured_rows(windows, seed=0, long_rows=1)
    assert [part.shape for part in left] == [(3, 256), (30 - MEASURED, 64)]
    assert [row.shape[1] for row in rows] == [256] + [64] * MEASURED
    given = {tuple(row) for part in windows for row in part.tolist()}
    untouched = [row for row in rows if tuple(row[0].tolist()) in given]
    # Passages come again in the long ones and in every second short one.
    assert [row.shape[1] for row in untouched] == [64] * (MEASURED // 2)
    only = tokens(1, 64)
    left, rows = measured_rows([only], seed=0, long_rows=3)
    assert torch.equal(left[0], only)
    assert torch.equal(rows[0], only)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", FAMILIES)
def test_result_decodes_generates_and_is_close(family: str, form: str) -> None:
    result = compile_windowed(source(family), full_layers=0, **FORMS[form])
    (decode,) = result.report.verification
    assert decode.error is not None
    assert decode.error < 1e-4
    ids = tokens(2, 13, seed=3)
    mask = torch.ones_like(ids)
    ids[0, :3], mask[0, :3] = 0, 0
    pieces, _ = in_pieces(result.model, ids, mask, [7, 1, 1, 4])
    assert deviation(pieces, in_pieces(result.model, ids, mask, [13])[0], mask) < 1e-4
    lengths = {"min_new_tokens": 5, "max_new_tokens": 5}
    out = result.model.generate(ids, attention_mask=mask, **lengths, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 18)
    for row in result.report.layers:
        if row.kind == "gateswa":
            assert row.sliding_window == WINDOW
            assert row.output_error is not None
            if family != "qwen3_next":  # its own gate keeps the output projection as it is: no fit bounds the error
                assert 0 < row.output_error < 1
    again = type(result.report).from_json(result.report.to_json())
    assert again == result.report


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_gate_starts_without_effect(family: str) -> None:
    plain, gated = (compile_windowed(source(family), full_layers=0, gate=gate).model for gate in ("none", "element"))
    ids = tokens(2, 20, seed=5)
    assert deviation(logits(gated, ids), logits(plain, ids)) < 1e-5


@torch.no_grad()
def test_reported_error_is_that_of_the_result() -> None:
    """Teacher forced: each rewritten module on what the source's gets, the weights as stored."""
    model, ids = source("qwen3"), tokens(1, CONTEXT)
    result = compile_windowed(model, full_layers=0, sinks="logit,keep:1", calibration=ids)
    for row in result.report.layers:
        kept: list[Any] = []
        handle = model.get_submodule(row.name).register_forward_hook(
            lambda _, args, kwargs, out, kept=kept: kept.append((args, kwargs, out[0])), with_kwargs=True
        )
        logits(model, ids)
        handle.remove()
        args, kwargs, expected = kept[0]
        new = result.model.get_submodule(row.name)(*args, **kwargs)[0]
        measured = float((new - expected).square().sum() / expected.square().sum())
        assert row.output_error == pytest.approx(measured, rel=1e-3)


def test_source_stays_and_unused_layers_too() -> None:
    model = source("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compile_windowed(model, full_layers=[0])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [row.kind for row in result.report.layers] == ["source", "gateswa"]
    assert result.report.full_layers == [0]
    assert not result.report.notes


def test_the_choice_can_be_taken_again_without_measuring() -> None:
    measured = compile_windowed(source("llama"), full_layers=1)
    assert measured.report.full_layers is not None
    losses = {row.layer: row.loss_increase for row in measured.report.layers}
    assert losses[measured.report.full_layers[0]] == max(value for value in losses.values() if value is not None)
    (note,) = measured.report.notes
    again = compile_windowed(source("llama"), full_layers=note.split("'")[1])
    assert again.report.full_layers == measured.report.full_layers
    ids = tokens(2, 20, seed=5)
    assert torch.equal(logits(again.model, ids), logits(measured.model, ids))


def test_one_budget_over_both_targets() -> None:
    result = compile_windowed(source("llama"), "gateswa+mla", kv_budget=0.25, full_layers=1)
    kinds = sorted(row.kind for row in result.report.layers)
    assert kinds == ["gateswa", "mla"]
    assert 0.24 < result.report.kv_budget_achieved <= 0.25
    halved = compile_windowed(source("llama"), "gateswa+mla", full_layers=1)
    for row in halved.report.layers:
        if row.kind == "mla":
            assert row.values_after == pytest.approx(row.values_before / 2, abs=1)
    ids = tokens(2, 20, seed=5)
    mask = torch.ones_like(ids)
    assert deviation(in_pieces(result.model, ids, mask, [9, 1, 10])[0], logits(result.model, ids)) < 1e-4


def test_forms_of_full_layers() -> None:
    sites = [mock.Mock(layer_idx=index) for index in range(0, 24, 2)]  # every other layer can get a window
    assert full_layers_of(None, sites) == 3
    assert full_layers_of(5, sites) == full_layers_of("5", sites) == 5
    assert full_layers_of("every:4", sites) == [6, 14, 22]
    assert full_layers_of("4,2", sites) == full_layers_of([2, 4, 4], sites) == [2, 4]
    assert full_layers_of("4,", sites) == [4]
    for wrong, words in [(12, "0 to 11"), (-1, "0 to 11"), ([1], "1 is none"), ("few", "every:N"), ("every:1", "full")]:
        with pytest.raises(attnedit.UsageError, match=words):
            full_layers_of(wrong, sites)


def test_budget_says_how_many_layers_stay_full() -> None:
    before, windowed = dict.fromkeys(range(8), 100.0), dict.fromkeys(range(8), 10.0)
    assert full_count(0.5, before, windowed) == 3  # 5 x 10 + 3 x 100 = 350, one more is 440
    assert full_count(0.1, before, windowed) == 0
    assert full_count(0.55, before, windowed) == 4
    with pytest.raises(attnedit.UsageError, match=r"0\.1"):
        full_count(0.05, before, windowed)
    with pytest.raises(attnedit.UsageError, match="every layer full"):
        full_count(1.0, before, windowed)
    result = compile_windowed(source("llama"), kv_budget=0.6)
    assert result.report.kv_budget_achieved <= 0.6
    assert len(result.report.full_layers or []) == 1


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        ("gateswa", {"kv_budget": 0.5, "full_layers": 1}, "give one of them"),
        ("mla", {"window": 4}, "window is for the targets gateswa"),
        ("mla", {"window": None, "sinks": "logit"}, "sinks is for the targets gateswa"),
        ("gateswa", {"window": 0}, "at least 1"),
        ("gateswa", {"window": CONTEXT}, "lose nothing"),
        ("gateswa", {"gate": "door"}, "no gate 'door'"),
        ("gateswa", {"sinks": "keep:0"}, "keep:0"),
        ("gateswa", {"sinks": "logit,none"}, "'none' is not known"),
        ("gateswa", {"full_layers": 2}, "0 to 1"),
        ("gateswa+mla", {"kv_budget": 0.01}, "cannot be met"),
        ("gateswa+swa", {}, "no target"),
    ],
)
def test_arguments_that_make_no_sense(target: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(attnedit.UsageError, match=words) as caught:
        compile_windowed(source("llama"), target, **options)
    assert "\n" not in str(caught.value)

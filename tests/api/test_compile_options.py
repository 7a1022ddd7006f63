"""`attnedit.compile(target="mla")`: what it refuses, its options, windows, precisions, round trips."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, deviation, exact, half, in_pieces, logits, same_weights, source, tokens
from families import SIZES, UNSUPPORTED, build
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MiniMaxConfig,
    PreTrainedModel,
    set_seed,
)

import attnedit
from attnedit._live import LiveSource
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.execution.verify import TOLERANCE
from attnedit.options import CompileOptions
from attnedit.passes.budget import plan, source_values
from attnedit.passes.mla.shapes import shape_for
from attnedit.passes.mla.target import LatentTarget
from attnedit.passes.questions import Claim
from attnedit.passes.repeats import with_repeats
from attnedit.targets.runtime.eager import share_copy, splice
from attnedit.testing import tiny_model


def mean_error(result: attnedit.CompileResult) -> float:
    errors = [row.output_error for row in result.report.layers if row.output_error is not None]
    return sum(errors) / len(errors)


def refusal(model: PreTrainedModel, kv_budget: float = 0.5, **options: Any) -> str:
    """The message of a refusal, which is one line, and leaves the model as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(attnedit.UsageError) as caught:
        compile_tiny(model, kv_budget, **options)
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    return str(caught.value)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("result", [half, exact])
def test_a_result_is_refused(family: str, result: Any) -> None:
    message = refusal(result(family).model)
    assert "rewritten already" in message
    assert next(row.name for row in result(family).report.layers if row.kind == "mla") in message


def test_latent_attention_is_refused() -> None:
    message = refusal(build("deepseek_v3"))
    assert "all 2 attention sites (model.layers.0.self_attn and 1 more) are multi-head latent attention" in message


@pytest.mark.parametrize("family", UNSUPPORTED)
def test_unsupported_families_are_refused_by_site(family: str) -> None:
    message = refusal(build(family))
    assert re.search(r"(h|layers)\.0\.\w*att\w*", message)
    assert re.search(r"modeling_\w+\.py:\d+|more than once", message)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_budget": 0.0}, "above 0"),
        ({"kv_budget": -0.5}, "above 0"),
        ({"kv_budget": 1.01}, "at most 1"),
        ({"kv_budget": float("nan")}, "kv_budget must be above 0"),
        ({"target": "mlx"}, "no target 'mlx'; there is mla, gateswa"),
        ({"alternations": -1}, "alternations"),
        ({"kv_budget": "0.5"}, "kv_budget must be a number, got '0.5'"),
        ({"alternations": 1.5}, "alternations must be a whole number, got 1.5"),
        ({"calibration_tokens": "many"}, "calibration_tokens must be a whole number"),
        ({"target": "gateswa", "window": True}, "window must be a whole number, got True"),
        ({"seed": None, "window": "3"}, "window must be a whole number, got '3'"),
        ({"allocation": "best"}, "allocation must be one of auto, even, loss, got 'best'"),
        ({"allocation": "loss", "target": "gateswa"}, "not for gateswa"),
        ({"allocation": "loss", "profile": "deepseek_v3"}, "one size for all layers"),
        ({"calibration": torch.tensor([[5, 64]])}, "64"),
        ({"calibration": []}, "calibration"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(attnedit.UsageError, match=re.escape(words)):
        attnedit.compile(source("llama"), **options)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "smollm3", "qwen3_next"])
def test_a_budget_too_small_names_the_smallest_which_then_works(family: str) -> None:
    found = re.search(r"need (0\.\d+); ask for at least that", refusal(source(family), 1e-4))
    assert found
    smallest = float(found[1])
    assert found[1] in refusal(source(family), smallest - 1e-4)
    report = compile_tiny(source(family), smallest).report
    assert report.kv_budget_achieved <= smallest < report.kv_budget_achieved + 1e-4
    assert all(0 < (row.output_error or 0) < 1 for row in report.layers if row.kind == "mla")


def test_a_model_in_which_all_layers_slide_is_converted_with_its_window() -> None:
    result = half("mistral")
    assert [row.kind for row in result.report.layers] == ["mla", "mla"]
    assert result.report.notes == []
    reach = 2 * (4 - 1)  # tokens that one token reaches through two layers of window 4
    ids = tokens(1, 16)
    other = ids.clone()
    other[0, 2] = (other[0, 2] - 3 + 30) % 61 + 3
    mask = torch.ones_like(ids)
    for run in (logits, lambda *args: in_pieces(*args, [5, 1, 7, 3])[0]):
        change = (run(result.model, ids, mask) - run(result.model, other, mask)).abs().amax(-1)[0]
        assert change[:2].max() < 1e-4 * change[2]
        assert change[3 : 2 + reach + 1].min() > 1e-3
        assert change[2 + reach + 1 :].max() < 1e-5


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2"])
def test_layers_that_slide_among_others_stay(family: str) -> None:
    result, window = half(family), 4
    slides, full = result.report.layers
    assert (slides.kind, full.kind) == ("source", "mla")
    assert slides.values_before == slides.values_after == 32 * window / 128
    assert (slides.kv_lora_rank, slides.qk_rope_head_dim, slides.output_error) == (None, None, None)
    assert full.values_after == int(0.5 * (32 + 1) - 1)  # they count against the budget
    assert result.report.notes == ["1 layers already slide over a window and stay as they are"]
    kept = result.model.get_submodule(slides.name)
    assert type(kept) is type(source(family).get_submodule(slides.name))
    assert result.model.config.sliding_window == window


@pytest.mark.parametrize("target", ["mla", "gateswa+mla"])
def test_a_layer_that_costs_more_gets_more(target: str) -> None:
    windowed = target != "mla"
    set_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": 2 + windowed})).eval()
    with torch.no_grad():  # what the first layer's attention computes counts for little
        model.model.layers[0].self_attn.o_proj.weight.mul_(0.01)
    options: dict[str, Any] = {"calibration": tokens(4, 32)}
    options |= {"full_layers": [0, 1], "window": 4} if windowed else {"kv_budget": 0.5}
    even = attnedit.compile(model, target, **options)
    loss = attnedit.compile(model, target, allocation="loss", **options)
    first, second = loss.report.layers[:2]
    assert first.loss_increase is not None
    assert second.loss_increase is not None
    assert abs(first.loss_increase) < 0.1 * second.loss_increase
    assert [row.values_after for row in even.report.layers[:2]] == [16, 16]
    assert (first.values_after, second.values_after) == (10, 22)
    assert loss.report.kv_budget_achieved == even.report.kv_budget_achieved
    assert loss.report.recipe["allocation"] == "loss"
    ids = tokens(2, 20, seed=5)
    assert deviation(in_pieces(loss.model, ids, torch.ones_like(ids), [9, 1, 10])[0], logits(loss.model, ids)) < 1e-4


def test_the_measured_loss_is_that_of_the_layer_alone_on_windows_half_of_which_repeat_themselves() -> None:
    model, data = build("qwen3"), tokens(12, 24, seed=3)
    sites = capture(model)
    before = {site.layer_idx: float(source_values(site)) for site in sites}
    shapes = plan(sites, before, sites, 0.25, shape=shape_for)
    result = share_copy(model)
    target, claim = LatentTarget(), Claim(shapes)
    live = LiveSource(model, CompileOptions.of(calibration=data, seed=4))
    live.left, live.result = sites, result
    found = live.costs(target, claim, [data])
    graphs = {name: fit.graph for name, fit in live.layers(target.quick(), claim, [data[:8]])[0].items()}
    unseen = data[8:].clone()
    unseen[[1, 3]] = with_repeats(data[[9, 11]], torch.Generator().manual_seed(4))
    assert not torch.equal(unseen, data[8:])
    expected = logits(model, unseen).log_softmax(-1)
    for site in sites:
        alone = share_copy(model)
        splice(alone, {site.name: graphs[site.name]})
        mine = logits(alone, unseen).log_softmax(-1)
        divergence = (expected.exp() * (expected - mine)).sum(-1).mean()
        assert found[site.name] == pytest.approx(float(divergence), rel=1e-3)


def test_the_seed_decides_everything() -> None:
    results = [
        compile_tiny(source("llama"), 0.5, calibration=None, calibration_tokens=64, seed=seed) for seed in (0, 0, 1)
    ]
    assert same_weights(results[0].model, results[1].model)
    assert not same_weights(results[0].model, results[2].model)
    assert [result.report.calibration for result in results] == ["own samples"] * 3
    assert {result.report.calibration_tokens for result in results} == {64}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
@pytest.mark.parametrize("reference", [half, exact])
@pytest.mark.parametrize("device", [None, "cpu"])
def test_in_place_gives_the_same(family: str, reference: Any, device: str | None) -> None:
    model, expected = build(family), reference(family)
    found = compile_tiny(model, expected.report.kv_budget_asked, in_place=True, device=device)
    assert found.model is model
    assert type(model) is type(expected.model)
    assert same_weights(model, expected.model)
    assert torch.equal(logits(model, tokens(2, 9)), logits(expected.model, tokens(2, 9)))
    assert found.report.verification == expected.report.verification
    assert found.report.layers == expected.report.layers


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_training_mode_and_frozen_weights_stay(training: bool, in_place: bool) -> None:
    model = build("llama", attention_dropout=0.3).train(training)
    model.model.layers[0].mlp.train(not training)
    model.model.embed_tokens.requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    result = compile_tiny(model, 0.5, in_place=in_place).model
    for each in (model, result):
        assert {
            name: module.training for name, module in each.named_modules() if name in modes
        }.items() <= modes.items()
        assert {name for name, parameter in each.named_parameters() if not parameter.requires_grad} == frozen
    assert result.get_submodule("model.layers.1.self_attn.mla.kv_b_proj").training is training
    assert same_weights(result, half("llama").model)  # dropout played no part in the fit


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_oss"])
def test_alternations_pay(family: str) -> None:
    errors = [mean_error(compile_tiny(source(family), 0.4, alternations=count)) for count in (0, 1, 2)]
    assert errors[2] < errors[1] <= errors[0]


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "qwen3_next"])
def test_a_higher_budget_is_nearer_to_the_source(family: str) -> None:
    errors = [mean_error(compile_tiny(source(family), budget)) for budget in (0.25, 0.5, 0.75)]
    assert errors[0] > errors[1] > errors[2] > 0


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_latent_wider_than_what_the_source_computes_is_no_worse(family: str) -> None:
    """128 keys and values from 32 hidden states: most of a wide latent holds rounding, which must not be blown up."""
    model = build(family, head_dim=32)
    results = [compile_tiny(model, budget) for budget in (0.25, 0.5, 0.75)]
    errors = [mean_error(result) for result in results]
    assert errors[0] > errors[1] > 0.9 * errors[2]
    calibration = tokens(4, 32)
    for result, reported in zip(results, errors, strict=True):
        name = result.report.layers[0].name
        calls: list[Any] = []
        attention = model.get_submodule(name)
        handle = attention.register_forward_hook(lambda *call, calls=calls: calls.append(call), with_kwargs=True)
        logits(model, calibration)
        handle.remove()
        ((_, args, kwargs, expected),) = calls
        with torch.no_grad():
            found = result.model.get_submodule(name)(*args, **kwargs)[0]
        error = float((found - expected[0]).square().sum() / expected[0].square().sum())
        assert error == pytest.approx(result.report.layers[0].output_error, rel=0.1, abs=1e-6), reported


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "opt", "qwen3_next", "gpt_oss"])
def test_other_precisions(family: str) -> None:
    ids = tokens(2, 40)
    models = [build(family, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)]
    for model in models:  # some versions draw other weights in other dtypes
        model.load_state_dict(build(family).state_dict())
    if family not in ("qwen3_next", "gpt_oss"):  # torch has no grouped matrix product of float64 for their experts
        models.append(build(family).double())
    for model in models:
        full, part = (compile_tiny(model, budget) for budget in (1.0, 0.5))
        expected, tolerance = logits(model, ids), TOLERANCE[model.dtype]
        for result in (full, part):
            found = logits(result.model, ids)
            assert found.dtype == model.dtype
            assert found.isfinite().all()
            assert {parameter.dtype for parameter in result.model.parameters()} == {model.dtype}
            assert {check.tolerance for check in result.report.verification} == {tolerance}
        # Rounding sends single tokens to other experts, in the source too: look at the typical token.
        error = (logits(full.model, ids).double() - expected.double()).abs().amax(-1).median()
        assert error < tolerance / 2 * expected.double().abs().max()
        for row, reference in zip(part.report.layers, half(family).report.layers, strict=True):
            if row.kind == "mla":
                assert row.output_error == pytest.approx(reference.output_error, rel=0.1, abs=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "mistral", "glm4", "cohere2"])
def test_saved_and_loaded_is_the_same_to_the_bit(family: str, tmp_path: Path) -> None:
    result, ids = half(family), tokens(2, 19)
    result.save(tmp_path / "out")
    loaded = attnedit.load(tmp_path / "out")
    assert loaded.report == result.report
    for model in (loaded.model, AutoModelForCausalLM.from_pretrained(tmp_path / "out")):
        assert same_weights(model, result.model)
        assert torch.equal(logits(model, ids), logits(result.model, ids))


def test_a_hybrid_whose_layers_return_tuples_and_positions_start_at_zero_unless_told() -> None:
    config = BambaConfig(
        **SIZES,
        attn_layer_indices=[1],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
    )
    model = tiny_model(config)
    ids = tokens(2, 17)
    full = compile_tiny(model, 1.0)
    assert deviation(logits(full.model, ids), logits(model, ids)) < 1e-4
    part = compile_tiny(model, 0.5, calibration=None, calibration_tokens=96)
    assert [row.layer for row in part.report.layers] == [1]
    mask: Tensor = torch.ones_like(ids)
    found, _ = in_pieces(part.model, ids, mask, [9, *[1] * 8])
    assert deviation(found, logits(part.model, ids, mask)) < 1e-4


def test_a_cache_of_its_own_is_refused() -> None:
    config = MiniMaxConfig(**SIZES, head_dim=8, layer_types=["linear_attention", "full_attention"], num_local_experts=2)
    assert "MiniMaxForCausalLM does not work with a transformers DynamicCache" in refusal(tiny_model(config))


@pytest.mark.parametrize(
    ("model", "called"), [("Qwen/Qwen3-8B", "'Qwen/Qwen3-8B'"), (nn.Linear(2, 2), "a Linear")], ids=["name", "module"]
)
def test_what_is_no_model_is_refused(model: Any, called: str) -> None:
    said = f"expected a model of transformers, got {called}; load it with AutoModelForCausalLM first"
    with pytest.raises(attnedit.UsageError, match=said):
        attnedit.compile(model)
    with pytest.raises(attnedit.UsageError, match=said):
        attnedit.calibrate(half("llama"), model, distill_steps=1)


def test_calibrate_wants_a_result() -> None:
    model: Any = source("llama")
    with pytest.raises(attnedit.UsageError, match=r"attnedit\.compile or attnedit\.load returns, got LlamaForCausalLM"):
        attnedit.calibrate(model, model, distill_steps=1)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "gpu"}, "device 'gpu' is not usable here; give cpu"),
        ({"calibration": "notes.txt", "tokenizer": "gpt2"}, "tokenizer is only a name, 'gpt2'; load it with"),
    ],
    ids=["device", "tokenizer"],
)
def test_names_that_stand_for_nothing_are_refused(options: dict[str, Any], said: str) -> None:
    assert said in refusal(source("llama"), **options)

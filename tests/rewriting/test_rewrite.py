"""What is true of every rewrite: the worked examples, MLA and GateSWA go through the same invariants."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, deviation, in_pieces, logits, tokens
from examples import EXAMPLES, rewrite, rewritten, source
from families import FAMILIES as TABLE
from families import SUPPORTED, build
from torch import fx, nn
from transformers import AutoModelForCausalLM

import attnedit
from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.graph import provenance
from attnedit.targets.attention.rewritten.graph import KVCache
from attnedit.targets.runtime.eager.classes import source_sites
from attnedit.testing import check_decode, check_exact, check_saved

FAMILIES = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_oss"]
QUICK = [
    *(("llama", name) for name in EXAMPLES),
    ("gemma3_text", "HeadGate"),
    ("gpt_oss", "Int8Cache"),
    ("gpt2", "MultiQuery"),
]
CASES = [
    pytest.param(family, name, marks=[] if (family, name) in QUICK else [pytest.mark.long])
    for family in FAMILIES
    for name in EXAMPLES
]
OURS = [("llama", "mla"), ("llama", "gateswa")]


@functools.cache
def ours(family: str, target: str) -> attnedit.CompileResult:
    if target == "mla":
        return compile_tiny(source(family), 0.5)
    return attnedit.compile(source(family), target, window=8, full_layers="1,", calibration=tokens(4, 64))


def result_of(family: str, name: str) -> attnedit.CompileResult:
    return ours(family, name) if name in ("mla", "gateswa") else rewritten(family, name)


def graphs_of(result: attnedit.CompileResult) -> dict[str, fx.GraphModule]:
    record: Any = result.model.config
    found = {name: result.model.get_submodule(name) for name in record.attnedit["sites"]}
    assert all(isinstance(module, fx.GraphModule) for module in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_the_contract_holds_on_real_numbers(family: str, name: str) -> None:
    result, model = rewritten(family, name), source(family)
    ids = tokens(2, 20, seed=5)
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    contract = EXAMPLES[name]().contract
    found, expected = logits(result.model, ids, mask), logits(model, ids, mask)
    check = result.report.verification[0]
    assert check.contract == str(contract)
    assert check.error is not None
    check_decode(result, 0.1 if name == "Int8Cache" else 1e-5)
    if contract.kind == "exact":
        check_exact(result, model, 0.0)
        assert check.error == 0.0
        assert torch.equal(found[mask.bool()], expected[mask.bool()])
    if contract.kind == "close":
        assert 0 < check.error < contract.atol + contract.rtol
        assert deviation(found, expected, mask) < 0.1
    if contract.kind == "learned":
        assert all(row.output_error is not None and 0 < row.output_error < 1 for row in result.report.layers)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_it_generates_with_its_cache(family: str, name: str) -> None:
    model = rewritten(family, name).model
    ids = tokens(2, 18, seed=6)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    whole, _ = in_pieces(model, ids, mask, (18,))
    pieces, cache = in_pieces(model, ids, mask, (9, 1, 1, 4, 1, 2))
    written = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    if name == "Int8Cache":  # numbers near the middle of two steps may be rounded either way
        by_token = (pieces - whole).abs().amax(-1)[mask.bool()]
        assert by_token.quantile(0.75) < 0.05 * whole.abs().max()
    else:
        assert deviation(pieces, whole, mask) < 1e-5
        again = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(written, again)
    assert written.shape == (2, 24)
    heads = {layer.keys.shape[1] for layer in cache.layers}
    dtypes = {layer.keys.dtype for layer in cache.layers}
    assert heads == {1 if name == "MultiQuery" else TABLE[family].heads[1]}
    assert dtypes == {torch.int8 if name == "Int8Cache" else torch.float32}


@pytest.mark.parametrize(("family", "name"), [*CASES, *OURS])
def test_graphs_lint_and_every_new_node_has_provenance(family: str, name: str) -> None:
    result = result_of(family, name)
    rule = {"mla": "attnedit.mla", "gateswa": "attnedit.gateswa"}.get(name, "")
    rule = rule or EXAMPLES[name]()().identity
    sites = source_sites(result.model)
    for place, module in graphs_of(result).items():
        module.graph.lint()
        before = {node.name for node in graph_module(source(family), sites[place]).graph.nodes}
        fresh = [node for node in module.graph.nodes if node.name not in before]
        assert fresh
        assert all(provenance.rules(node) & {rule, "attnedit.lower"} for node in fresh)
        assert any(rule in provenance.rules(node) for node in fresh)
        assert all(node.meta.get("stack_trace") for node in fresh)
        used = {str(n.target).split(".")[0] for n in module.graph.nodes if n.op in ("call_module", "get_attr")}
        assert {key.split(".")[0] for key in module.state_dict()} <= used


@pytest.mark.parametrize(("family", "name"), [*CASES, *OURS])
def test_the_rest_of_the_model_is_bit_identical_and_shared(family: str, name: str) -> None:
    result, theirs = result_of(family, name), source(family).state_dict(keep_vars=True)
    inside = tuple(f"{place}." for place in graphs_of(result))
    outside = {
        key: value for key, value in result.model.state_dict(keep_vars=True).items() if not key.startswith(inside)
    }
    assert {key for key in theirs if not key.startswith(inside)} == set(outside)
    assert all(value.data_ptr() == theirs[key].data_ptr() for key, value in outside.items())


@pytest.mark.parametrize(("family", "name"), [("llama", "HeadGate"), ("gpt_oss", "Int8Cache"), ("llama", "MultiQuery")])
def test_round_trips(family: str, name: str, tmp_path: Path) -> None:
    model, ids = rewritten(family, name).model, tokens(2, 9)
    expected = logits(model, ids)
    loaded = check_saved(rewritten(family, name), tmp_path / "out")
    by_class = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    fresh: Any = type(model)(model.config).eval()
    fresh.load_state_dict(model.state_dict())
    for other in (by_class, fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
    assert type(loaded.model) is type(by_class)


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_second_application_changes_nothing(name: str) -> None:
    result = rewritten("llama", name)
    again = attnedit.rewrite(result.model, EXAMPLES[name]()(), partial=True, calibration=tokens(4, 32))
    assert (again.report.sites_rewritten, again.report.rules[0].rewritten) == (0, 0)
    assert again.report.rules[0].nearest_miss
    assert again.model.config.attnedit == result.model.config.attnedit
    ids = tokens(2, 9)
    assert torch.equal(logits(again.model, ids), logits(result.model, ids))
    with pytest.raises(attnedit.CaptureError, match="2 of 2 attention sites match no rewrite"):
        attnedit.rewrite(result.model, EXAMPLES[name]()(), calibration=tokens(4, 32))


def test_rewrites_compose_at_once_and_one_after_the_other() -> None:
    ids = tokens(2, 9)
    both = [EXAMPLES["HeadGate"]()(), EXAMPLES["Int8Cache"]()()]
    at_once = rewrite(source("llama"), both)
    later = attnedit.rewrite(rewritten("llama", "HeadGate").model, both[1])
    assert at_once.model.config.attnedit == later.model.config.attnedit
    assert torch.equal(logits(at_once.model, ids), logits(later.model, ids))
    assert [row.kind for row in at_once.report.layers] == ["HeadGate+Int8Cache"] * 2
    assert [(rule.name, rule.matched, rule.rewritten) for rule in at_once.report.rules] == [
        ("HeadGate", 2, 2),
        ("Int8Cache", 2, 2),
    ]


def test_counts_and_errors_are_those_of_the_sites() -> None:
    report = rewritten("llama", "MultiQuery").report
    assert (report.sites_matched, report.sites_rewritten, len(report.rules)) == (2, 2, 1)
    rule = report.rules[0]
    assert (rule.name, rule.contract, rule.matched, rule.rewritten, rule.rejected) == (
        "MultiQuery",
        "learned",
        2,
        2,
        {},
    )
    assert rule.place.startswith("multi_query.py:")
    assert rule.seconds > 0
    assert report.to_dict()["rules"][0]["name"] == "MultiQuery"
    assert "MultiQuery (multi_query.py:" in str(report)
    assert [(row.values_before, row.values_after) for row in report.layers] == [(32, 16)] * 2


def test_least_squares_repairs_some_of_what_pooling_breaks() -> None:
    repaired: Any = EXAMPLES["MultiQuery"]()

    class Plain(repaired):
        fit = None

    plain = rewrite(source("llama"), Plain()).report.layers
    for one, other in zip(rewritten("llama", "MultiQuery").report.layers, plain, strict=True):
        assert one.output_error is not None
        assert other.output_error is not None
        assert one.output_error < other.output_error


def test_rewrites_go_through_the_pipeline_of_targets() -> None:
    report = attnedit.rewrite(source("llama"), EXAMPLES["MultiQuery"]()(), calibration=tokens(2, 64)).report
    assert [entry.name for entry in report.pipeline] == [
        "load",
        "capture",
        "data",
        "rewrite",
        "reference",
        "lower",
        "verify",
    ]
    assert report.calibration_length == 64
    assert report.calibration_windows == "2 x 64"
    assert report.kv_curve is not None
    assert report.kv_curve.after[-1] / report.kv_curve.before[-1] == pytest.approx(report.kv_budget_achieved)
    assert report.kv_budget_achieved < 1
    assert [graphs.layers for graphs in report.graphs] == [[0, 1]]
    assert "multiquery" in report.to_html().lower()
    with pytest.raises(attnedit.UsageError, match="calibration_length is for the targets"):
        attnedit.rewrite(source("llama"), EXAMPLES["MultiQuery"]()(), calibration_length=64)


def test_it_rejects_when_it_should() -> None:
    with pytest.raises(attnedit.CaptureError, match="matched, but its output is gated already"):
        rewrite(source("qwen3_next"), EXAMPLES["HeadGate"]()())
    one_head = build("llama", num_key_value_heads=1)
    with pytest.raises(attnedit.CaptureError, match="matched, but it has one key/value head"):
        rewrite(one_head, EXAMPLES["MultiQuery"]()())
    with pytest.raises(attnedit.UsageError, match="no longer ordinary attention"):
        attnedit.rewrite(ours("llama", "mla").model, EXAMPLES["HeadGate"]()())
    with pytest.raises(attnedit.UsageError, match="rewritten already"):
        attnedit.compile(rewritten("llama", "HeadGate").model)


def test_what_is_no_model_is_refused() -> None:
    name: Any = "Qwen/Qwen3-8B"
    with pytest.raises(attnedit.UsageError, match="expected a model of transformers, got 'Qwen/Qwen3-8B'"):
        attnedit.rewrite(name, EXAMPLES["HeadGate"]()())


def test_the_source_is_left_as_it_was() -> None:
    model = build("llama").train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = rewrite(model, EXAMPLES["MultiQuery"]()())
    assert model.training
    assert result.model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(isinstance(module, KVCache) for module in model.modules())


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("HeadGate", torch.bfloat16),
        pytest.param("HeadGate", torch.float64, marks=pytest.mark.long),
        pytest.param("MultiQuery", torch.bfloat16, marks=pytest.mark.long),
        pytest.param("Int8Cache", torch.float16, marks=pytest.mark.long),
    ],
)
def test_other_dtypes(name: str, dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    result = rewrite(model, EXAMPLES[name]()())
    assert {p.dtype for p in result.model.parameters()} == {dtype}
    assert result.model.generate(tokens(1, 5), max_new_tokens=4).shape == (1, 9)


def test_gradients_reach_new_parts_and_training_heals() -> None:
    result = rewrite(source("llama"), EXAMPLES["MultiQuery"]()())
    result.model(tokens(2, 9), labels=tokens(2, 9)).loss.backward()
    output = result.model.get_submodule("model.layers.0.self_attn").get_parameter("output")
    assert output.grad is not None
    assert output.grad.abs().max() > 0
    trained = attnedit.calibrate(
        result,
        source("llama"),
        fit_steps=30,
        fit_learning_rate=1e-2,
        calibration=tokens(8, 16),
        seq_len=16,
        batch_size=2,
    )
    assert trained.report.stages[0].best < trained.report.stages[0].before


def test_the_graph_shows_the_anchor_again() -> None:
    targets = [str(node.target) for node in rewritten("llama", "HeadGate").graph.graph.nodes]
    assert targets.count("attnedit.attention.default") == 2
    assert targets.count("aten.sigmoid.default") == 2


def test_the_examples_are_short() -> None:
    for load in EXAMPLES.values():
        module = inspect.getmodule(load())
        assert module is not None
        assert len([line for line in inspect.getsource(module).splitlines() if line.strip()]) < 40


def test_attention_by_hand_sees_any_mask() -> None:
    class ByHand(attnedit.Rewrite):
        contract = attnedit.close(1e-5, 1e-5)

        def pattern(self, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any, mask: Any, scale: Any) -> Any:
            return attnedit.attention(query_BHTd, key_BGTd, value_BGTv, mask, scale=scale, softcap=None, sinks=None)

        def replacement(
            self, match: attnedit.Match, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any, mask: Any, scale: Any
        ) -> Any:
            keys, values = attnedit.cache(key_BGTd, value_BGTv)
            share = match.site.num_attention_heads // match.site.num_key_value_heads
            logits_BHTS = query_BHTd @ keys.repeat_interleave(share, 1).mT * scale + mask
            return (logits_BHTS.softmax(-1) @ values.repeat_interleave(share, 1)).transpose(1, 2)

    ids = tokens(2, 18, seed=6)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    for family in ("llama", "mistral"):
        result = rewrite(source(family), ByHand())
        assert deviation(logits(result.model, ids, mask), logits(source(family), ids, mask), mask) < 1e-5
        assert deviation(logits(result.model, ids), logits(source(family), ids)) < 1e-5
        assert (
            deviation(in_pieces(result.model, ids, mask, (9, 1, 4, 4))[0], logits(result.model, ids, mask), mask) < 1e-5
        )
    assert isinstance(result.model, nn.Module)


@pytest.mark.long
def test_onnx_takes_rewritten_attention(tmp_path: Path) -> None:
    manifest = rewritten("llama", "MultiQuery").export("onnx", tmp_path / "onnx")
    assert max(check["deviation"] for check in manifest.checks) < 1e-4


def test_exports_say_what_they_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(attnedit.UsageError, match="layer 0 of AttneditLlamaForCausalLM caches int8"):
        rewritten("llama", "Int8Cache").export("onnx", tmp_path / "int8")
    with pytest.raises(
        attnedit.UsageError, match="was rewritten by head_gate:HeadGate, which no class of transformers"
    ):
        rewritten("llama", "HeadGate").export("hf", tmp_path / "hf", profile="remote")


@pytest.mark.long
@pytest.mark.parametrize("family", [name for name in SUPPORTED if not (TABLE[name].mla or TABLE[name].gate)])
def test_a_gate_of_one_changes_no_bit_in_any_family(family: str) -> None:
    """Nothing but attention in its own graph, with the model's cache and attention implementation."""
    result, model = rewrite(source(family), EXAMPLES["HeadGate"]()()), source(family)
    ids = tokens(2, 18, seed=6)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    found, expected = logits(result.model, ids, mask), logits(model, ids, mask)
    # Families that write their attention out round in other places.
    assert torch.equal(found, expected) if TABLE[family].interface else deviation(found, expected, mask) < 1e-5
    options: Any = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(result.model.generate(ids, **options), model.generate(ids, **options))

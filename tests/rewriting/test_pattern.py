"""What patterns match, how a miss explains itself, and what the author of a wrong rewrite is told."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from compiled import _remembered, deviation, logits, tokens
from examples import rewrite, source
from torch import nn
from torch.nn import functional

import attnedit
from attnedit import Match, Rewrite, RewriteError, attention, cache, exact
from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.rope import rotate, rotated
from attnedit.compiler.rewriting.pattern import Binding, Miss, Pattern


@functools.cache
def site(family: str) -> Any:
    return _remembered(source(family))[0]


def find(function: Any, family: str = "llama") -> list[Binding | Miss]:
    root = graph_module(source(family), site(family))
    pattern = Pattern.of(function, site(family))
    return list(pattern.find(root)) or [pattern.absent()]


def bindings(function: Any, family: str = "llama") -> list[Binding]:
    return [found for found in find(function, family) if isinstance(found, Binding)]


def nearest(function: Any, family: str = "llama") -> str:
    misses = [found for found in find(function, family) if isinstance(found, Miss)]
    best = max(misses, key=lambda miss: miss.matched)
    assert not best
    return best.reason


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2", "gpt_oss", "phi3", "cohere"])
def test_attention_matches_once_in_every_family(family: str) -> None:
    (found,) = bindings(lambda query_BHTd, key_BGTd, value_BGTv: attention(query_BHTd, key_BGTd, value_BGTv), family)
    assert found.anchor is found.outputs[0]
    assert [getattr(found.captures[name], "op", None) for name in found.captures] == ["call_function"] * 3


def test_settings_can_be_captured_given_or_left_open() -> None:
    def capped(query_BHTd: Any, key_BGTd: Any, value_BGTv: Any, softcap: Any, scale: Any, mask: Any) -> Any:
        return attention(query_BHTd, key_BGTd, value_BGTv, mask, softcap=softcap, scale=scale)

    (found,) = bindings(capped, "gemma2")
    assert (found.captures["softcap"], found.captures["scale"]) == (50.0, 0.25)
    assert str(found.captures["mask"]) == "attention_mask"
    (found,) = bindings(capped)
    assert found.captures["softcap"] is None

    def uncapped(query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return attention(query_BHTd, key_BGTd, value_BGTv, softcap=None)

    assert len(bindings(uncapped)) == 1
    assert bindings(uncapped, "gemma2") == []
    assert "has 50.0 where the pattern has None" in nearest(uncapped, "gemma2")


def test_spelling_does_not_matter() -> None:
    def heads(hidden_BTD: Any, weight_OD: Any) -> Any:
        projected = functional.linear(hidden_BTD, weight_OD)
        batch, length, width = projected.shape
        return projected.view(batch, length, 4, 8).permute(0, 2, 1, 3) if width < 0 else projected

    # The value projections of llama: query 32 x 32, key and value 16 x 32.
    found = bindings(heads)
    assert [str(one.captures["weight_OD"]) for one in found] == [
        f"Weight(name='{name}_proj.weight')" for name in "qkv"
    ] + ["Weight(name='o_proj.weight')"]

    def rotation(x_BHTd: Any, cos_BTr: Any, sin_BTr: Any) -> Any:
        half = x_BHTd.shape[-1] // 2
        turned = torch.cat((-x_BHTd[..., half:], x_BHTd[..., :half]), dim=3)
        return turned * sin_BTr[:, None] + cos_BTr.unsqueeze(1) * x_BHTd  # summands and factors change places

    (query,) = bindings(rotation)
    assert str(query.captures["x_BHTd"]) == site("llama").query
    assert str(query.captures["cos_BTr"]) == site("llama").rope.cos


def test_the_same_capture_twice_is_the_same_value() -> None:
    def square(x_BHTd: Any) -> Any:
        return x_BHTd * x_BHTd

    assert bindings(square) == []
    assert "the pattern has x_BHTd twice" in nearest(square)


class Doubled(Rewrite):
    """Queries times twice the cosines (and sines), which the keys use too."""

    def pattern(self, x_BHTd: Any, cos_BTr: Any) -> Any:
        return x_BHTd * cos_BTr.unsqueeze(1)

    def replacement(self, match: Match, x_BHTd: Any, cos_BTr: Any) -> Any:
        return x_BHTd * (2 * cos_BTr[:, None])


def test_a_value_used_outside_is_not_taken_away() -> None:
    result = rewrite(source("llama"), [Doubled()])
    rule = result.report.rules[0]
    assert (rule.matched, rule.rewritten) == (4, 4)  # in each layer the cosines and the sines
    names = [str(node.target) for node in result.model.get_submodule("model.layers.0.self_attn").graph.nodes]  # type: ignore[union-attr]
    assert names.count("aten.unsqueeze.default") == 4


def test_attention_used_outside_is_not_doubled() -> None:
    def gated(query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return attention(query_BHTd, key_BGTd, value_BGTv).sigmoid()

    root = graph_module(source("llama"), site("llama"))
    anchor = next(node for node in root.graph.nodes if node.name == site("llama").anchor)
    with root.graph.inserting_after(anchor):
        gate = root.graph.call_function(torch.ops.aten.sigmoid.default, (anchor,))
    gate.meta.update(anchor.meta)
    (found,) = Pattern.of(gated, site("llama")).find(root)
    assert isinstance(found, Miss)
    assert "its value is also used by node view" in found.reason
    with pytest.raises(RewriteError, match=r"parameter softcap is no capture"):
        find(lambda x_BTD, softcap=None: x_BTD)


def test_a_miss_names_node_source_line_and_what_was_expected() -> None:
    def normalised(query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return attention(torch.tanh(query_BHTd), key_BGTd, value_BGTv)

    reason = nearest(normalised)
    assert "modeling_llama.py:" in reason
    assert "is aten.add.Tensor, the pattern expects aten.tanh.default (test_pattern.py:" in reason

    def wide(query_BHTD: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return attention(query_BHTD, key_BGTd, value_BGTv)

    assert "has shape [B, 4, T, 8], which is not query_BHTD: [B, 4, T, 32]" in nearest(wide)
    assert "no node is aten.erf.default" in nearest(lambda x_BTD: torch.erf(x_BTD))


@pytest.mark.parametrize("family", ["llama", "cohere", "phi", "glm4"])
def test_rotated_is_rotate(family: str) -> None:
    rope = _remembered(source(family))[0].rope
    assert rope is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 5, site(family).head_dim, generator=generator, dtype=torch.float64)
    columns = 1 + max((*rope.columns, *rope.imaginary_columns))
    cos, sin = torch.randn(2, 2, 5, columns, generator=generator, dtype=torch.float64)
    expected = rotate(x, cos[:, None], sin[:, None], rope)
    assert torch.allclose(rotated(x, cos, sin, rope), expected, rtol=0, atol=1e-12)


class Same(Rewrite):
    contract = attnedit.exact

    def pattern(self, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return attention(query_BHTd, key_BGTd, value_BGTv)

    def replacement(self, match: Match, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return attention(query_BHTd, key_BGTd, value_BGTv)


def replaced_by(function: Any, **members: Any) -> Rewrite:
    def replacement(self: Any, match: Match, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
        return function(match, query_BHTd, key_BGTd, value_BGTv)

    made: Rewrite = type("Wrong", (Same,), {"replacement": replacement, "__module__": __name__, **members})()
    return made


def test_facts_can_be_read_and_rotated() -> None:
    class Again(Same):
        contract = attnedit.close(atol=1e-6, rtol=0)

        def replacement(self, match: Match, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
            return attention(match.rotate(match.query), match.rotate(match.key), match.value)

    for family in ("llama", "cohere", "phi"):
        result = rewrite(source(family), Again())
        ids = tokens(2, 12)
        assert deviation(logits(result.model, ids), logits(source(family), ids)) < 1e-5


def test_weights_can_be_captured_and_replaced() -> None:
    @dataclasses.dataclass
    class LowRank(Rewrite):
        """Every square projection as a product of two."""

        rank: int = 32
        contract = attnedit.close(atol=1e-5, rtol=0)

        def pattern(self, x_BTD: Any, weight_DD: Any) -> Any:
            return functional.linear(x_BTD, weight_DD)

        def parts(self, match: Match) -> Any:
            size = match.hidden_size
            name = str(match.captures["weight_DD"].name).partition(".")[0]  # type: ignore[union-attr]
            return {f"{name}_down": nn.Linear(size, self.rank, False), f"{name}_up": nn.Linear(self.rank, size, False)}

        def initialise(self, match: Match) -> None:
            left, values, right = torch.linalg.svd(match.weight("weight_DD"), full_matrices=False)
            (_, down), (_, up) = match.new.named_children()
            down.weight.copy_(right[: self.rank])
            up.weight.copy_(left[:, : self.rank] * values[: self.rank])

        def replacement(self, match: Match, x_BTD: Any, weight_DD: Any) -> Any:
            (_, down), (_, up) = match.new.named_children()
            return up(down(x_BTD))

    result = rewrite(source("llama"), LowRank())
    assert (result.report.rules[0].matched, result.report.rules[0].rewritten) == (4, 4)
    module = result.model.get_submodule("model.layers.0.self_attn")
    assert "q_proj.weight" not in module.state_dict()
    assert {"q_proj_down.weight", "o_proj_up.weight", "k_proj.weight"} <= module.state_dict().keys()
    with pytest.raises(attnedit.VerificationError, match=r"promises close\(atol=1e-05, rtol=0\) and breaks it at"):
        rewrite(source("llama"), LowRank(rank=4))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            lambda m, q, k, v: attention(q, k, v).transpose(1, 2),
            r"returns \[B, 4, T, 8\]; the value of .* is \[B, T, 4",
        ),
        (lambda m, q, k, v: attention(q, k, v).float(), r"returns float32 where the model's dtype is expected"),
        (lambda m, q, k, v: None, "returns NoneType; expected a tensor"),
        (lambda m, q, k, v: (attention(q, k, v), q), "returns 2 tensors, the pattern 1"),
        (lambda m, q, k, v: attention(q, k, v) if q.sum() > 0 else q, "test_pattern.py:"),
        (lambda m, q, k, v: attention(q, k, v) * (1 if q.shape[2] == 11 else 2), "takes dim 2 of query_BHTd to be 11"),
        (lambda m, q, k, v: attention(q, k, v) * (1 if q.shape[2] > 4 else 2), "takes dim 2 of .* to be at least 5"),
        (lambda m, q, k, v: m.nonsense, r"test_pattern.py:\d+\): AttributeError: .*nonsense"),
        (lambda m, q, k, v: attention(q, k, attention(q, k, v).transpose(1, 2)), "2 of attention.. and none of cache"),
        (lambda m, q, k, v: (k.mean(2, keepdim=True) + q * 0).transpose(1, 2), "has mask=attention_mask, which"),
        (lambda m, q, k, v: attention(q, *cache(*cache(k, v))), "2 calls of cache"),
        (lambda m, q, k, v: attention(q, k, v) * 2, "promises exact and breaks it at"),
    ],
)
def test_the_author_of_a_wrong_replacement_is_told_what_and_where(wrong: Any, words: str) -> None:
    with pytest.raises((RewriteError, attnedit.VerificationError), match=words) as caught:
        rewrite(build_many_heads(), replaced_by(wrong, contract=attnedit.learned if "of attention" in words else exact))
    assert "\n" not in str(caught.value)
    assert "Wrong" in str(caught.value) or "replacement (test_pattern.py:" in str(caught.value)


@functools.cache
def build_many_heads() -> Any:
    """As many key/value heads as heads, so that shapes alone decide."""
    from families import build

    return build("llama", num_key_value_heads=4)


def test_a_setting_let_through_must_be_carried_over() -> None:
    wrong = replaced_by(lambda m, q, k, v: (v.repeat_interleave(2, 1) + q * 0).transpose(1, 2))
    with pytest.raises(RewriteError, match=r"the matched attention has softcap=50.0, which the pattern leaves open"):
        rewrite(source("gemma2"), wrong)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"pattern": lambda self, query, key: query}, "capture 'query' does not say its shape"),
        ({"pattern": lambda self, x_BTD, *rest: x_BTD}, "parameter rest is no capture"),
        ({"pattern": lambda self, x_BTq: x_BTq + 1}, "this site has no size 'q'"),
        ({"pattern": lambda self, x_BTD: x_BTD}, "returns its capture x_BTD as it came"),
        ({"pattern": None}, r"Wrong has no pattern\(\)"),
        ({"contract": "exact"}, r"expected exact, learned or close\(atol, rtol\)"),
        ({"check": lambda self, match: False}, r"returns False; expected None, or Reject"),
        (
            {"check": lambda self, match: 1 / 0},
            r"Wrong.check \(test_pattern.py:\d+\) at model.layers.0.self_attn: ZeroDiv",
        ),
        ({"parts": lambda self, match: {"q_proj": nn.Linear(2, 2)}}, "'q_proj' is taken in model.layers.0.self_attn"),
        ({"parts": lambda self, match: {"x": 3}}, "x is a int; expected a module, a parameter or a tensor"),
        (
            {"replacement": lambda self, match, query_BHTd: query_BHTd},
            r"takes \(match, query_BHTd\); expected match, then",
        ),
        ({"__init__": lambda self: None}, "make it a dataclass"),
        ({"fit": lambda self, match, batches: next(batches).nothing}, r"Wrong.fit \(test_pattern.py:\d+\) at model.la"),
    ],
)
def test_the_author_of_a_wrong_rewrite_is_told_what_and_where(members: dict[str, Any], words: str) -> None:
    wrong = type("Wrong", (Same,), {"__module__": __name__, **members})
    with pytest.raises(RewriteError, match=words) as caught:
        rewrite(source("llama"), wrong())
    assert "\n" not in str(caught.value)


def test_a_class_is_no_rewrite_and_options_are_json() -> None:
    with pytest.raises(RewriteError, match="Same is a class; make an instance"):
        rewrite(source("llama"), [Same])

    @dataclasses.dataclass
    class Odd(Same):
        size: Any = torch.float32

    with pytest.raises(RewriteError, match=r"Odd.size is torch.float32; options must be JSON values"):
        rewrite(source("llama"), Odd())
    with pytest.raises(attnedit.UsageError, match="no rewrites are given"):
        rewrite(source("llama"), [])
    with pytest.raises(RewriteError, match="outside a pattern"):
        attention(torch.ones(1), torch.ones(1), torch.ones(1))


def test_numbers_that_are_not_finite_are_refused() -> None:
    def fit(self: Any, match: Match, batches: Any) -> None:
        match.new.factor.fill_(float("nan"))

    wrong = replaced_by(
        lambda m, q, k, v: attention(q, k, v) * m.new.factor,
        parts=lambda self, match: {"factor": nn.Parameter(torch.ones(()))},
        fit=fit,
    )
    with pytest.raises(RewriteError, match=r"leaves numbers in factor at model.layers.0.self_attn that are not finite"):
        rewrite(source("llama"), wrong)

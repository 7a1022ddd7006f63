"""Rotary facts: what was measured reproduces the source's own rotation, and what is no rotation is refused."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, SUPPORTED, build, shared
from gateswa_models import sites
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.rope import Rotation, live_angles, measure, rope_angles, rotate
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.dataflow import Evaluator, anchors

ROTARY = [name for name in SUPPORTED if any(FAMILIES[name].rotary_dims)]


@pytest.mark.parametrize("name", ROTARY)
def test_pairs_and_columns_reproduce_the_rotation_of_the_source(name: str) -> None:
    """Live cos and sin through the graph's own ops, and through the facts, in float64."""
    model = shared(name)
    for site in sites(name):
        if site.rope is None:
            continue
        cos, sin = live_angles(model, site, torch.arange(6))
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(1, site.num_key_value_heads, 6, site.head_dim, dtype=torch.float64, generator=generator)
        given_values = {
            site.node(site.key): key,
            site.node(site.hidden): torch.zeros(1, 6, model.config.hidden_size, dtype=torch.float64),
            site.node(site.rope.cos): cos[None],
            site.node(site.rope.sin): sin[None],
        }
        after = anchors(site.graph)[0].args[1]
        assert isinstance(after, fx.Node)
        found = Evaluator(model.get_submodule(site.name), {}).run([after], given_values)[0]
        torch.testing.assert_close(found, rotate(key, cos, sin, site.rope), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ROTARY)
def test_angles_are_those_of_the_live_model(name: str) -> None:
    model = shared(name)
    for site in sites(name):
        measured = rope_angles(model, site)
        if site.rope is None:
            assert measured is None
            continue
        assert measured is not None
        inv_freq, scaling = measured
        tables = live_angles(model, site, torch.tensor([0, 5]))
        cos, sin = sorted(tables, key=lambda table: -float(table[0].abs().max()))  # some models return the sine first
        columns = list(site.rope.columns)
        torch.testing.assert_close(cos[1, columns], scaling * torch.cos(5 * inv_freq), rtol=0, atol=1e-6)
        torch.testing.assert_close(sin[1, columns], scaling * torch.sin(5 * inv_freq), rtol=0, atol=1e-6)


def test_attention_scaling_and_local_bases_are_measured() -> None:
    yarn = rope_angles(shared("gpt_oss"), sites("gpt_oss")[0])
    assert yarn is not None
    assert yarn[1] == pytest.approx(0.1 * torch.log(torch.tensor(4.0)).item() + 1.0, rel=1e-6)
    local, full = (rope_angles(shared("gemma3_text"), site) for site in sites("gemma3_text"))
    assert local is not None
    assert full is not None
    assert not torch.equal(local[0], full[0])


class _Scaled(nn.Module):
    """A rotary embedding on chosen pairs of dims, as a graph of its own."""

    def __init__(self, dims: int, pairs: list[tuple[int, int]], factor: float, clip: float | None) -> None:
        super().__init__()
        self.dims, self.factor, self.clip = dims, factor, clip
        self.real = [a for a, _ in pairs]
        self.imaginary = [b for _, b in pairs]

    def forward(self, hidden: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        parts = list(key.unbind(-1))
        cosines, sines = cos[:, None].unbind(-1), sin[:, None].unbind(-1)
        for column, (a, b) in enumerate(zip(self.real, self.imaginary, strict=True)):
            x, y = parts[a], parts[b]
            parts[a] = x * cosines[column] - y * sines[column]
            parts[b] = y * cosines[column] + x * sines[column]
        result = torch.stack(parts, dim=-1) * self.factor
        return result if self.clip is None else result.clamp(-self.clip, self.clip)


def probe(module: nn.Module, dims: int, columns: int) -> Rotation:
    values = (torch.zeros(2, 5, 3), torch.zeros(2, 2, 5, dims), torch.zeros(2, 5, columns), torch.zeros(2, 5, columns))
    dynamic = tuple({0: torch.export.Dim.AUTO, 2 if v.dim() == 4 else 1: torch.export.Dim.AUTO} for v in values)
    program = torch.export.export(module, values, dynamic_shapes=dynamic)
    graph = program.graph
    hidden, key = [n for n in graph.nodes if n.op == "placeholder"][:2]
    output = next(n for n in graph.nodes if n.op == "output").args[0][0]
    return measure(Evaluator(module, {}), hidden, key, output)


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A head size and disjoint pairs: half, interleaved, or any, over all dims or some."""
    count = draw(st.integers(1, 3))
    dims = 2 * count + draw(st.integers(0, 3))
    style = draw(st.sampled_from(["half", "interleaved", "any"]))
    if style == "half":
        return dims, [(i, i + count) for i in range(count)]
    if style == "interleaved":
        return dims, [(2 * i, 2 * i + 1) for i in range(count)]
    order = draw(st.permutations(range(dims)))
    return dims, sorted((order[2 * i], order[2 * i + 1]) for i in range(count))


@settings(max_examples=12, deadline=None)
@given(layout=layouts(), factor=st.sampled_from([1.0, 0.5, 3.0]))
def test_any_layout_of_pairs_is_read_back(layout: tuple[int, list[tuple[int, int]]], factor: float) -> None:
    dims, pairs = layout
    found = probe(_Scaled(dims, pairs, factor, None), dims, len(pairs))
    assert list(found.pairs) == pairs
    assert list(found.columns) == list(found.imaginary_columns) == list(range(len(pairs)))
    assert found.scale == factor
    assert (found.cos.name, found.sin.name) == ("cos", "sin")


def test_clipping_after_rope_is_refused() -> None:
    with pytest.raises(CaptureError, match="not a rotary embedding of key"):
        probe(_Scaled(4, [(0, 2), (1, 3)], 1.0, 10.0), 4, 2)


class _NoRotation(nn.Module):
    def forward(self, hidden: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return key * (cos + sin)[:, None]


def test_a_product_that_is_no_rotation_is_refused() -> None:
    with pytest.raises(CaptureError, match="node mul"):
        probe(_NoRotation(), 4, 4)


def test_rope_of_a_reloaded_dtype_is_the_same() -> None:
    half, full = capture(build("qwen3", dtype=torch.bfloat16))[0], sites("qwen3")[0]
    assert half.rope == full.rope
    assert half.structure == full.structure

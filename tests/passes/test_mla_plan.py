"""From budget to shapes, and what the pass takes from a live model."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from families import build
from hypothesis import given, settings
from hypothesis import strategies as st

from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.graph.surgery import cut
from attnedit.passes.budget import EXPONENT, allocate, by_loss, least_values, plan, source_values
from attnedit.passes.mla.fit import exact_factors, kv_as_affine
from attnedit.passes.mla.shapes import Shape, exact_shape, shape_for
from attnedit.passes.mla.weights import output_error
from attnedit.passes.site_sample import output_weight, take_samples

LINEAR = ["llama", "qwen2", "granite", "phi3", "gpt2", "gpt_neox", "starcoder2"]


@pytest.fixture(scope="module")
def sites() -> list[AttentionSite]:
    return capture(build("llama"))


@settings(deadline=None)
@given(
    budget=st.floats(0.02, 1.0),
    layers=st.integers(1, 40),
    kept=st.integers(0, 3),
    losses=st.none() | st.lists(st.floats(-1e-3, 2.0), min_size=43, max_size=43),
)
def test_the_budget_is_met_to_one_value(
    sites: list[AttentionSite], budget: float, layers: int, kept: int, losses: list[float] | None
) -> None:
    every = [dataclasses.replace(sites[0], name=f"layers.{i}", layer_idx=i) for i in range(layers + kept)]
    width = source_values(sites[0])
    before = {i: float(width) for i in range(layers + kept)}
    total = budget * width * len(every)
    costs = losses and {site.name: losses[site.layer_idx] for site in every[kept:]}
    try:
        shapes = plan(every, before, every[kept:], budget, losses=costs, shape=shape_for)
    except UsageError as error:
        assert total < kept * width + layers * least_values(sites[0])
        found = re.search(r"need ([0-9.]+)", str(error))
        assert found
        smallest = float(found[1])
        assert smallest > budget
        shapes = plan(every, before, every[kept:], smallest, losses=costs, shape=shape_for)
        total = smallest * width * len(every)
    used = kept * width + sum(shape.values for shape in shapes.values())
    assert used <= total + 1e-6
    # rounding is carried on, but a layer holds no more than the source's
    assert total - used < 1 + 1e-6 or all(shape.exact for shape in shapes.values())


def objective(losses: list[float], values: Iterable[float], even: float) -> float:
    return sum(loss * (value / even) ** -EXPONENT for loss, value in zip(losses, values, strict=True))


@settings(deadline=None)
@given(losses=st.lists(st.floats(1e-4, 1.0), min_size=2, max_size=4))
def test_no_shares_of_whole_steps_cost_less(sites: list[AttentionSite], losses: list[float]) -> None:
    every = [dataclasses.replace(sites[0], name=str(i), layer_idx=i) for i in range(len(losses))]
    even = 12.0  # a step is 2 values; a layer gets 8 to 24
    names = [site.name for site in every]
    found = allocate(every, dict(zip(names, losses, strict=True)), dict.fromkeys(names, even), dict.fromkeys(names, 1))
    values = [found[name] for name in names]
    assert sum(values) == pytest.approx(even * len(losses))
    assert min(values) >= 8
    assert max(values) <= 24
    others = (v for v in itertools.product(range(8, 25, 2), repeat=len(losses)) if sum(v) == even * len(losses))
    assert objective(losses, values, even) <= min(objective(losses, v, even) for v in others) * (1 + 1e-9)


def test_equal_losses_are_even_shares(sites: list[AttentionSite]) -> None:
    every = [dataclasses.replace(sites[0], name=str(i), layer_idx=i) for i in range(5)]
    before = {i: float(source_values(sites[0])) for i in range(5)}
    shares = plan(every, before, every, 0.5, losses={site.name: 0.3 for site in every}, shape=shape_for)
    assert shares == plan(every, before, every, 0.5, shape=shape_for)


@given(values=st.integers(3, 40))
def test_a_shape_holds_what_it_was_given(sites: list[AttentionSite], values: int) -> None:
    site, full = sites[0], exact_shape(sites[0])
    shape = shape_for(site, values)
    assert shape.values == min(values, full.values)
    assert shape.exact == (values >= full.values)
    assert min(shape.rank, shape.slots) >= 1


@pytest.mark.parametrize(("values", "slots"), [(512, 64), (576, 64), (680, 64), (768, 96), (1024, 128)])
def test_a_few_slots_are_given_for_queries_that_kernels_take(
    sites: list[AttentionSite], values: int, slots: int
) -> None:
    """Heads of 128 values and 64 slots are queries of 256; so many fewer slots than wanted are not given up."""
    assert sites[0].rope is not None
    rope = dataclasses.replace(sites[0].rope, pairs=tuple((i, i + 64) for i in range(64)))
    wide = dataclasses.replace(sites[0], head_dim=128, v_head_dim=128, num_key_value_heads=8, rope=rope)
    shape = shape_for(wide, values)
    assert (shape.slots, shape.values) == (slots, values)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.5])
def test_a_budget_is_a_fraction(sites: list[AttentionSite], budget: float) -> None:
    with pytest.raises(UsageError, match="above 0 and at most 1"):
        plan(sites, {0: 32.0, 1: 32.0}, sites, budget, shape=shape_for)


@pytest.mark.parametrize("family", LINEAR)
def test_affine_keys_and_values(family: str) -> None:
    model = build(family)
    for site in capture(model):
        assert site.linear_kv
        matrix, offset = kv_as_affine(model, site)
        graph = cut(graph_module(model, site), (site.key, site.value)).double()
        hidden = torch.randn(2, 5, matrix.shape[1], dtype=torch.float64)
        unused = {n.target: None for n in graph.graph.nodes if n.op == "placeholder" and not n.target.startswith("*")}
        key, value = graph(**{**unused, site.hidden: hidden})
        expected = torch.cat([s.transpose(1, 2).flatten(2) for s in (key, value)], -1)
        torch.testing.assert_close(hidden @ matrix.T + offset, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi", "gpt2", "cohere", "glm4", "smollm3", "gpt_oss"])
def test_streaming_shows_each_layer_what_the_model_does(family: str) -> None:
    """Attention inputs layer by layer equal those of a plain forward pass, and the exact factors lose nothing."""
    model = build(family)
    found = capture(model)
    windows = torch.randint(3, 60, (5, 9), generator=torch.Generator().manual_seed(0))
    plain: dict[str, torch.Tensor] = {}
    handles = []
    for site in found:
        hook = functools.partial(keep_input, plain, site.name)
        handles.append(model.get_submodule(site.name).register_forward_pre_hook(hook, with_kwargs=True))
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    errors: list[float] = []

    def visit(site: AttentionSite, inputs: Iterator[AttentionInputs]) -> None:
        batches = list(inputs)
        hidden = torch.cat([hidden_states(batch.args, batch.kwargs) for batch in batches])
        torch.testing.assert_close(hidden, plain[site.name], rtol=1e-5, atol=1e-6)
        (sample,) = take_samples(model, site, iter(batches), queries=lambda length: 9, seed=0)
        factors = exact_factors(site, exact_shape(site), output_weight(model, site)[0])
        errors.append(output_error([sample], factors))

    stream(model, found, [windows], visit)
    assert len(errors) == len(found)
    assert max(errors) < 1e-8


def hidden_states(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.Tensor:
    hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


def keep_input(
    store: dict[str, torch.Tensor], name: str, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    store[name] = hidden_states(args, kwargs)


def test_small_shares_go_by_loss_unless_the_job_is_quick_or_it_is_said_otherwise(sites: list[AttentionSite]) -> None:
    def decided(share: float, allocation: Any = "auto", alternations: int = 2, count: int = 2) -> bool:
        shapes = {site.name: Shape(rank=int(share * source_values(site)) - 2, slots=1) for site in sites}
        return by_loss(allocation, alternations, shapes, sites[:count])

    assert decided(0.25)
    assert not decided(0.5)
    assert not decided(0.25, alternations=1)
    assert not decided(0.25, count=1)  # nothing to share with
    assert not decided(0.25, allocation="even")
    assert decided(0.5, allocation="loss", alternations=0)

"""Closed forms on second moments of any condition: outlier channels, large biases, huge tokens, dead heads, repeats."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from layer_samples import layer_sample
from torch import Tensor

from attnedit.passes.fit_options import FitOptions
from attnedit.passes.gateswa.fit import fit_window
from attnedit.passes.mla.fit import fit_layer
from attnedit.passes.mla.least_squares import logit_target
from attnedit.passes.mla.shapes import Shape
from attnedit.passes.mla.weights import Factors, output_error
from attnedit.passes.sample import LayerSample
from attnedit.passes.solve import cholesky, inverse_root, second_moment, spectrum
from attnedit.targets.attention.gateswa.config import GateSWAConfig

LARGE = 1000.0
SHAPE = Shape(rank=8, slots=3, fold=2)


def constant(states: Tensor, seed: int = 1) -> Tensor:
    """One value for each head and dim, the same at all positions [1, heads, 1, size]."""
    size = (1, states.shape[1], 1, states.shape[3])
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def outlier_channels(sample: LayerSample) -> None:
    sample.query[..., 3] *= LARGE
    sample.key[..., 1] *= LARGE
    sample.value[..., 2] *= LARGE


def large_biases(sample: LayerSample) -> None:
    for states in (sample.query, sample.key, sample.value):
        states += LARGE * constant(states)


def query_bias(sample: LayerSample) -> None:
    sample.query += LARGE * constant(sample.query)


def huge_token(sample: LayerSample) -> None:
    sample.key[0, :, 4] *= LARGE**2
    sample.value[0, :, 4] *= LARGE**2
    sample.query[0, :, 4] *= LARGE**2


def dead_heads(sample: LayerSample) -> None:
    sample.query[:, 1] = 0
    sample.output_weight[2:] = 0  # both heads of the second group


def dead_values(sample: LayerSample) -> None:
    sample.value[:] = 0


def dead_queries(sample: LayerSample) -> None:
    sample.query[:] = 0


def constant_keys(sample: LayerSample) -> None:
    sample.key[:] = constant(sample.key)


def repeated_tokens(sample: LayerSample) -> None:
    for states in (sample.query, sample.key, sample.value):
        states[:] = states[:1, :, :1]


PLANTED: list[Callable[[LayerSample], None]] = [
    outlier_channels,
    large_biases,
    query_bias,
    huge_token,
    dead_heads,
    dead_values,
    dead_queries,
    constant_keys,
    repeated_tokens,
]
planted = pytest.mark.parametrize("plant", PLANTED, ids=lambda plant: plant.__name__)
sides = pytest.mark.parametrize("fixed_output", [False, True], ids=["free", "fixed output"])


def sample_with(plant: Callable[[LayerSample], None], **options: object) -> LayerSample:
    sample = layer_sample(sequences=12, length=24, **options)  # type: ignore[arg-type]
    plant(sample)
    return sample


def all_finite(factors: Factors) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in vars(factors).values())


@planted
@sides
@pytest.mark.parametrize("rotary_dims", [8, 4, 0])
def test_a_latent_fit_holds(plant: Callable[[LayerSample], None], fixed_output: bool, rotary_dims: int) -> None:
    sample = sample_with(plant, fixed_output=fixed_output, rotary_dims=rotary_dims)
    shape = SHAPE if rotary_dims else Shape(rank=8, slots=0)
    start, fit = (fit_layer([sample], shape, FitOptions(n, output_queries=288, logit_queries=288)) for n in (0, 2))
    assert all_finite(fit.factors)
    assert fit.output_error <= start.output_error * 1.01 + 1e-6
    assert fit.output_error == pytest.approx(output_error([sample], fit.factors), rel=1e-2, abs=1e-5)


@planted
@sides
def test_a_window_fit_holds(plant: Callable[[LayerSample], None], fixed_output: bool) -> None:
    sample = sample_with(plant, fixed_output=fixed_output)
    config = GateSWAConfig(
        layer_idx=0,
        hidden_size=10,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        v_head_dim=6,
        sliding_window=5,
        sink_tokens=1,
        sink_logit=True,
        sink_value=True,
        scale=sample.scale,
    )
    start, fit = fit_window([sample], config, refit=False), fit_window([sample], config)
    for value in (fit.sink_logit, fit.sink_value, fit.output_weight):
        assert value is None or bool(torch.isfinite(value).all())
    assert fit.output_error <= start.output_error * 1.01 + 1e-6


def test_the_fit_does_not_depend_on_the_scales_of_channels() -> None:
    """Keys times c and queries by c, values times c and o_proj by c: the same attention, so the same error."""
    plain = layer_sample(sequences=12, length=24)
    scaled = layer_sample(sequences=12, length=24)
    for plane in (1, 5):  # the two dims of one rotary plane
        scaled.key[..., plane] *= LARGE
        scaled.query[..., plane] /= LARGE
    scaled.value[..., 2] *= LARGE
    scaled.output_weight[..., 2] /= LARGE
    options = FitOptions(2, output_queries=288, logit_queries=288)
    expected, found = (fit_layer([sample], SHAPE, options).output_error for sample in (plain, scaled))
    assert found == pytest.approx(expected, rel=0.1)


def test_a_bias_on_values_costs_little_more_than_a_latent() -> None:
    """What all values have in common is one direction; with a latent for it the error is not far from without."""
    plain, biased = layer_sample(sequences=12, length=24), layer_sample(sequences=12, length=24)
    biased.value += LARGE * constant(biased.value)
    options = FitOptions(2, output_queries=288, logit_queries=288)
    errors = []
    for sample, rank in ((plain, 8), (biased, 9)):
        fit = fit_layer([sample], dataclasses.replace(SHAPE, rank=rank), options)
        energy = float(sample.target.double().square().sum())
        errors.append(output_error([sample], fit.factors) * energy)
    assert errors[1] < 2 * errors[0]


def test_weights_of_the_logits_do_not_see_a_bias_on_values() -> None:
    plain, biased = layer_sample(), layer_sample()
    biased.value += LARGE * constant(biased.value)
    expected, found = logit_target([plain]), logit_target([biased])
    for a, b in zip(expected.chunks, found.chunks, strict=True):
        torch.testing.assert_close(b.weight, a.weight, rtol=2e-3, atol=2e-3)


def test_moments_are_summed_beyond_float32() -> None:
    rows = 1 + 1e-5 * torch.randn(10_000, 4, generator=torch.Generator().manual_seed(0))
    moment = second_moment(rows) / len(rows)
    wide = rows.double()
    torch.testing.assert_close(moment, wide.mT @ wide / len(rows), rtol=1e-14, atol=1e-14)
    assert float(spectrum(moment)[0][0]) == pytest.approx(1e-10, rel=0.1)


def test_a_factor_exists_for_every_moment() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(3, 6, 2, generator=generator, dtype=torch.float64)
    singular = root @ root.mT
    singular[0] -= 1e-13 * torch.eye(6, dtype=torch.float64)  # indefinite by rounding
    singular[1] = 0
    factor = cholesky(singular)
    torch.testing.assert_close(factor @ factor.mT, singular, rtol=1e-6, atol=1e-6)
    assert torch.equal(factor, factor.tril())
    assert bool((factor.diagonal(dim1=1, dim2=2) > 0).all())


def test_whitening_is_the_same_for_any_scales_of_channels() -> None:
    rows = torch.randn(200, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scales = torch.tensor([1e-2, 1.0, 1e3, 1e-1, 10.0], dtype=torch.float64)
    plain = inverse_root(second_moment(rows), 1e-4).double()
    scaled = inverse_root(second_moment(rows * scales), 1e-4).double()
    torch.testing.assert_close(scaled * scales, plain, rtol=1e-5, atol=1e-6)


def test_a_channel_without_energy_stays_finite() -> None:
    moment = torch.diag(torch.tensor([1e12, 1.0, 0.0]))
    assert bool(torch.isfinite(inverse_root(moment, 1e-4)).all())
    assert bool(torch.isfinite(inverse_root(torch.zeros(2, 3, 3), 1e-4)).all())

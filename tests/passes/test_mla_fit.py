"""The closed-form fits against plain references: attention, mixing, least squares."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layer_samples import layer_sample, new_logits, new_output
from torch import Tensor

from attnedit.compiler.errors import UsageError
from attnedit.passes import sample as sample_module
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.mla import least_squares
from attnedit.passes.mla.fit import fit_layer
from attnedit.passes.mla.initialise import Split, analytic, expected_rotation, mix_components
from attnedit.passes.mla.least_squares import (
    OUTPUT_RIDGE,
    OUTPUT_SHARE,
    STUDENT_SHARE,
    logit_target,
    refit_latent,
    refit_output,
    refit_query,
)
from attnedit.passes.mla.shapes import Shape
from attnedit.passes.mla.weights import Factors, latent_reads, output_error
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import LONG_WORK, SHORT_WORK, _positions, sampled_queries
from attnedit.passes.solve import conjugate_gradients, inverse_root

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 3},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "partial rotary": {"rotary_dims": 4},
    "no rotary": {"rotary_dims": 0},
    "few queries": {"queries": 5},
}
variants = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


def plain_attention(sample: LayerSample) -> tuple[Tensor, Tensor]:
    """Attention weights [N, H, Q, T] and output [N, Q, D] in float64, written down naively."""
    query, key = (states.double() for states in sample._rotated)
    share = sample.heads // sample.groups
    key, value = (s.double().repeat_interleave(share, 1) for s in (key, sample.value))
    logits = torch.einsum("nhqd,nhtd->nhqt", query, key) * sample.scale
    if sample.softcap is not None:
        logits = sample.softcap * (logits / sample.softcap).tanh()
    behind = sample.positions[:, None] - torch.arange(key.shape[2])
    logits[:, :, behind < 0] = -torch.inf
    if sample.window is not None:
        logits[:, :, behind >= sample.window] = -torch.inf
    weights = logits.exp()
    total = weights.sum(-1, keepdim=True)
    if sample.sinks is not None:
        total = total + sample.sinks.double().exp().view(1, -1, 1, 1)
    weights = weights / total
    output = torch.einsum("nhqt,nhte,hDe->nqD", weights, value, sample.output_weight.double())
    return weights, output


@variants
@pytest.mark.parametrize("chunk", [1, 1 << 22])
def test_the_target_is_the_sources_attention(
    options: dict[str, Any], chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sample_module, "CHUNK_ELEMENTS", chunk)
    sample = layer_sample(**options)
    weights, output = plain_attention(sample)
    torch.testing.assert_close(sample.target.double(), output, rtol=1e-5, atol=1e-5)
    seen = (weights > 0).any(0).any(0).sum(0).clamp(min=1)
    received = weights.sum((1, 2)) / seen
    torch.testing.assert_close(sample.token_weight.double(), received / received.mean(), rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    sequences=st.integers(1, 4),
    length=st.integers(1, 40),
    count=st.integers(1, 40),
    window=st.none() | st.integers(1, 9),
    chunk=st.integers(1, 3000),
)
def test_chunks_hold_every_visible_pair_once(
    sequences: int, length: int, count: int, window: int | None, chunk: int
) -> None:
    count = min(count, length)
    sample = layer_sample(sequences=sequences, length=length, queries=count, window=window)
    seen = torch.zeros(sequences, count, length, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample_module, "CHUNK_ELEMENTS", chunk)
        for part in sample.chunks():
            seen[part.sequences, part.queries, part.keys] += sample.visible(part)
            assert part.keys.start % 8 == 0
            assert part.keys.stop % 8 == 0 or part.keys.stop == length
    behind = sample.positions[:, None] - torch.arange(length)
    expected = (behind >= 0) & (behind < (window or length))
    assert torch.equal(seen, expected.long().expand(sequences, -1, -1))


@given(length=st.integers(1, 300) | st.integers(1025, 3000), count=st.integers(1, 3000), seed=st.integers(0, 5))
def test_sampled_positions(length: int, count: int, seed: int) -> None:
    positions = _positions(length, count, seed)
    assert len(positions) == min(count, length)
    assert torch.equal(positions[:4], torch.arange(min(4, length, count)))
    assert bool((positions.diff() > 0).all())
    assert int(positions[-1]) < length


def test_each_doubling_of_a_long_context_has_as_many_queries() -> None:
    positions = _positions(16384, 600, 0)
    counts = [int(((positions >= low) & (positions < 2 * low)).sum()) for low in (1024, 2048, 4096, 8192)]
    assert max(counts) - min(counts) <= 2
    assert int((positions < 1024).sum()) == pytest.approx(600 / (1 + math.log(16)), abs=3)


def test_queries_of_long_windows_are_fewer_for_the_same_work() -> None:
    def windows(count: int, length: int) -> Tensor:
        return torch.zeros(count, length, dtype=torch.int64)

    alone = sampled_queries([windows(64, 1024)], 16384)
    assert alone(1024) == 256
    both = sampled_queries([windows(16, 8192), windows(32, 1024)], 16384)
    assert both(1024) == SHORT_WORK * 16384 / 32
    keys = float(_positions(8192, 2000, 0).float().mean())
    assert both(8192) * keys * 16 == pytest.approx(LONG_WORK * 16384 * 512, rel=0.05)
    uneven = sampled_queries([windows(2, 4096), windows(8, 1024), windows(10, 300)], 16384)
    assert uneven(300) / uneven(1024) == pytest.approx(300 / 1024, rel=0.02)
    # What is shorter than any that counted: beginnings, beside windows that are all long.
    assert sampled_queries([windows(4, 2048)], 16384)(4) == 16384 * 4 / (4 * 2048)


def by_sequences(sample: LayerSample, *counts: int) -> list[LayerSample]:
    """The sample in parts of so many sequences."""
    parts = zip(*(getattr(sample, name).split(counts) for name in ("query", "key", "value")), strict=True)
    return [dataclasses.replace(sample, query=query, key=key, value=value) for query, key, value in parts]


@variants
def test_samples_in_parts_are_fitted_like_one(options: dict[str, Any]) -> None:
    sample = layer_sample(sequences=6, **options)
    shape = Shape(rank=6, slots=0 if options.get("rotary_dims") == 0 else 2, fold=2)
    effort = FitOptions(2, output_queries=72, logit_queries=72)
    one, many = fit_layer([sample], shape, effort), fit_layer(by_sequences(sample, 1, 3, 2), shape, effort)
    # Tokens are weighted to a mean of 1 within each part, so that moments differ a little.
    assert many.output_error == pytest.approx(one.output_error, rel=0.02, abs=1e-6)
    assert many.energy_kept == pytest.approx(one.energy_kept, rel=1e-3)
    expected, found = (output_error([sample], fit.factors) for fit in (one, many))
    assert found == pytest.approx(expected, rel=0.02, abs=1e-6)


def test_a_logit_refit_of_two_lengths_weighs_both() -> None:
    short, long = layer_sample(sequences=4), layer_sample(sequences=2, length=30, seed=1)
    long = dataclasses.replace(long, output_weight=short.output_weight)
    before = refit_output([short, long], start(short))[0]
    target = logit_target([short, long])
    assert target.total == pytest.approx(logit_target([short]).total + logit_target([long]).total, rel=1e-5)
    after = refit_query([short, long], before, target, 300)
    losses = [float(logit_loss(short, factors) + logit_loss(long, factors)) for factors in (before, after)]
    alone = refit_query([short], before, logit_target([short]), 300)
    assert losses[1] < 0.9 * losses[0]
    assert losses[1] < float(logit_loss(short, alone) + logit_loss(long, alone))


@pytest.mark.parametrize("fold", [1, 2, 3, 4])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_mixing_is_undone_by_its_dual(fold: int, groups: int) -> None:
    sample = layer_sample(groups=groups)
    parts = mix_components([sample], fold)
    total = torch.einsum("mgf,mhk->gfhk", parts.synthesis, parts.analysis)
    size = groups * 4
    eye = torch.eye(size, dtype=total.dtype)
    torch.testing.assert_close(total.reshape(size, size), eye, rtol=1e-8, atol=1e-8)


def test_expected_rotation_is_a_mean_of_rotations() -> None:
    rotation = layer_sample().rotation
    assert rotation is not None
    rho = expected_rotation(rotation)
    assert bool((rho.abs() < 1).all())
    slow = dataclasses.replace(rotation, frequency=rotation.frequency * 1e-9, scaling=1.5)
    torch.testing.assert_close(expected_rotation(slow).abs(), torch.full((4,), 2.25, dtype=torch.float64))


@variants
def test_the_analytic_start_is_exact_with_every_slot_and_full_rank(options: dict[str, Any]) -> None:
    sample = layer_sample(**options)
    rotary = options.get("rotary_dims", 8)
    slots, rank = sample.groups * rotary // 2, sample.groups * (8 - rotary + 6)
    factors, kept = analytic([sample], Split.of([sample], mix_components([sample], 1) if rotary else None, slots), rank)
    assert output_error([sample], factors) < 1e-8
    assert kept == pytest.approx(1.0, abs=1e-6)


def test_the_latent_finds_few_causes() -> None:
    """Without rotation, keys and values that come from five causes need five latents."""
    sample = layer_sample(rotary_dims=0, latents=5)
    errors = [output_error([sample], analytic([sample], Split.of([sample], None, 0), rank)[0]) for rank in (2, 4, 5)]
    assert errors[0] > errors[1] > 1e-4 > 1e-8 > errors[2]


def start(sample: LayerSample, rank: int = 6, slots: int = 2) -> Factors:
    rotary = sample.rotation is not None
    split = Split.of([sample], mix_components([sample], 2) if rotary else None, slots if rotary else 0)
    return analytic([sample], split, rank)[0]


@variants
@pytest.mark.parametrize("sequences", [6, 1], ids=["many rows", "few rows"])
def test_the_output_refit_is_ridge_regression(options: dict[str, Any], sequences: int) -> None:
    sample = layer_sample(sequences=sequences, **options)
    before = start(sample)
    after, error = refit_output([sample], before)
    features, target = torch.zeros(sequences, len(sample.positions), 24).double(), sample.target.double().flatten(0, 1)
    for _, chunk, reads in latent_reads([sample], before):
        features[chunk.sequences, chunk.queries] = reads.transpose(1, 2).flatten(2).double()
    features = features.flatten(0, 1)
    level = OUTPUT_RIDGE * 24 / len(features) * features.square().sum(0).mean()
    initial = before.output.permute(0, 2, 1).reshape(24, -1).double()
    stacked = torch.cat([features, level.sqrt() * torch.eye(24)])
    wanted = torch.cat([target, level.sqrt() * initial])
    expected = torch.linalg.lstsq(stacked, wanted).solution
    found = after.output.permute(0, 2, 1).reshape(24, -1).double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert error == pytest.approx(output_error([sample], after), rel=1e-3, abs=1e-6)
    assert error <= output_error([sample], before)


@pytest.mark.parametrize("chunk", [1, 1 << 22], ids=["by head", "at once"])
def test_few_queries_are_regressed_the_same_way(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the products of queries instead of features, rank split included."""
    monkeypatch.setattr(least_squares, "CHUNK_ELEMENTS", chunk)
    sample = layer_sample(v_head_dim=3, sequences=2)
    before = start(sample, rank=10)
    (expected, wrong), (found, error) = (
        regress([sample], before) for regress in (least_squares._regress_by_features, least_squares._regress_by_rows)
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert error == pytest.approx(wrong, rel=1e-3)


def test_the_output_keeps_the_rank_that_a_head_can_hold() -> None:
    sample = layer_sample(v_head_dim=3)
    after, error = refit_output([sample], start(sample, rank=10))
    assert after.output.shape[-1] == 10
    assert bool((torch.linalg.matrix_rank(after.output.double(), rtol=1e-5) == 3).all())
    assert error == pytest.approx(output_error([sample], after), rel=1e-3)


def test_where_o_proj_is_fixed_only_values_change() -> None:
    sample = layer_sample(sequences=6, v_head_dim=3, fixed_output=True)
    after, error = refit_output([sample], start(sample))
    projected = sample.output_weight @ torch.linalg.lstsq(sample.output_weight, after.output).solution
    torch.testing.assert_close(projected, after.output, rtol=1e-4, atol=1e-5)
    assert error <= output_error([sample], start(sample))


def logit_loss(sample: LayerSample, factors: Factors) -> Tensor:
    """Half the weighted variance over keys of the logits' error."""
    target = logit_target([sample])
    loss = torch.zeros(())
    for part, logits in zip(target.chunks, new_logits(sample, factors), strict=True):
        error = logits - part.logits
        mean = (part.weight * error).sum(-1, keepdim=True) / part.strength
        loss = loss + 0.5 * (part.weight * (error - mean).square()).sum()
    return loss


def latent_loss(sample: LayerSample, factors: Factors, at: Factors) -> Tensor:
    """The logits' loss plus the output's, with attention weights of the factors `at`."""
    pairs = zip(new_logits(sample, at), sample.chunks(), strict=True)
    attention = [sample.probabilities(logits, chunk) for logits, chunk in pairs]
    loss = logit_loss(sample, factors)
    for chunk, output in zip(sample.chunks(), new_output(sample, factors, attention), strict=True):
        missing = output - sample.target[chunk.sequences, chunk.queries]
        loss = loss + 0.5 * OUTPUT_SHARE * missing.square().sum()
    return loss


@variants
@pytest.mark.parametrize("side", ["query", "latent"])
def test_a_logit_refit_ends_where_the_gradient_is_zero(options: dict[str, Any], side: str) -> None:
    sample = layer_sample(sequences=4, **options)
    before = refit_output([sample], start(sample))[0]
    target = logit_target([sample])
    names = ["query_latent", "query_slots"] if side == "query" else ["latent", "slots"]
    refit = refit_query if side == "query" else refit_latent

    def loss_and_gradient(factors: Factors) -> tuple[float, float]:
        leaves = {name: getattr(factors, name).clone().requires_grad_() for name in names}
        changed = dataclasses.replace(factors, **leaves)
        loss = logit_loss(sample, changed) if side == "query" else latent_loss(sample, changed, before)
        used = [leaf for leaf in leaves.values() if leaf.numel()]
        gradients = torch.autograd.grad(loss, used)
        return float(loss.detach()), float(sum(g.square().sum() for g in gradients)) ** 0.5

    first, slope = loss_and_gradient(before)
    few, _ = loss_and_gradient(refit([sample], before, target, 3))
    last, rest = loss_and_gradient(refit([sample], before, target, 300))
    assert last <= few * (1 + 1e-4) < first
    assert rest < 0.02 * slope


def test_weights_are_attention_times_what_there_is_to_choose() -> None:
    sample = layer_sample()
    weights, _ = plain_attention(sample)
    value = torch.einsum("nhte,hDe->nhtD", sample.value.double().repeat_interleave(2, 1), sample.output_weight.double())
    mean = torch.einsum("nhqt,nhtD->nhqD", weights, value)
    spread = (weights * (value[:, :, None] - mean[:, :, :, None]).square().sum(-1)).sum(-1)
    expected = weights * spread[..., None]
    target = logit_target([sample])
    found = torch.zeros_like(expected)
    for part in target.chunks:
        found[part.chunk.sequences, :, part.chunk.queries, part.chunk.keys] = part.weight.double()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert target.total == pytest.approx(float(expected.sum()), rel=1e-4)


def test_what_the_new_layer_attends_to_weighs_as_much_as_what_the_source_does() -> None:
    sample = layer_sample()
    factors = start(sample)
    plain, both = logit_target([sample]), logit_target([sample], factors)
    logits = zip(new_logits(sample, factors), sample.chunks(), strict=True)
    students = [sample.probabilities(found, chunk) for found, chunk in logits]
    for before, after, student in zip(plain.chunks, both.chunks, students, strict=True):
        spread = before.weight.sum(-1, keepdim=True)  # attention sums to 1
        expected = (1 - STUDENT_SHARE) * before.weight + STUDENT_SHARE * student * spread
        torch.testing.assert_close(after.weight, expected)


@pytest.mark.parametrize("options", [{}, {"rotary_dims": 0}, {"fixed_output": True}], ids=["rope", "nope", "gated"])
def test_alternations_lower_the_error(options: dict[str, Any]) -> None:
    sample = layer_sample(sequences=24, length=24, **options)
    shape = Shape(rank=7, slots=0 if options.get("rotary_dims") == 0 else 3, fold=2)
    errors = []
    for rounds in (0, 1, 3):
        fit = fit_layer([sample], shape, FitOptions(rounds, output_queries=576, logit_queries=576))
        assert fit.output_error == pytest.approx(output_error([sample], fit.factors), rel=1e-3)
        errors.append(fit.output_error)
    assert errors[0] > errors[1] > errors[2]


def test_effort_follows_alternations() -> None:
    assert FitOptions.of(1).logit_queries < FitOptions.of(2).logit_queries
    with pytest.raises(UsageError, match="negative"):
        FitOptions.of(-1)


@given(size=st.integers(1, 8), seed=st.integers(0, 50))
def test_conjugate_gradients_solve(size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT + torch.eye(size, dtype=torch.float64)
    wanted = torch.randn(size, generator=generator, dtype=torch.float64)
    half = size // 2  # two blocks

    def apply(x: list[Tensor]) -> list[Tensor]:
        return list((matrix @ torch.cat(x)).split([half, size - half]))

    right = matrix @ wanted
    found = conjugate_gradients(apply, [right[:half], right[half:]], 4 * size, tolerance=1e-24)
    torch.testing.assert_close(torch.cat(found), wanted, rtol=1e-6, atol=1e-6)


def test_conjugate_gradients_stop_at_nothing() -> None:
    (found,) = conjugate_gradients(lambda x: x, [torch.zeros(3)], 5)
    assert torch.equal(found, torch.zeros(3))


@given(size=st.integers(1, 6), batch=st.integers(1, 3))
def test_inverse_root_whitens(size: int, batch: int) -> None:
    rows = torch.randn(batch, 40, size, generator=torch.Generator().manual_seed(size))
    moment = rows.mT @ rows / 40
    root = inverse_root(moment, 1e-8)
    torch.testing.assert_close(root @ moment @ root.mT, torch.eye(size).expand(batch, -1, -1), rtol=1e-4, atol=1e-4)

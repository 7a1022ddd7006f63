"""The kernel of new tokens, windowed or after a past: on a GPU where there is one, else in triton's interpreter."""

import torch
from interpreted import needs_triton, results_of

from attnedit.targets.attention.mla.paths import fused_sizes
from attnedit.targets.attention.prefill import one_sink, prefills_fused


@needs_triton
def test_kernel_equals_the_modules_in_float64() -> None:
    errors = results_of("prefill_cases.py")["errors"]
    assert len(errors) >= 64
    assert {name: error for name, error in errors.items() if not error < (1e-2 if "bfloat16" in name else 1e-3)} == {}


@needs_triton
def test_the_kernel_ran() -> None:
    # Every call of more than one token to a window; latents after a past, under a window, or too wide for torch's.
    found = results_of("prefill_cases.py")
    assert found["windows"] >= 5 * (4 + 2 * 8)
    assert found["latents"] == found["cases"] * (2 + 3) + found["wide"]


def test_processors_keep_the_plain_path() -> None:
    query = torch.zeros((1, 2, 3, 16)).half()
    assert not prefills_fused(query, (query, query), (16, 16))


def test_one_sink_has_the_effect_of_all() -> None:
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 4), torch.randn(4, 5)
    value = torch.randn(2, 3)
    mass, mean = one_sink([(logits[0], None), (logits[1], value)], 4)
    assert mass is not None
    assert mean is not None
    seen = torch.cat((weights, logits.T), dim=1).softmax(-1)
    merged = torch.cat((weights, mass[:, None]), dim=1).softmax(-1)
    torch.testing.assert_close(seen[:, :5], merged[:, :5])
    torch.testing.assert_close(seen[:, 6:] * value.repeat_interleave(2, dim=0), merged[:, 5:] * mean)
    assert one_sink([], 4) == (None, None)


@needs_triton
def test_what_learns_gets_its_gradient() -> None:
    """Where nothing but a sink, or the projection of the latent, asks for one."""
    assert results_of("prefill_cases.py")["learns"] == {"sink": True, "latent": True}


def test_sizes_of_fused_attention() -> None:
    query = torch.zeros((1, 2, 3, 90))
    assert fused_sizes(query, query, query[..., :64], None) == (96, 96)
    assert fused_sizes(query, query, torch.zeros((1, 2, 3, 100)), None) == (104, 104)

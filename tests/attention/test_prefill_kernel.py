"""The kernel of new tokens, windowed or after a past: on a GPU where there is one, else in triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from interpreted import needs_triton, results_of
from torch._subclasses.fake_tensor import FakeTensorMode

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


@pytest.mark.parametrize(
    ("capability", "size", "expected"),
    [
        (9, 96, (96, 64)),
        (9, 176, (192, 128)),
        (9, 256, (256, 128)),
        (9, 272, (272, 128)),
        (8, 176, (176, 176)),
        (8, 272, (272, 128)),
    ],
)
@pytest.mark.parametrize("learns", [False, True])
def test_sizes_of_fused_attention_on_gpus(
    capability: int, size: int, expected: tuple[int, int], learns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values are made as wide as queries only where no kernel takes them as they are."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (capability, 0))
    with FakeTensorMode():
        query = torch.empty((1, 2, 300, size), device="cuda", dtype=torch.bfloat16, requires_grad=learns)
        value = torch.empty((1, 2, 300, min(128, expected[1])), device="cuda", dtype=torch.bfloat16)
        assert fused_sizes(query, query, value, None) == ((size, size) if learns and size <= 128 else expected)
        assert fused_sizes(query, query, value, torch.empty((1, 1, 300, 300))) == (size, size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("size", [96, 192, 256, 272])
@pytest.mark.parametrize("length", [65, 300, 1000])
def test_gradients_of_fused_sizes_on_a_gpu(size: int, length: int) -> None:
    """What torch makes of the sizes chosen, in bfloat16, against float64: values of 64 or 128."""
    generator = torch.Generator().manual_seed(0)
    wide = 64 if size == 96 else 128
    shapes = [(2, 4, length, x) for x in (size, size, wide, wide)]
    exact = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    results = []
    for dtype, device in ((torch.float64, "cpu"), (torch.bfloat16, "cuda")):
        query, key, value, pull = (x.to(device, dtype) for x in exact)
        leaves = [x.requires_grad_() for x in (query, key, value)]
        ends = fused_sizes(query, key, value, None) if device == "cuda" else (size, wide)
        query, key, value = (F.pad(x, (0, end - x.shape[-1])) for x, end in zip(leaves, (ends[0], *ends), strict=True))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=size**-0.5)[..., :wide]
        found = (out, *torch.autograd.grad(out, leaves, pull))
        results.append([x.detach().double().cpu() for x in found])
    for expected, got in zip(*results, strict=True):
        assert (got - expected).norm() < 1e-2 * expected.norm()

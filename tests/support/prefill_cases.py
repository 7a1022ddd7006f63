"""The kernel of `attnedit::prefill_attention` in both kinds of attention against float64; prints JSON. A program.

Triton decides when it is imported whether kernels are interpreted, so that cannot be switched on inside a test.
"""

import copy
import itertools
import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, StaticCache

from attnedit.targets.attention import MLA, GateSWA, GateSWAConfig, MLAConfig
from attnedit.targets.attention import prefill as prefill_module
from attnedit.targets.attention.mla.paths import TORCH_SIZE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of triton 3.9 takes bfloat16 for integers.
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
VALUES = 16 if DEVICE == "cuda" else 12
"""Of windows. On a GPU the kernel takes multiples of 16 alone."""
LATENTS: tuple[tuple[int, int, int], ...] = ((8, 6, 3), (8, 6, 0))
"""Sizes of queries and of values, and rotary slots."""
if DEVICE == "cuda":
    LATENTS = ((32, 32, 4), (128, 128, 88), (64, 64, 8), (32, 16, 3), (48, 32, 0))
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"sink_tokens": 3},
    "sink": {"sink_logit": True},
    "all": {"sink_logit": True, "sink_value": True, "sink_tokens": 2},
    "source's sinks": {"sink_logit": True, "sink_value": True, "sinks": True},
}
LENGTHS = ((3,), (7, 1, 8), (150, 5, 9), (129, 70))
"""New tokens of calls in a row over one cache: below, at and beyond the window of 7, and over a block of queries."""


def gateswa(form: str, dtype: torch.dtype) -> GateSWA:
    config = GateSWAConfig(
        layer_idx=0,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        v_head_dim=VALUES,
        hidden_size=32,
        sliding_window=7,
        scale=0.25,
        gate="none",
        **{"sink_tokens": 0, **FORMS[form]},
    )
    module = GateSWA(config, device=DEVICE, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.requires_grad_(False)


def cache_of(kind: str) -> Any:
    small = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    return None if kind == "none" else DynamicCache() if kind == "dynamic" else StaticCache(small, 300)


def error(module: nn.Module, calls: list[tuple[Any, ...]], kind: str, prepare: Any) -> float:
    """Relative error of calls in a row against the same module in float64, which has no kernel."""
    exact = copy.deepcopy(module).double()
    caches = cache_of(kind), cache_of(kind)
    worst = 0.0
    for arguments in calls:
        double = tuple(x.double() if isinstance(x, torch.Tensor) else x for x in arguments)
        found, expected = (
            part(*prepare(given, cache))
            for part, given, cache in ((module, arguments, caches[0]), (exact, double, caches[1]))
        )
        worst = max(worst, float((found.double() - expected).norm() / expected.norm()))
    return worst


def main() -> None:
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    used = mock.Mock(wraps=prefill_module._launch)
    normal = lambda dtype, *size: torch.randn(size, device=DEVICE).to(dtype)  # noqa: E731
    with torch.no_grad(), mock.patch.object(torch.ops.attnedit, "prefill_attention", used):
        for dtype, form, kind in itertools.product(DTYPES, FORMS, ("none", "dynamic", "static")):
            module = gateswa(form, dtype)
            for lengths in LENGTHS:
                calls = []
                for length in lengths if kind != "none" else lengths[:1]:
                    sinks = normal(dtype, 4) if module.config.sinks else None
                    states = (normal(dtype, 2, 4, length, 16), normal(dtype, 2, 2, length, 16))
                    calls.append((*states, normal(dtype, 2, 2, length, VALUES), sinks))
                errors[f"gateswa {dtype} {form} {kind} {lengths}"] = error(
                    module, calls, kind, lambda x, cache: (*x[:3], None, None, cache, x[3])
                )
        windows = used.call_count
        for dtype, window, (size, wide, slots) in itertools.product(DTYPES, (None, 20), LATENTS):
            columns = tuple(range(1, slots + 1))
            config = MLAConfig(0, 4, size, wide, 12, columns, size, 10, 0.4 * (8 / size) ** 0.5, window=window)
            latent = MLA(config, device=DEVICE, dtype=dtype).requires_grad_(False)
            latent.path = "expanded"
            calls = []
            for length in (70, 33, 150):
                angle = torch.rand(2, length, slots + 2, device=DEVICE)
                turns = angle.cos().to(dtype), angle.sin().to(dtype)
                calls.append((normal(dtype, 2, 4, length, size), normal(dtype, 2, length, 10), *turns))
            errors[f"mla {dtype} {window} {size} {wide} {slots}"] = error(
                latent, calls, "dynamic", lambda x, cache: (*x, None, cache)
            )
        latents = used.call_count - windows
    learns = {}
    dtype = DTYPES[-1]  # that of the last calls, which are used again
    sink, latent = gateswa("sink", dtype), MLA(config, device=DEVICE, dtype=dtype).requires_grad_(False)
    latent.path = "expanded"
    states = (normal(dtype, 1, heads, 9, size) for heads, size in ((4, 16), (2, 16), (2, VALUES)))
    for name, module, weight, given in (
        ("sink", sink, sink.sink_logit, (*states,)),
        ("latent", latent, latent.kv_b_proj.weight, (*calls[-1], None, DynamicCache())),
    ):
        weight.requires_grad_()
        for _ in range(2):  # latents go through the kernel after a past only
            out = module(*given)
        learns[name] = bool(torch.autograd.grad(out.float().square().sum(), weight)[0].abs().sum() > 0)
    json.dump(
        {
            "learns": learns,
            "errors": errors,
            "windows": windows,
            "latents": latents,
            "cases": len(LATENTS) * len(DTYPES),
            "wide": len(DTYPES) * sum(size + 2 * slots > TORCH_SIZE for size, _, slots in LATENTS),
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()

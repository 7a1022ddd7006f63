"""The kernel of `attnedit::ring_decode` against the same module in float64, step by step; prints JSON. A program.

Triton decides when it is imported whether kernels are interpreted, so that cannot be switched on inside a test.
"""

import copy
import itertools
import json
import sys
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, StaticCache

from attnedit.targets.attention import GateSWA, GateSWAConfig

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of triton 3.9 takes bfloat16 for integers.
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float16,)
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "kept": {"sink_tokens": 3},
    "gate of heads": {"gate": "head", "sink_tokens": 1},
    "gate of elements": {"gate": "element", "gate_bias": True},
    "sink": {"sink_logit": True},
    "all": {"sink_logit": True, "sink_value": True, "sink_tokens": 2, "gate": "head"},
    "source's sinks": {"sink_logit": True, "sink_value": True, "sinks": True, "sink_tokens": 9},
}
SHAPES = ((7, 4, 2, 16, 12, 2), (70, 6, 1, 12, 20, 1), (1, 2, 2, 16, 16, 3))
"""Window, heads, groups, size of keys, of values, batch; rings that fit into what is taken at once, and one beyond."""


def module_of(form: str, shape: tuple[int, ...], dtype: torch.dtype) -> GateSWA:
    window, heads, groups, size, wide, _ = shape
    given = {"gate": "none", "sink_tokens": 0, **FORMS[form]}
    config = GateSWAConfig(0, heads, groups, size, wide, 24, window, 0.3, **given)
    module = GateSWA(config, device=DEVICE, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.requires_grad_(False)


def tokens(module: GateSWA, batch: int, length: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """Query, key, value, hidden states; queries as projections leave them, heads behind tokens."""
    config = module.config

    def normal(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE).to(dtype)

    query = normal(batch, length, config.num_attention_heads, config.head_dim).transpose(1, 2)
    key, value = (normal(batch, config.num_key_value_heads, length, x) for x in (config.head_dim, config.v_head_dim))
    return query, key, value, normal(batch, length, config.hidden_size)


def error(module: GateSWA, batch: int, prompt: int, steps: int, dtype: torch.dtype) -> float:
    """Worst relative error of a prompt's successors, and of the ring in the end."""
    exact = copy.deepcopy(module).double()
    small = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    caches = StaticCache(small, 300), StaticCache(small, 300)
    sinks = torch.randn(module.config.num_attention_heads, device=DEVICE).to(dtype) if module.config.sinks else None
    worst = 0.0
    for length in (prompt,) * (prompt > 0) + (1,) * steps:
        given = tokens(module, batch, length, dtype)
        found = module(*given, None, caches[0], sinks)
        expected = exact(*(x.double() for x in given), None, caches[1], None if sinks is None else sinks.double())
        worst = max(worst, float((found.double() - expected).norm() / expected.norm()))
    for found, expected in zip(*((cache.layers[0].keys, cache.layers[0].values) for cache in caches), strict=True):
        worst = max(worst, float((found.double() - expected).abs().max()))
    assert int(caches[0].layers[0].cumulative_length) == prompt + steps
    return worst


def main() -> None:
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    used = mock.Mock(wraps=torch.ops.attnedit.ring_decode)
    steps = 0
    with torch.no_grad(), mock.patch.object(torch.ops.attnedit, "ring_decode", used):
        for dtype, form, shape in itertools.product(DTYPES, FORMS, SHAPES):
            module = module_of(form, shape, dtype)
            # From nothing past a small window; from before a window's edge, and far behind it.
            for prompt, count in ((0, 9), (shape[0] - 1, 3), (3 * shape[0] + 1, 2)):
                errors[f"{dtype} {form} {shape} {prompt}"] = error(module, shape[-1], prompt, count, dtype)
                steps += count
                steps += prompt == 1
    learns = module_of("sink", SHAPES[0], DTYPES[0])
    learns.sink_logit.requires_grad_()
    given = tokens(learns, 2, 1, DTYPES[0])
    out = learns(*given, None, StaticCache(LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1), 9))
    gradient = torch.autograd.grad(out.float().square().sum(), learns.sink_logit)[0]
    json.dump(
        {"errors": errors, "used": used.call_count, "steps": steps, "learns": bool(gradient.abs().sum() > 0)},
        sys.stdout,
    )


if __name__ == "__main__":
    main()

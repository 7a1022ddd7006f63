"""Attention over vLLM's paged cache, without vLLM: on a GPU where there is one, else in triton's interpreter."""

from __future__ import annotations

import warnings

import pytest
from interpreted import HOPPER, needs_triton, results_of

from attnedit.targets.runtime.vllm.paged_latents import choose_sizes


@needs_triton
def test_kernel_and_plain_torch_equal_float64() -> None:
    errors = results_of("paged_latent_cases.py")["errors"]
    assert len(errors) == 64
    limits = {"float32": 1e-6, "torch.float16": 1e-3, "bfloat16": 1e-2}
    limit = {name: next(value for kind, value in limits.items() if kind in name) for name in errors}
    assert {name: error for name, error in errors.items() if not error < limit[name]} == {}


@needs_triton
@pytest.mark.parametrize("most_new", [1, 512])
@pytest.mark.parametrize(("heads", "rank", "slots"), [(9, 160, 32), (32, 512, 64), (32, 848, 176), (40, 24, 0)])
def test_kernel_compiles_for_hopper(heads: int, rank: int, slots: int, most_new: int) -> None:
    """Which needs no GPU: one program's memory is there, and its products are the matrix unit's."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from attnedit.targets.runtime.vllm.paged_kernels import attend_pages

    sizes = choose_sizes(heads, rank, slots, most_new, 8192)
    warps = sizes.pop("num_warps")
    constants = {"RANK": rank, "SLOTS": slots, "SIZE": 16, "WINDOW": True, "SOFTCAP": True, "SINKS": True, **sizes}
    pointers = {"query": "*bf16", "cache": "*bf16", "out": "*fp32" if sizes["PARTS"] > 1 else "*bf16", "sums": "*fp32"}
    pointers |= dict.fromkeys(("starts", "lengths", "table"), "*i32")
    signature = dict.fromkeys(attend_pages.arg_names, "i32") | pointers
    signature |= {"sinks": "*bf16", "scale": "fp32", "softcap": "fp32"} | dict.fromkeys(constants, "constexpr")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of triton's own defaults
        made = triton.compile(
            ASTSource(fn=attend_pages, signature=signature, constexprs=constants),
            target=GPUTarget("cuda", 90, 32),
            options={"num_warps": warps},
        )
    assert made.metadata.shared <= HOPPER
    assert "wgmma.mma_async" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]

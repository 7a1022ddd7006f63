"""Attention over vLLM's paged cache, without vLLM: on a GPU where there is one, else in triton's interpreter."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted import HOPPER, needs_triton, results_of

from attnedit.targets.attention import MLAConfig
from attnedit.targets.runtime.vllm.paged_attention import Run, attend_batch, runs
from attnedit.targets.runtime.vllm.paged_latents import Pages, choose_sizes, write

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG = MLAConfig(
    layer_idx=0,
    num_attention_heads=5,
    head_dim=24,
    v_head_dim=16,
    kv_lora_rank=40,
    rope_columns=(0, 3, 5),
    qk_nope_head_dim=24,
    input_size=64,
    scale=0.2,
)
BATCH = ((1, 7), (1, 150), (96, 96), (80, 200), (3, 120), (1, 1))
"""New tokens and all tokens of each request: steps, a prompt, a part of one, a few tokens behind a prefix, a step."""


@needs_triton
def test_kernel_and_plain_torch_equal_float64() -> None:
    errors = results_of("paged_latent_cases.py")["errors"]
    assert len(errors) == (32 if DEVICE == "cuda" else 64)  # plain torch is no GPU's
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

    sizes = choose_sizes(1, heads, rank, slots, most_new, 8192)
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
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
            options=options,
        )
    assert made.metadata.shared <= HOPPER
    assert "wgmma.mma_async" in made.asm["ptx"] or "mma.sync" in made.asm["ptx"]


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"window": 50},
        {"softcap": 3.0},
        {"sinks": True},
        {"rope_columns": ()},
        {"qk_nope_head_dim": 0},
        {"head_dim": 32, "qk_nope_head_dim": 32},  # which the kernel for prompts takes on a GPU
        {"head_dim": 48, "qk_nope_head_dim": 48, "v_head_dim": 32, "rope_columns": (0, 1, 2, 3), "window": 70},
    ],
)
def test_a_batch_of_steps_and_prompts_equals_float64(form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Absorbed or with keys and values, heads in blocks, a paged cache in any order, padding."""
    monkeypatch.setattr("attnedit.targets.runtime.vllm.paged_attention.EXPANDED_BYTES", 1 << 15)
    config = replace(CONFIG, **form)
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    heads, rank, rope, size = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim, 16
    nope, wide = config.qk_nope_head_dim, config.v_head_dim
    torch.manual_seed(0)
    new, lengths = zip(*BATCH, strict=True)
    tokens, blocks = sum(new), [-(-length // size) for length in lengths]
    order = (torch.randperm(sum(blocks)) + 1).tolist()
    table = torch.zeros(len(BATCH), max(blocks), dtype=torch.int32)
    cache = torch.randn(len(order) + 1, size, rank + rope).to(DEVICE, dtype)
    query, turned = (torch.randn(tokens + 2, heads, n).to(DEVICE, dtype) for n in (config.head_dim, rope))
    weight = (torch.randn(heads * (nope + wide), rank) * rank**-0.5).to(DEVICE, dtype)
    sinks = torch.randn(heads).to(DEVICE, dtype) if config.sinks else None
    kept, places, wanted, first = [], [], [], 0
    up = weight.double().view(heads, nope + wide, rank)
    for request, (count, length) in enumerate(BATCH):
        own = [order.pop() for _ in range(blocks[request])]
        table[request, : len(own)] = torch.tensor(own)
        rows = torch.randn(length, rank + rope).to(DEVICE, dtype)
        at = torch.tensor(own).repeat_interleave(size)[:length] * size + torch.arange(length) % size
        write(rows[:-count], cache, at[:-count].to(DEVICE))
        kept.append(rows[-count:])
        places.append(at[-count:])
        key, value = torch.einsum("hdr,sr->hsd", up, rows[:, :rank].double()).split((nope, wide), dim=-1)
        for token, head in itertools.product(range(count), range(heads)):
            high = length - count + token + 1
            seen = slice(0 if config.window is None else max(0, high - config.window), high)
            product = key[head, seen] @ query[first + token, head, :nope].double()
            product = (product + rows[seen, rank:].double() @ turned[first + token, head].double()) * config.scale
            if config.softcap is not None:
                product = config.softcap * (product / config.softcap).tanh()
            weights = product.exp()
            total = weights.sum() + (0 if sinks is None else sinks[head].double().exp())
            wanted.append(weights / total @ value[head, seen])
        first += count
    write(torch.cat(kept), cache, torch.cat(places).to(DEVICE))
    write(torch.full_like(kept[0], float("nan")), cache, torch.full((len(kept[0]),), -1, device=DEVICE))
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    placed = (x.to(DEVICE) for x in (starts, torch.tensor(lengths, dtype=torch.int32), table))
    found = attend_batch(query, turned, weight, cache, Pages(*placed, max(new), max(lengths)), config, sinks)
    assert not found[tokens:].any()
    right = torch.stack(wanted).view(tokens, heads, wide)
    assert (found[:tokens] - right).norm() / right.norm() < (1e-2 if DEVICE == "cuda" else 1e-6)


def test_prompts_are_expanded_and_steps_are_not() -> None:
    found = list(runs(*zip(*BATCH, strict=True), CONFIG))
    assert found == [Run(0, 2, False), Run(2, 3, True), Run(3, 4, True), Run(4, 6, False)]

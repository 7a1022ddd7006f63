"""Attention over a paged cache of latents, by its kernel and in plain torch, against float64; prints JSON. A program.

Triton decides when it is imported whether kernels are interpreted, so that cannot be switched on inside a test.
"""

import itertools
import json
import sys
from typing import Any

import torch
from torch import Tensor

from attnedit.targets.runtime.vllm.paged_latents import Logits, Pages, attend, attend_on_gpu, write_on_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter of triton 3.9 takes bfloat16 for integers.
DTYPES = (torch.float16, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16)
SHAPES = ((3, 6, 4, 16), (9, 40, 0, 12), (2, 130, 22, 32), (20, 16, 2, 128))
"""Heads, latent, slots, tokens of a block: none of all a power of two; more heads than a block of them."""
BATCHES: dict[str, tuple[tuple[int, int], ...]] = {
    "steps": ((1, 5), (1, 33), (1, 1)),
    "steps in parts": ((1, 1100), (1, 3)),
    "prompts": ((7, 7), (21, 21)),
    "parts of prompts and steps": ((9, 30), (1, 40), (5, 5)),
}
"""New tokens and all tokens of each request."""
FORMS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 6},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "all": {"window": 9, "softcap": 2.0, "sinks": True},
}
PADDING = 2
"""Tokens behind those of all requests, as graphs of one size have them."""


def expected(query: Tensor, rows: Tensor, rank: int, logits: Logits) -> Tensor:
    """The last queries [t, H, w] of one request over its rows [S, w], query by query and head by head, in float64."""
    new, keys = query.shape[0], rows.shape[0]
    out = torch.zeros((*query.shape[:2], rank), dtype=torch.float64, device=query.device)
    for token, head in itertools.product(range(new), range(query.shape[1])):
        last = keys - new + token + 1
        seen = rows[0 if logits.window is None else max(0, last - logits.window) : last].double()
        found = seen @ query[token, head].double() * logits.scale
        if logits.softcap is not None:
            found = logits.softcap * (found / logits.softcap).tanh()
        weights = found.exp()
        total = weights.sum() + (0 if logits.sinks is None else logits.sinks[head].double().exp())
        out[token, head] = weights / total @ seen[:, :rank]
    return out


def case(dtype: torch.dtype, shape: tuple[int, ...], batch: str, form: str) -> dict[str, float]:
    heads, rank, slots, size = shape
    requests = BATCHES[batch]
    width, new = rank + slots, [count for count, _ in requests]
    tokens = sum(new)
    blocks = [-(-length // size) for _, length in requests]
    order = torch.randperm(sum(blocks) + 1).tolist()
    table = torch.full((len(requests), max(blocks)), 10**6, dtype=torch.int32)  # free places are never read
    cache = torch.full((len(order), size, width), float("nan"), dtype=dtype, device=DEVICE)
    options = FORMS[form]
    sinks = torch.randn(heads, device=DEVICE).to(dtype) if options.get("sinks") else None
    logits = Logits(0.5 * width**-0.5, options.get("window"), options.get("softcap"), sinks)
    query = torch.randn(tokens + PADDING, heads, width).to(dtype)
    wanted, first = [], 0
    for request, (count, length) in enumerate(requests):
        rows = torch.randn(length, width).to(dtype)
        for block in range(blocks[request]):
            table[request, block] = order.pop()
            part = rows[block * size : (block + 1) * size]
            place = int(table[request, block]) * size + torch.arange(part.shape[0], device=DEVICE)
            # The last is not kept.
            given = torch.cat((part, part[:1])).to(DEVICE)
            write_on_gpu(given, cache, torch.cat((place, torch.full_like(place[:1], -1))))
            assert torch.equal(cache[table[request, block], : part.shape[0]], given[:-1])
        wanted.append(expected(query[first : first + count].to(DEVICE), rows.to(DEVICE), rank, logits))
        first += count
    starts = torch.tensor([0, *itertools.accumulate(new)], dtype=torch.int32)
    lengths = torch.tensor([length for _, length in requests], dtype=torch.int32)
    placed = (starts.to(DEVICE), lengths.to(DEVICE), table.to(DEVICE))
    pages = Pages(*placed, most_new=max(new), longest=max(length for _, length in requests))
    errors = {}
    # Plain torch is for processors, and reads whole blocks only up to the last token.
    for name, function in (("kernel", attend_on_gpu), ("plain", attend)):
        if name == "kernel" or DEVICE == "cpu":
            found = function(query.to(DEVICE), cache, rank, pages, logits)
            assert found.isfinite().all(), (name, dtype, shape, batch, form)
            assert not found[tokens:].any()
            right = torch.cat(wanted)
            error = (found[:tokens].double() - right).norm() / right.norm()
            errors[f"{name} {dtype} {shape} {batch} {form}"] = float(error)
    return errors


def main() -> None:
    torch.manual_seed(0)
    errors: dict[str, float] = {}
    forms, batches = list(FORMS), list(BATCHES)
    for number, (dtype, shape) in enumerate(itertools.product(DTYPES, SHAPES)):
        for place, batch in enumerate(batches):
            # The interpreter is slow: every form with every batch, and with every shape, not all three.
            errors |= case(dtype, shape, batch, forms[(number + place) % len(forms)])
    json.dump({"errors": errors}, sys.stdout)


if __name__ == "__main__":
    main()

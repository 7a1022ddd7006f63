"""`generate` over static caches on a GPU: the step compiled by transformers (``mode="reduce-overhead"``) against plain.

    python benchmarks/gpu_generate.py          # the same tokens, graphs compiled, tokens per second of both
    python benchmarks/gpu_generate.py --only times
    python benchmarks/gpu_generate.py --tiny   # a trial of the program, on a processor, without compiling

Weights are random. Tokens are compared in float32 on a small model, as bfloat16 rounds differently in fused kernels;
times are those of Qwen3-8B's shape. Graphs are counted for a first and for a second call, which should compile none.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any

import torch
from gpu_models import TARGETS, TINY, Models, Shape
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

SMALL = replace(
    Shape(),
    layers=4,
    hidden=512,
    intermediate=1024,
    heads=8,
    groups=2,
    vocabulary=1000,
    lengths=(512,),
    dtype=torch.float32,
)


def prompts(shape: Shape, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Random prompts; every other one is padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, shape.vocabulary, (batch, length), generator=generator).to(shape.device)
    mask = torch.ones_like(ids)
    mask[1::2, : length // 3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def graphs() -> int:
    """Graphs compiled so far in this process."""
    return int(counters["stats"]["unique_graphs"])


def same_tokens(model: PreTrainedModel, shape: Shape, tokens: int) -> dict[str, Any]:
    """Generate plain, and twice over a static cache."""
    call: dict[str, Any] = {**prompts(shape, 3, 21), "max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    plain = model.generate(**call)
    before = graphs()
    first = model.generate(**call, cache_implementation="static")
    between = graphs()
    second = model.generate(**call, cache_implementation="static")
    return {
        "same": torch.equal(first, plain) and torch.equal(second, plain),
        "graphs": between - before,
        "graphs_again": graphs() - between,
    }


def tokens_per_second(model: PreTrainedModel, shape: Shape, batch: int, tokens: int, **options: Any) -> float:
    """Of a second call, which has nothing to compile."""
    call: dict[str, Any] = {**prompts(shape, batch, 128), "do_sample": False, "eos_token_id": None, **options}
    for _ in range(2):
        model.generate(**call, max_new_tokens=tokens)
        if shape.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        model.generate(**call, max_new_tokens=tokens)
        if shape.device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return batch * tokens / seconds


@torch.no_grad()
def main() -> None:
    """Check tokens, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a processor")
    parser.add_argument("--only", choices=("tokens", "times"))
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    # What transformers compiles for a GPU of its own accord, it leaves alone elsewhere.
    shapes = {"tokens": TINY, "times": TINY} if options.tiny else {"tokens": SMALL, "times": Shape()}
    for what, shape in shapes.items():
        if options.only not in (None, what):
            continue
        models = Models(shape)
        for target in TARGETS:
            model = models.make(target)
            model.set_attn_implementation("sdpa")
            if what == "tokens":
                print(target, same_tokens(model, shape, options.tokens), flush=True)
                continue
            plain = tokens_per_second(model, shape, options.batch, options.tokens)
            static = tokens_per_second(model, shape, options.batch, options.tokens, cache_implementation="static")
            print(f"{target}: {plain:.1f} tokens/s plain, {static:.1f} compiled", flush=True)
            del model
            torch._dynamo.reset()
        del models


if __name__ == "__main__":
    main()

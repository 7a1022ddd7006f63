"""Decode speed and cache memory of rewritten models beside their source, in one run.

    python benchmarks/decode.py smollm2 result [another ...] --lengths 1024,8192,32768

Caches are filled with random keys and values, since what they hold changes nothing here and a prefill of 32k tokens
takes long on a processor. The models take turns, token by token, so that noise of the machine meets all alike.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.model_io.models import load_source


@torch.inference_mode()
def filled_cache(model: PreTrainedModel, length: int, ids: torch.Tensor) -> DynamicCache:
    """A cache of `length` random tokens, of the kind that the model makes of an empty one."""
    cache = DynamicCache(config=model.config)
    model(ids, **with_cache(model, cache))
    for layer in cache.layers:
        more = [torch.randn_like(part).expand(-1, -1, length - 1, -1) for part in (layer.keys, layer.values)]
        layer.update(*(part.contiguous() for part in more))
    return cache


def cache_bytes(cache: DynamicCache) -> int:
    """Bytes of all storages that the cache keeps alive."""
    storages: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif hasattr(value, "__dict__"):
            for inner in vars(value).values():
                add(inner)

    for layer in cache.layers:
        add(layer)
    return sum(storages.values())


@torch.inference_mode()
def step(model: PreTrainedModel, cache: DynamicCache, ids: torch.Tensor, position: int) -> float:
    """Seconds of one decode step."""
    places = torch.full_like(ids, position)
    _wait(ids)
    start = time.perf_counter()
    model(ids, **with_cache(model, cache), position_ids=places)
    _wait(ids)
    return time.perf_counter() - start


def _wait(ids: torch.Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def main() -> None:
    """Print one line per length and model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="source first, then results")
    parser.add_argument("--lengths", default="1024,8192,32768")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=20, help="timed tokens; the median counts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    models = {name: load_source(name, device=options.device, dtype=options.dtype).model for name in options.models}
    print(f"{'cached':>7} {'model':<28} {'ms/token':>9} {'speed':>6} {'cache MiB':>10} {'share':>6}")
    for length in map(int, options.lengths.split(",")):
        ids = torch.ones((options.batch, 1), dtype=torch.int64, device=options.device)
        caches = {name: filled_cache(model, length, ids) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for index in range(options.tokens + 2):
            for name, model in models.items():
                seconds = step(model, caches[name], ids, length + index)
                if index > 1:  # the first two warm up
                    times[name].append(seconds)
        first = options.models[0]
        base, size = statistics.median(times[first]), cache_bytes(caches[first])
        for name in models:
            median, held = statistics.median(times[name]), cache_bytes(caches[name])
            print(
                f"{length:>7} {name:<28} {1e3 * median:>9.1f} {base / median:>5.2f}x {held / 2**20:>10.1f} "
                f"{held / size:>6.3f}",
                flush=True,
            )


if __name__ == "__main__":
    main()

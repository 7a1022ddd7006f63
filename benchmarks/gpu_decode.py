"""Decode on one GPU, close to its memory limit: an attention layer, then whole models, source and results side by side.

    python benchmarks/gpu_decode.py --out gpu-decode.json
    python benchmarks/gpu_decode.py --plot gpu-decode.json docs/images/gpu-decode.svg

Everything has the shape of Qwen3-8B and random weights, bf16. Times are medians over replays of CUDA graphs, read from
CUDA events; what fits into the cache of the chip is rotated among copies that do not. The most important cases come
first, and each is saved when it is done: `--seconds` stops between two.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gpu_models
import torch
import torch.nn.functional as F
from gpu_models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, MLA_SHAPES, SINK_TOKENS, WINDOW, mla_config
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, StaticCache

from attnedit.targets.attention import MLA, GateSWA, GateSWAConfig
from attnedit.targets.attention.gateswa_layers import bounded_layer
from attnedit.targets.attention.latent_decode import latent_decode

LENGTHS, BATCHES = (32768, 8192, 2048, 131072), (32, 1, 128)
DTYPE, BYTES = torch.bfloat16, 2
ROTATED = 256 << 20
"""Bytes that calls in a row go through, at least: several times the chip's cache."""
Calls = list[Callable[[], object]]


class Report:
    """Results by case, saved after each; knows how much time is left."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        self.values: dict[str, Any] = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def add(self, part: str, **values: Any) -> None:
        """Save one case and print it."""
        self.values.setdefault(part, []).append(values)
        self.out.write_text(json.dumps(self.values, indent=1))
        print(part, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)


def microseconds(calls: Sequence[Callable[[], object]], repeats: int = 15) -> float:
    """Median time of one of `calls`, which run in turn inside one CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(stop) for start, stop in events) / len(calls)


def bandwidth() -> tuple[float, float]:
    """Bytes per second of the best large copy, read and written counted, and of a large sum, which only reads."""
    x = torch.randn(1 << 29, device="cuda", dtype=DTYPE)
    y = torch.empty_like(x)
    size = x.numel() * BYTES
    copy = min(microseconds([lambda: y.copy_(x)]), microseconds([lambda: torch.add(x, 0, out=y)]))
    return 2 * size / copy * 1e6, size / microseconds([lambda: x.sum()]) * 1e6


class Filled:
    """A cache that is full: what it returns is all there."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Write nothing."""
        return self.keys, self.values

    def get_seq_length(self, layer: int = 0) -> int:
        """Return the number of tokens."""
        return self.keys.shape[2]


def source_calls(batch: int, length: int, copies: int, backend: SDPBackend | None) -> Calls:
    """Attention of one query per sequence to grouped keys and values."""
    query = _random(batch, HEADS, 1, HEAD_DIM)
    caches = [[_random(batch, KV_HEADS, length, HEAD_DIM) for _ in range(2)] for _ in range(copies)]

    def call(keys: Tensor, values: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

    return [lambda pair=pair: call(*pair) for pair in caches]


def mla_calls(batch: int, length: int, copies: int, shape: tuple[int, int], whole: bool) -> Calls:
    """One step of MLA: the kernel alone, or with cache projection, rotation and the absorbed products around it."""
    rank, slots = shape
    caches = [(_random(batch, length, rank), _random(batch, length, 2 * slots)) for _ in range(copies)]
    if not whole:
        query, rope = _random(batch, HEADS, rank) / rank**0.5, _random(batch, HEADS, 2 * slots) / rank**0.5
        return [lambda pair=pair: latent_decode(query, rope, *pair) for pair in caches]
    module = MLA(mla_config(0, shape), device="cuda", dtype=DTYPE)
    query, states = _random(batch, HEADS, 1, HEAD_DIM), _random(batch, 1, module.config.input_size)
    angle = torch.rand(batch, 1, HEAD_DIM // 2, device="cuda")
    cos, sin = angle.cos().to(DTYPE), angle.sin().to(DTYPE)
    filled = [Filled(latent[:, None], rotated[:, None]) for latent, rotated in caches]
    return [lambda cache=cache: module(query, states, cos, sin, None, cache) for cache in filled]


def window_calls(batch: int, length: int, compiled: bool) -> Calls:
    """One step of GateSWA over its ring, the write included; with a gate per head."""
    config = GateSWAConfig(
        0, HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM, HIDDEN, WINDOW, HEAD_DIM**-0.5, gate="head", sink_tokens=SINK_TOKENS
    )
    module = GateSWA(config, device="cuda", dtype=DTYPE)
    step = torch.compile(module, dynamic=False) if compiled else module
    query, hidden = _random(batch, HEADS, 1, HEAD_DIM), _random(batch, 1, HIDDEN)
    key, value = _random(batch, KV_HEADS, 1, HEAD_DIM), _random(batch, KV_HEADS, 1, HEAD_DIM)
    calls = []
    for _ in range(4):
        cache = StaticCache(LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1), length)
        layer = bounded_layer(cache, config)
        module(query, key, value, hidden, None, cache)
        layer.cumulative_length.fill_(length - 1)
        calls.append(lambda cache=cache: step(query, key, value, hidden, None, cache))
    return calls


def window_bytes(batch: int) -> int:
    """What a window holds."""
    return batch * (WINDOW + SINK_TOKENS) * 2 * KV_HEADS * HEAD_DIM * BYTES


def measure(report: Report, batch: int, length: int, name: str, size: int, make: Callable[[], Calls]) -> None:
    """Time one form, and set it against the bandwidths; what does not run or fit is only said."""
    torch.cuda.empty_cache()
    try:
        time_us = microseconds(make())
    except (RuntimeError, ValueError) as error:
        print("layer", batch, length, name, str(error).strip().splitlines()[-1][:120], flush=True)
        return
    rate = size / time_us * 1e6
    shares = {"of_copy": rate / report.values["copy"], "of_read": rate / report.values["read"]}
    report.add("layer", batch=batch, length=length, name=name, us=time_us, bytes=size, **shares)


def layer_case(report: Report, batch: int, length: int) -> None:
    """All forms of one layer at one batch and length."""
    time_it = functools.partial(measure, report, batch, length)
    values = 2 * KV_HEADS * HEAD_DIM
    full = batch * length * values * BYTES
    if full + (2 << 30) < torch.cuda.mem_get_info()[0]:
        backends = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
        for name, backend in backends.items():
            time_it(f"source {name}", full, functools.partial(source_calls, batch, length, _copies(full), backend))
    for name, (rank, slots) in MLA_SHAPES.items():
        size = batch * length * (rank + 2 * slots) * BYTES
        around = (HEADS * 2 * HEAD_DIM * rank + (rank + 2 * slots) * values + HEADS * 2 * slots * HEAD_DIM) * BYTES
        if size + (2 << 30) > torch.cuda.mem_get_info()[0]:
            continue
        copies = _copies(size)
        for whole in (False, True):
            label = name if whole else f"{name} kernel"
            make = functools.partial(mla_calls, batch, length, copies, (rank, slots), whole)
            time_it(label, size + around * whole, make)
    time_it(f"GateSWA {WINDOW}", window_bytes(batch), functools.partial(window_calls, batch, length, False))


def plot(results: Path, image: Path) -> None:
    """Draw tokens per second against context length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = json.loads(results.read_text())
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for name in dict.fromkeys(case["name"] for case in values["model"]):
        cases = sorted((c for c in values["model"] if c["name"] == name), key=lambda c: c["length"])
        best = {c["length"]: max(x["tokens_per_s"] for x in cases if x["length"] == c["length"]) for c in cases}
        axes.plot(list(best), list(best.values()), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="cached tokens per sequence", ylabel="tokens per second")
    axes.set_xticks([2048, 8192, 32768], ["2k", "8k", "32k"])
    axes.set_title(f"Qwen3-8B's shape, largest batch that fits, {values['device']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=DTYPE)


def _copies(size: int) -> int:
    return max(1, -(-ROTATED // size))


@torch.no_grad()
def main() -> None:
    """Run the cases in order of importance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-decode.json"))
    parser.add_argument("--seconds", type=float, default=1e9, help="stop when they are over")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "IMAGE"), help="only draw earlier results")
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
        return
    report = Report(options.out, options.seconds)
    report.values["copy"], report.values["read"] = bandwidth()
    report.add("bandwidth", copy=report.values["copy"], read=report.values["read"])
    layer_case(report, BATCHES[0], LENGTHS[0])
    models = gpu_models.Models()
    gpu_models.run(models, report, LENGTHS[0])
    for length in LENGTHS[1:3]:
        gpu_models.run(models, report, length)
    del models
    torch.cuda.empty_cache()
    for length in LENGTHS:
        for batch in BATCHES:
            if (batch, length) != (BATCHES[0], LENGTHS[0]) and report.left() > 8:
                layer_case(report, batch, length)
    if report.left() > 30:
        batch, length = BATCHES[0], LENGTHS[0]
        make = functools.partial(window_calls, batch, length, True)
        measure(report, batch, length, f"GateSWA {WINDOW}, compiled", window_bytes(batch), make)


if __name__ == "__main__":
    main()

"""Decode on one GPU, close to its memory limit: an attention layer, then whole models, source and results side by side.

    python benchmarks/gpu_decode.py --out gpu-decode.json
    python benchmarks/gpu_decode.py --steps --out gpu-step.json
    python benchmarks/gpu_decode.py --compiled --out gpu-decode-compiled.json
    python benchmarks/gpu_decode.py --plot gpu-decode.json gpu-decode.svg
    python benchmarks/gpu_decode.py --tiny --out tiny.json     # a trial of the program, on a processor

Everything has the shape of Qwen3-8B and random weights, bfloat16 unless asked otherwise. Times are medians over replays
of CUDA graphs, read from CUDA events; what fits into the cache of the chip is rotated among copies that do not.
The most important cases come first, and each is saved when it is done: `--seconds` stops between two.
"""

from __future__ import annotations

import argparse
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from gpu_models import TINY, Models, Shape
from gpu_timing import Report, free_bytes, median_seconds
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import LlamaConfig, StaticCache

from attnedit.targets.attention import MLA, GateSWA, GateSWAConfig
from attnedit.targets.attention.gateswa.layers import bounded_layer
from attnedit.targets.attention.mla.decode import latent_decode

Calls = list[Callable[[], object]]
BACKENDS = {"default": None, "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
SPARE = 2 << 30
"""Bytes left free beside a cache."""
FEW = ((1, 2048), (8, 2048), (32, 2048), (1, 8192), (8, 8192), (1, 32768))
"""Small batches and their cached tokens."""


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


class Layer:
    """One layer's attention at one batch and length, in all forms."""

    def __init__(self, shape: Shape, report: Report, batch: int, length: int) -> None:
        self.shape, self.report, self.batch, self.length = shape, report, batch, length
        self.item = shape.dtype.itemsize
        self.window_bytes = batch * (shape.window + shape.sink_tokens) * shape.kv_values * self.item

    def run(self) -> None:
        """Measure every form that fits."""
        shape, tokens = self.shape, self.batch * self.length
        size = tokens * shape.kv_values * self.item
        for name, backend in BACKENDS.items():
            self.measure(f"source {name}", size, size, functools.partial(self.source_calls, backend))
        for name, (rank, slots) in shape.latents.items():
            values = rank + 2 * slots
            size = tokens * values * self.item
            products = 2 * shape.heads * shape.head_dim * rank  # down to the latent, up from it
            around = values * shape.kv_values + 2 * slots * shape.heads * shape.head_dim
            step = size + (products + around) * self.item
            if shape.device == "cuda":
                self.measure(f"MLA {name} kernel", size, size, functools.partial(self.kernel_calls, name))
                each = functools.partial(self.kernel_calls, name, by_row=True)
                self.measure(f"MLA {name} kernel, lengths by row", size, size, each)
            self.measure(f"MLA {name}", step, size, functools.partial(self.step_calls, name))
        self.measure(f"GateSWA {shape.window}", self.window_bytes, self.window_bytes, self.window_calls)

    def measure(self, name: str, moved: int, cached: int, make: Callable[[int], Calls]) -> None:
        """Time one form, and set what must move against the bandwidths; what does not fit or run is only said."""
        if cached + SPARE > free_bytes(self.shape.device) and self.shape.device == "cuda":
            return
        try:
            calls = make(max(1, -(-self.shape.rotated // cached)))
            time_us = 1e6 * median_seconds(lambda: [call() for call in calls], self.shape.device, 15) / len(calls)
        except (RuntimeError, ValueError) as error:
            print("layer", self.batch, self.length, name, str(error).strip().splitlines()[-1][:120], flush=True)
            return
        rate, values = moved / time_us * 1e6, self.report.values
        shares = {"of_copy": rate / values["copy"], "of_read": rate / values["read"]}
        case = {"batch": self.batch, "length": self.length, "name": name}
        self.report.add("layer", **case, us=time_us, bytes=moved, **shares)

    def source_calls(self, backend: SDPBackend | None, copies: int) -> Calls:
        """Attention of one query per sequence to grouped keys and values."""
        shape = self.shape
        query = self.random(self.batch, shape.heads, 1, shape.head_dim)
        size = (self.batch, shape.groups, self.length, shape.head_dim)

        def call(keys: Tensor, values: Tensor) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)

        return [functools.partial(call, self.random(*size), self.random(*size)) for _ in range(copies)]

    def kernel_calls(self, latent: str, copies: int, by_row: bool = False) -> Calls:
        """The kernel of MLA alone; by row, each sequence is one token shorter than the one before."""
        rank, slots = self.shape.latents[latent]
        query, rope = (self.random(self.batch, self.shape.heads, size) / rank**0.5 for size in (rank, 2 * slots))
        mask: Tensor | None = None
        if by_row:
            places, rows = (torch.arange(end, device=self.shape.device) for end in (self.length, self.batch))
            mask = places < (self.length - rows)[:, None]
        return [functools.partial(latent_decode, query, rope, *self.latents(latent), mask) for _ in range(copies)]

    def step_calls(self, latent: str, copies: int) -> Calls:
        """One step of MLA: cache projection, rotation and the absorbed products around the kernel."""
        shape = self.shape
        module = MLA(shape.mla(0, latent), device=shape.device, dtype=shape.dtype)
        query, states = (
            self.random(self.batch, shape.heads, 1, shape.head_dim),
            self.random(self.batch, 1, shape.kv_values),
        )
        angle = self.random(self.batch, 1, shape.head_dim // 2)
        arguments = (query, states, angle.cos(), angle.sin(), None)
        caches = [Filled(*(part[:, None] for part in self.latents(latent))) for _ in range(copies)]
        return [functools.partial(module, *arguments, cache) for cache in caches]

    def window_calls(self, copies: int, compiled: bool = False) -> Calls:
        """One step of GateSWA with a gate per head over its ring, the write included."""
        shape = self.shape
        config = GateSWAConfig(
            layer_idx=0,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            head_dim=shape.head_dim,
            v_head_dim=shape.head_dim,
            hidden_size=shape.hidden,
            sliding_window=shape.window,
            scale=shape.head_dim**-0.5,
            gate="head",
            sink_tokens=shape.sink_tokens,
        )
        module = GateSWA(config, device=shape.device, dtype=shape.dtype)
        step = torch.compile(module, dynamic=False) if compiled else module
        query, hidden = (
            self.random(self.batch, shape.heads, 1, shape.head_dim),
            self.random(self.batch, 1, shape.hidden),
        )
        key, value = (self.random(self.batch, shape.groups, 1, shape.head_dim) for _ in range(2))
        calls: Calls = []
        for _ in range(min(copies, 4)):
            one = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
            cache = StaticCache(one, self.length)
            layer = bounded_layer(cache, config)
            module(query, key, value, hidden, None, cache)
            layer.cumulative_length.fill_(self.length - 1)
            calls.append(functools.partial(step, query, key, value, hidden, None, cache))
        return calls

    def latents(self, latent: str) -> tuple[Tensor, Tensor]:
        """A latent cache."""
        rank, slots = self.shape.latents[latent]
        return self.random(self.batch, self.length, rank), self.random(self.batch, self.length, 2 * slots)

    def random(self, *size: int) -> Tensor:
        """Normal numbers."""
        return torch.randn(size, device=self.shape.device, dtype=self.shape.dtype)


def bandwidth(shape: Shape) -> tuple[float, float]:
    """Bytes per second of the best large copy, read and written counted, and of a large sum, which only reads."""
    x = torch.randn(2 * shape.rotated, device=shape.device, dtype=shape.dtype)
    y = torch.empty_like(x)
    size = x.numel() * x.element_size()
    copies = (lambda: y.copy_(x), lambda: torch.add(x, 0, out=y))
    copy = min(median_seconds(call, shape.device, 15) for call in copies)
    return 2 * size / copy, size / median_seconds(x.sum, shape.device, 15)


def plot(results: Path, image: Path) -> None:
    """Draw tokens per second against context length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = json.loads(results.read_text())
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    lengths = sorted({case["length"] for case in values["model"]})
    for name in dict.fromkeys(case["name"] for case in values["model"]):
        best: dict[int, float] = {}
        for case in values["model"]:
            if case["name"] == name:
                best[case["length"]] = max(best.get(case["length"], 0), case["tokens_per_s"])
        axes.plot(sorted(best), [best[length] for length in sorted(best)], marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="cached tokens per sequence", ylabel="tokens per second")
    axes.set_xticks(lengths, [f"{length:,}" for length in lengths], minor=False)
    axes.set_xticks([], minor=True)
    axes.set_title(f"Qwen3-8B's shape, the largest batch that fits, {values['device']}", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    image.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(image)


@torch.no_grad()
def main() -> None:
    """Run the cases in order of importance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-decode.json"))
    parser.add_argument("--seconds", type=float, default=1e9, help="stop when they are over")
    parser.add_argument(
        "--compiled", action="store_true", help="only models of four layers, through torch.compile, at small batches"
    )
    parser.add_argument("--steps", action="store_true", help="only layers at small batches, with what surrounds them")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help="of all but --tiny")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a processor")
    parser.add_argument("--plot", nargs=2, type=Path, metavar=("JSON", "IMAGE"), help="only draw earlier results")
    options = parser.parse_args()
    if options.plot:
        plot(*options.plot)
        return
    shape = TINY if options.tiny else Shape(dtype=getattr(torch, options.dtype))
    report = Report(options.out, options.seconds, shape.device)
    if options.compiled:
        small = Models(replace(shape, layers=4))
        for length in (2048, 8192) if not options.tiny else shape.lengths[:1]:
            small.run(report, length, batches=(1, 8, 32), compiled=True)
        return
    report.values["copy"], report.values["read"] = bandwidth(shape)
    report.add("bandwidth", copy=report.values["copy"], read=report.values["read"])
    if options.steps:
        for batch, length in FEW if not options.tiny else [(1, shape.lengths[0])]:
            layer = Layer(shape, report, batch, length)
            layer.run()
            make = functools.partial(layer.window_calls, compiled=True)
            layer.measure(f"GateSWA {shape.window}, compiled", layer.window_bytes, layer.window_bytes, make)
        return
    first = Layer(shape, report, shape.batches[0], shape.lengths[0])
    first.run()
    models = Models(shape)
    for length in shape.lengths[:3]:
        models.run(report, length)
    del models
    for length in shape.lengths:
        for batch in shape.batches:
            if (batch, length) != (first.batch, first.length) and report.left() > 8:
                Layer(shape, report, batch, length).run()
    if report.left() > 30:
        make = functools.partial(first.window_calls, compiled=True)
        first.measure(f"GateSWA {shape.window}, compiled", first.window_bytes, first.window_bytes, make)


if __name__ == "__main__":
    main()

"""Decode speed of exported models beside their source, in one run, on ONNX Runtime.

    python benchmarks/onnx_decode.py --layer --lengths 1024,8192,32768
    python benchmarks/onnx_decode.py smollm2 half quarter window --lengths 1024,4096,8192,32768

The first measures one attention layer of Qwen3-8B's shape (32 heads, 8 groups of 128) with random weights and next to
no hidden size, so that what is timed is attention. The second measures whole models: a source, then results of
``attnedit compile``. Both add the source through ONNX Runtime's own GroupQueryAttention with a shared buffer, the
fastest fused kernel it has for such a cache.

Caches are filled with random values, since what they hold changes nothing here. The models take turns, a few tokens
at a time, so that noise of the machine meets all alike; first-token time and resident memory are of one process each.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import torch
from torch import Tensor
from transformers import AttentionInterface, Cache, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.model_io.models import load_source
from attnedit.passes.budget import source_values
from attnedit.passes.mla.fit import build
from attnedit.passes.mla.shapes import Shape
from attnedit.passes.mla.weights import Factors
from attnedit.targets.runtime.check import cases
from attnedit.targets.runtime.eager import share_copy, splice
from attnedit.targets.runtime.onnx import Decoding, OnnxModel, export
from attnedit.targets.runtime.onnx.attention import EXPORT, export_attention
from attnedit.targets.runtime.onnx.cache import ExportLayer, current_step

TURN = 5
"""Tokens that a model decodes in a row."""

GROUP_QUERY = "com.microsoft::GroupQueryAttention"


class FusedLayer(ExportLayer):
    """A layer whose buffer is written by GroupQueryAttention itself."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Hand the new tokens on, with the layer they belong to."""
        key_states.layer = self  # type: ignore[attr-defined]
        return key_states, value_states


def fused_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float | None = None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention by GroupQueryAttention: appends to the shared buffer, then attends."""
    layer, step = key.layer, current_step()  # type: ignore[attr-defined]
    flat = [part.transpose(1, 2).flatten(2) for part in (query, key, value)]
    last = (step.start + step.length - 1).to(torch.int32)
    total = torch.tensor(step.real.shape[1], dtype=torch.int32)
    outputs = torch.onnx.ops.symbolic_multi_out(
        GROUP_QUERY,
        (*flat, layer.keys, layer.values, last, total),
        {
            "num_heads": query.shape[1],
            "kv_num_heads": key.shape[1],
            "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        },
        dtypes=(query.dtype, key.dtype, value.dtype),
        shapes=(flat[0].shape, layer.keys.shape, layer.values.shape),
        version=1,
    )
    out, layer.keys, layer.values = outputs
    return out.unflatten(-1, (query.shape[1], -1)), None


def export_fused(model: PreTrainedModel, directory: Path) -> None:
    """Export a source with GroupQueryAttention in place of our formulation."""

    def cache(past: Any, form: Any) -> Cache:
        return Cache(layers=[FusedLayer(key, value, form) for key, value in past])

    def single(edges: Iterable[int]) -> Iterator[Any]:
        return (case for case in cases(edges) if case[0] == 1)  # the kernel knows no left padding

    AttentionInterface.register(EXPORT, fused_attention)
    try:
        with (
            mock.patch("attnedit.targets.runtime.onnx.program.export_cache", cache),
            mock.patch("attnedit.targets.runtime.check.cases", single),
        ):
            export(SimpleNamespace(model=model, tokenizer=None), directory, cache="static")
    finally:
        AttentionInterface.register(EXPORT, export_attention)


def layer_variants() -> dict[str, PreTrainedModel]:
    """One attention layer of Qwen3-8B's shape: source and results."""
    config = Qwen3Config(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
    )
    torch.manual_seed(0)
    source = Qwen3ForCausalLM(config).eval()
    site = capture(source)[0]

    def latent(rank: int, slots: int) -> PreTrainedModel:
        shape = Shape(rank, slots)
        source_size, heads = source_values(site), site.num_attention_heads
        factors = Factors(
            torch.randn(rank, source_size) / source_size**0.5,
            torch.randn(2 * slots, source_size) / source_size**0.5,
            torch.arange(slots) * (64 // slots),
            torch.randn(heads, site.head_dim, rank) / rank**0.5,
            torch.randn(heads, 2 * slots, site.head_dim) / site.head_dim**0.5,
            torch.randn(heads, 64, rank) / rank**0.5,
        )
        result = share_copy(source)
        splice(result, {site.name: build(result, site, shape, factors)})
        return result

    tokens = torch.randint(0, 64, (1, 1024))
    window = attnedit.compile(source, "gateswa", window=128, full_layers=0, gate="head", calibration=tokens).model
    return {
        "source": source,
        "MLA 1/2": latent(944, 40),
        "MLA 512 + 64": latent(512, 32),
        "MLA 1/4": latent(432, 40),
        "GateSWA 128": window,
    }


def filled(model: OnnxModel, length: int, room: int) -> Decoding:
    """A text of `length` random tokens in the cache, and room for more."""
    state = model.decoding(1, length + room)
    generator = np.random.default_rng(0)
    for layer in model.manifest.layers:
        for name in layer.names("past_key_values"):
            shape = state.cache[name].shape()
            if layer.tokens is None and not state.buffers:
                shape[2] = length
            values = generator.standard_normal(shape, dtype=np.float32).astype(state.dtype)
            state.cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(values)
    state.mask = np.ones((1, length), dtype=np.int64)
    return state


def cache_bytes(state: Decoding, length: int) -> int:
    """Bytes of the cache, without the room for more."""
    total = 0
    for layer in state.model.manifest.layers:
        tokens = length if layer.tokens is None else layer.tokens
        total += layer.heads * tokens * (layer.key_size + layer.value_size) * state.dtype.itemsize
    return total


def measure(directories: dict[str, Path], lengths: list[int], tokens: int, threads: int) -> None:
    """Print a line for each length and model; the first is what the others are compared with."""
    models = {name: OnnxModel(directory, threads) for name, directory in directories.items()}
    print(f"{'cached':>7} {'model':<32} {'ms/token':>9} {'quartiles':>15} {'speed':>7} {'cache MiB':>10}")
    token = np.ones((1, 1), dtype=np.int64)
    for length in lengths:
        states = {name: filled(model, length, 2 * tokens + 2 * TURN) for name, model in models.items()}
        times: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(-(-tokens // TURN)):
            for name, state in states.items():
                # The threads of a session spin for a while after its run, and would be in the way of the next one's.
                time.sleep(0.1)
                for index in range(-1, TURN):
                    start = time.perf_counter()
                    state.feed(token)
                    if index >= 0:  # the first of a turn finds cold caches
                        times[name].append(1e3 * (time.perf_counter() - start))
        base = statistics.median(next(iter(times.values())))
        for name, found in times.items():
            low, middle, high = statistics.quantiles(found, n=4)
            print(
                f"{length:>7} {name:<32} {middle:>9.2f} {f'{low:.2f}-{high:.2f}':>15} {base / middle:>6.2f}x "
                f"{cache_bytes(states[name], length) / 2**20:>10.1f}",
                flush=True,
            )


def alone(directory: str, length: int, threads: int) -> None:
    """Seconds to the first token of a prompt, and memory that model and cache take after a step, as JSON."""
    before = resident()
    model = OnnxModel(directory, threads)
    state = model.decoding(1, length + 2)
    prompt = np.random.default_rng(0).integers(0, model.manifest.vocab_size, (1, length))
    start = time.perf_counter()
    for begin in range(0, length, 256):
        state.feed(prompt[:, begin : begin + 256])
    first = time.perf_counter() - start
    state.feed(prompt[:, :1])
    print(json.dumps({"first": first, "MiB": resident() - before}))


def resident() -> float:
    """Resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    """Export everything asked for, then measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="source first, then results")
    parser.add_argument("--layer", action="store_true", help="one attention layer of Qwen3-8B's shape")
    parser.add_argument("--lengths", default="1024,8192,32768")
    parser.add_argument("--tokens", type=int, default=20, help="timed tokens; the median counts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=1024, help="tokens of the prompt for first-token time")
    parser.add_argument("--exports", type=Path, help="keep the exported models here, and use those that are there")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        alone(options.alone, options.prompt, options.threads)
        return
    if options.layer:
        models = layer_variants()
    else:
        models = {name: load_source(name, device="cpu", dtype="float32").model for name in options.models}
    with tempfile.TemporaryDirectory() as folder:
        exports = options.exports or Path(folder)
        directories = {}
        for index, (name, model) in enumerate(models.items()):
            if not index:
                directories[f"{name}, GroupQueryAttention"] = exports / "fused"
                if not (exports / "fused").exists():
                    export_fused(model, exports / "fused")
            for form in ("static", "dynamic"):
                directories[f"{name}, {form}"] = target = exports / f"{index}-{form}"
                if not target.exists():
                    export(SimpleNamespace(model=model, tokenizer=None), target, cache=form)
        measure(directories, [int(length) for length in options.lengths.split(",")], options.tokens, options.threads)
        print(f"\n{'model':<32} {f'first token of {options.prompt}, s':>24} {'resident MiB':>13}")
        for name, directory in directories.items():
            command = [sys.executable, __file__, "--alone", str(directory), "--prompt", str(options.prompt)]
            command += ["--threads", str(options.threads)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            print(f"{name:<32} {found['first']:>24.2f} {math.ceil(found['MiB']):>13}")


if __name__ == "__main__":
    main()

"""Memory and time of compiling a checkpoint layer by layer: a model of Qwen3-8B's shape with random weights, on disk.

    python benchmarks/low_memory.py DIRECTORY --alternations 0

Writes the checkpoint into DIRECTORY unless it is there (16 GB for 36 layers in bfloat16) and compiles it beside; prints
seconds per shard and the largest resident set of the process. `--stop-after N` stops N shards later, as if killed: the
same command goes on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config

import attnedit
from attnedit.compiler.model_io.checkpoint_reader import INDEX_FILE
from attnedit.compiler.model_io.models import load_config_only
from attnedit.compiler.reporting.report import peak_memory_bytes

SPREAD = 0.02


def main() -> None:
    """Write, compile, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--target", default="mla")
    parser.add_argument("--kv-budget", type=float, default=0.5)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--alternations", type=int, default=0)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--stop-after", type=int, metavar="N")
    asked = parser.parse_args()
    source, output = asked.directory / "source", asked.directory / "output"
    if not (source / INDEX_FILE).exists():
        write_checkpoint(source, asked.layers)
    written = peak_memory_bytes() / 2**30
    ids = torch.randint(151_000, (asked.tokens // 1024, 1024), generator=torch.Generator().manual_seed(0))
    last = start = perf_counter()
    first: int | None = None

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal last, first
        now = perf_counter()
        took = f"{now - last:.1f} s, peak {peak_memory_bytes() / 2**30:.2f} GiB"
        print(f"{now - start:7.0f} s  {stage} {done}/{total}: {took}", flush=True)
        last = now
        if stage == "rewrite layers":
            first = done if first is None else first
            if asked.stop_after is not None and done >= first + asked.stop_after:
                raise KeyboardInterrupt

    asked_of_target = {"full_layers": "every:4"} if asked.target != "mla" else {"kv_budget": asked.kv_budget}
    report = attnedit.compile_checkpoint(
        source,
        output,
        asked.target,
        **asked_of_target,
        calibration=ids,
        alternations=asked.alternations,
        dtype=asked.dtype,
        progress=tell,
    )
    print(report)
    facts = {"source": size(source), "result": size(output), "writing source": written}
    facts["peak"] = peak_memory_bytes() / 2**30
    print({name: f"{value:.2f} GiB" for name, value in facts.items()})


def write_checkpoint(directory: Path, layers: int) -> None:
    """Random weights of Qwen3-8B's shape in bfloat16, a shard per layer, never more than one in memory."""
    directory.mkdir(parents=True)
    config = Qwen3Config(
        vocab_size=151_936,
        hidden_size=4096,
        intermediate_size=12_288,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
        architectures=["Qwen3ForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    generator = torch.Generator().manual_seed(0)
    places: dict[str, str] = {}
    for number, names in enumerate(parts(directory)):
        shard = f"model-{number:05d}.safetensors"
        state = {}
        for name, shape in names.items():
            value = torch.empty(shape, dtype=torch.bfloat16)
            state[name] = value.fill_(1) if len(shape) == 1 else value.normal_(std=SPREAD, generator=generator)
            places[name] = shard
        save_file(state, directory / shard, {"format": "pt"})
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def parts(directory: Path) -> Iterator[dict[str, torch.Size]]:
    """Names and shapes by shard: each layer, and each weight outside."""
    layers: dict[str, dict[str, torch.Size]] = {}
    for name, value in load_config_only(str(directory)).state_dict().items():
        key = ".".join(name.split(".")[:3]) if ".layers." in name else name
        layers.setdefault(key, {})[name] = value.shape
    yield from layers.values()


def size(directory: Path) -> float:
    """Of all files, GiB."""
    return sum(file.stat().st_size for file in directory.iterdir()) / 2**30


if __name__ == "__main__":
    main()

"""Tokens per second of whole models in vLLM on one GPU, at the largest batch that its cache holds, and first tokens.

    python benchmarks/vllm_throughput.py --out vllm-throughput.json
    python benchmarks/vllm_throughput.py --models "MLA 1/4" --lengths 8192

Qwen3-8B's shape with random weights, bfloat16: the source as vLLM's own class, results of ours through the plugin, and
512 + 64 as a checkpoint of DeepSeek's class. vLLM's own connector for benchmarks fills the cache, as if a prompt of
that length had been read; a step is the median time from one of the engine's steps to the next while all requests are
answered. The first token is that of a prompt of its own, without the connector. Each model has a process of its own.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from gpu_models import TINY, Shape

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the connector is switched in this process
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")
os.environ["HF_HUB_OFFLINE"] = "1"

MODELS = ("source", "MLA 1/2", "MLA 1/4", "MLA 512+64", "DeepSeek 512+64", "GateSWA", "GateSWA + MLA 1/8")
MOST = 1024
"""Sequences at once; more of them change nothing but the run's length."""
NEW = 72
"""Tokens of an answer."""
TRIAL = replace(TINY, head_dim=32, vocabulary=2000)


def write_model(name: str, folder: Path, longest: int, shape: Shape) -> Path:
    """Write the configuration of one model, without weights.

    Args:
        name: one of `MODELS`.
        folder: to write to.
        longest: tokens of its context.
        shape: of the source.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

    from attnedit.compiler.capture.capture import capture
    from attnedit.targets.attention.gateswa.graph import gateswa_config, gateswa_graph
    from attnedit.targets.attention.mla.graph import mla_graph
    from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

    common: dict[str, Any] = {
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "max_position_embeddings": longest,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    }
    if name.startswith("DeepSeek"):
        rank, slots = shape.latents["512+64"]
        native = DeepseekV3Config(
            **common,
            num_key_value_heads=shape.heads,
            first_k_dense_replace=shape.layers,
            q_lora_rank=None,
            kv_lora_rank=rank,
            qk_rope_head_dim=2 * slots,
            qk_nope_head_dim=shape.head_dim,
            v_head_dim=shape.head_dim,
            architectures=["DeepseekV3ForCausalLM"],
        )
        native.save_pretrained(folder)
        return folder
    config = Qwen3Config(**common, num_key_value_heads=shape.groups, head_dim=shape.head_dim)
    config.architectures = ["Qwen3ForCausalLM"]
    if name == "source":
        config.save_pretrained(folder)
        return folder
    with init_empty_weights(include_buffers=False):
        source = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    model = share_copy(source)
    configs: dict[str, Any] = {}
    graphs: dict[str, Any] = {}
    for site in capture(source):
        if name.startswith("GateSWA") and site.layer_idx % 4 != 3:
            window = gateswa_config(site, shape.window)
            configs[site.name], graphs[site.name] = window, gateswa_graph(model, site, window)
        elif name != "GateSWA":
            # A quarter of the layers with a half of the cache each is an eighth of it.
            latent = "1/2" if name.startswith("GateSWA") else name.removeprefix("MLA ")
            configs[site.name] = shape.mla(site.layer_idx, latent)
            graphs[site.name] = mla_graph(model, site, configs[site.name])
    splice(model, graphs)
    made = to_attnedit(model, configs)
    made.config.architectures = [type(made).__name__]
    made.config.save_pretrained(folder)
    return folder


def seconds(engine: Any, batch: int, length: int, new: int) -> float:
    """Time to answer prompts of that length with so many tokens."""
    from vllm import SamplingParams

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 2000, (batch, length), generator=generator)
    prompts = [{"prompt_token_ids": row} for row in ids.tolist()]
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    begin = time.perf_counter()
    engine.generate(prompts, sampling, use_tqdm=False)
    return time.perf_counter() - begin


def step_seconds(engine: Any, batch: int, length: int) -> float:
    """Median time from one step to the next while each of so many requests gets one token.

    The time of whole answers tells less: blocks are handed out and filled before their first step, and how long that
    takes differs between runs by seconds where batches are large.
    """
    scheduler = scheduler_of(engine)
    schedule, steps = scheduler.schedule, []

    def noted(*args: Any, **named: Any) -> Any:
        found = schedule(*args, **named)
        steps.append((time.perf_counter(), found.total_num_scheduled_tokens))
        return found

    with mock.patch.object(scheduler, "schedule", noted):
        seconds(engine, batch, length, NEW)
    pairs = itertools.pairwise(steps)
    gaps = [after - before for (before, first), (after, last) in pairs if first == last == batch]
    if not gaps:
        raise SystemExit(f"{batch} requests of {length} tokens never ran at once; give fewer with --batches")
    return statistics.median(gaps)


def scheduler_of(engine: Any) -> Any:
    """The scheduler of an engine in this process."""
    return engine.llm_engine.engine_core.engine_core.scheduler


def largest_batch(engine: Any, length: int) -> int:
    """How many requests the cache holds while they are answered.

    vLLM's own figure counts for every window the tokens of two steps as well, which a request gives back when its
    prompt has been read. One request must find room for that, so as much as one request may take is left free.
    """
    config = scheduler_of(engine).kv_cache_config
    held = 0
    for group in config.kv_cache_groups:
        spec = group.kv_cache_spec
        window = getattr(spec, "sliding_window", None)
        tokens = length + NEW if window is None else window - 1
        held += -(-tokens // spec.block_size) + (window is not None)
    longest = engine.llm_engine.vllm_config.model_config.max_model_len
    one = -(-config.num_blocks * longest // engine.llm_engine.vllm_config.cache_config.kv_cache_size_tokens)
    return int(min(MOST, 1 + (config.num_blocks - one) // held))


def measure(name: str, lengths: list[int], batches: list[int], most_new: int, shape: Shape, out: Path) -> None:
    """One model, in this process; prints and saves its cases as they come."""
    import vllm
    from vllm import LLM
    from vllm_filled_cache import FilledCache

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        engine = LLM(
            str(write_model(name, Path(folder), max(lengths) + 256, shape)),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_num_seqs=MOST,
            max_num_batched_tokens=most_new,
            enable_prefix_caching=False,
            gpu_memory_utilization=0.92,
            kv_transfer_config={
                "kv_connector": "FilledCache",
                "kv_role": "kv_both",
                "kv_connector_module_path": "vllm_filled_cache",
            },
            disable_hybrid_kv_cache_manager=False,
            compilation_config={"cudagraph_capture_sizes": [1, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024]},
        )
    cache = engine.llm_engine.vllm_config.cache_config
    report: dict[str, Any] = {
        "name": name,
        "vllm": vllm.__version__,
        "device": torch.cuda.get_device_name() if shape.device == "cuda" else shape.device,
        "tokens_a_step": most_new,
        "cache_tokens": cache.kv_cache_size_tokens,
        "start_s": time.perf_counter() - begin,
        "decode": [],
        "first_token": [],
    }

    def save() -> None:
        out.write_text(json.dumps(report, indent=1))

    print(f"{name}: a cache of {cache.kv_cache_size_tokens:,} tokens, {report['start_s']:.0f} s to start", flush=True)
    for length in lengths:
        largest = largest_batch(engine, length)
        for batch in dict.fromkeys((*batches, largest)):
            if not 0 < batch <= largest:
                continue
            FilledCache.filling = True
            seconds(engine, batch, length, 2)
            step = statistics.median(step_seconds(engine, batch, length) for _ in range(2))
            report["decode"].append(
                {"length": length, "batch": batch, "step_ms": 1e3 * step, "tokens_per_s": batch / step}
            )
            print(f"{name} {length} x {batch}: {1e3 * step:.2f} ms a step, {batch / step:,.0f} tokens/s", flush=True)
            save()
        FilledCache.filling = False
        seconds(engine, 1, length, 1)
        first = statistics.median(seconds(engine, 1, length, 1) for _ in range(3))
        report["first_token"].append({"length": length, "ms": 1e3 * first})
        print(f"{name} {length}: first token after {1e3 * first:.0f} ms", flush=True)
        save()


def main() -> None:
    """Each model in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[2048, 8192, 32768])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="beside the largest")
    parser.add_argument("--step", type=int, default=8192, help="new tokens, at most; windows reserve room for them")
    parser.add_argument("--tiny", action="store_true", help="a trial of the program, on a processor")
    parser.add_argument("--out", type=Path, default=Path("vllm-throughput.json"))
    parser.add_argument("--one", action="store_true", help="in this process")
    args = parser.parse_args()
    shape = TRIAL if args.tiny else Shape()
    if args.one:
        measure(args.models[0], args.lengths, args.batches, args.step, shape, args.out)
        return
    found = []
    for name in args.models:
        with tempfile.TemporaryDirectory() as folder:
            own = Path(folder) / "one.json"
            command = [sys.executable, __file__, "--one", "--models", name, "--out", str(own)]
            command += [
                *(["--tiny"] if args.tiny else []),
                "--step",
                str(args.step),
                "--lengths",
                *map(str, args.lengths),
            ]
            done = subprocess.run([*command, "--batches", *map(str, args.batches)], check=False)
            if own.exists():
                found.append(json.loads(own.read_text()))
            if done.returncode:
                print(f"{name}: stopped with {done.returncode}", flush=True)
            args.out.write_text(json.dumps({"models": found}, indent=1))


if __name__ == "__main__":
    main()

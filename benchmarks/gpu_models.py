"""Whole models of Qwen3-8B's shape with random weights, decoding as many sequences as fit (`gpu_decode.py`).

No weight is fitted: new attention gets random weights through the same graphs and configurations as a result of
`attnedit.compile`. Caches are static and full, so that a step attends to all that they hold.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnedit.compiler.capture import capture
from attnedit.compiler.sites import AttentionSite
from attnedit.targets.attention import MLAConfig
from attnedit.targets.attention.gateswa_graph import gateswa_config, gateswa_graph
from attnedit.targets.attention.mla_graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit
from attnedit.targets.runtime.eager.cache import bind_cache

LAYERS, HIDDEN, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 36, 4096, 32, 8, 128, 151936
WINDOW, SINK_TOKENS = 128, 4
MLA_SHAPES = {"MLA 512+64": (512, 32), "MLA 1/4": (424, 44)}
"""kv_lora_rank and rotary slots."""
TARGETS = ["source", "MLA 512+64", "GateSWA", "GateSWA + MLA"]
RESERVED = 4 << 30
"""Bytes left to activations, workspaces and fragmentation."""
MOST = 512
"""Sequences; more of them change nothing but the run's length."""


def mla_config(layer: int, shape: tuple[int, int]) -> MLAConfig:
    """Latent attention of one layer."""
    rank, slots = shape
    return MLAConfig(
        layer_idx=layer,
        num_attention_heads=HEADS,
        head_dim=HEAD_DIM,
        v_head_dim=HEAD_DIM,
        kv_lora_rank=rank,
        rope_columns=tuple(range(slots)),
        qk_nope_head_dim=HEAD_DIM,
        input_size=2 * KV_HEADS * HEAD_DIM,
        scale=HEAD_DIM**-0.5,
    )


class Models:
    """The source and what is made of it; all share the weights of everything but attention."""

    def __init__(self) -> None:
        # Full caches need no mask, and without one the source gets the fused kernel.
        AttentionInterface.register("unmasked", sdpa_attention_forward)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=12288,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            max_position_embeddings=131072,
            tie_word_embeddings=False,
            dtype=torch.bfloat16,
        )
        with torch.device("cuda"), init_empty_weights(include_buffers=False):
            self.source: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        for module in self.source.modules():
            for name, parameter in module.named_parameters(recurse=False):
                made = torch.empty(parameter.shape, device="cuda", dtype=torch.bfloat16)
                made = made.normal_(std=0.02) if made.dim() > 1 else made.fill_(1)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
        self.sites = capture(self.source)

    def make(self, target: str) -> PreTrainedModel:
        """The source, or a copy of it with other attention: every fourth layer stays full beside windows."""
        model = share_copy(self.source)
        if target != "source":
            configs: dict[str, Any] = {}
            graphs = {}
            for site in self.sites:
                made = self._attention(model, site, target)
                if made is not None:
                    configs[site.name], graphs[site.name] = made
            splice(model, graphs)
            model = to_attnedit(model, configs)
        model.set_attn_implementation("unmasked")
        return model.requires_grad_(False).eval()

    def _attention(self, model: PreTrainedModel, site: AttentionSite, target: str) -> tuple[Any, nn.Module] | None:
        if target.startswith("GateSWA") and site.layer_idx % 4 != 3:
            window = gateswa_config(site, WINDOW, sink_tokens=SINK_TOKENS)
            return window, gateswa_graph(model, site, window)
        if target == "GateSWA":
            return None
        latent = mla_config(site.layer_idx, MLA_SHAPES["MLA 512+64"])
        return latent, mla_graph(model, site, latent)


def full_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache of `length` random tokens, the last of them still to come."""
    cache = bind_cache(model, StaticCache(model.config, length))
    model(torch.ones((batch, 1), dtype=torch.long, device="cuda"), past_key_values=cache, logits_to_keep=1)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
        layer.cumulative_length.fill_(length - 1)
    return cache


def bytes_per_sequence(model: PreTrainedModel, length: int) -> int:
    """What the cache of one sequence takes."""
    cache = full_cache(model, 1, length)
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def step_seconds(model: PreTrainedModel, batch: int, length: int, repeats: int = 7) -> float:
    """Median time of one decode step of a whole batch, logits included, as one CUDA graph."""
    cache = full_cache(model, batch, length)
    ids = torch.randint(VOCABULARY, (batch, 1), device="cuda")
    positions = torch.full_like(ids, length - 1)

    def step() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - 1)
        model(ids, past_key_values=cache, position_ids=positions)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        torch.cuda.synchronize()
        times.append(1e-3 * start.elapsed_time(stop))
    return statistics.median(times)


def run(models: Models, report: Any, length: int) -> None:
    """Every target at one length: a few batches, and the largest that fits."""
    for target in TARGETS:
        if report.left() < 12:
            return
        torch.cuda.empty_cache()
        model = models.make(target)
        share = bytes_per_sequence(model, length)
        torch.cuda.empty_cache()
        largest = max(1, min(MOST, (torch.cuda.mem_get_info()[0] - RESERVED) // share))
        for batch in dict.fromkeys((largest, min(8, largest))):
            while batch:
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
                try:
                    seconds = step_seconds(model, batch, length)
                except torch.OutOfMemoryError:
                    batch = batch * 15 // 16
                    continue
                case = {"name": target, "length": length, "batch": batch, "ms": 1e3 * seconds}
                peak = torch.cuda.max_memory_allocated() / 1e9
                report.add("model", **case, tokens_per_s=batch / seconds, peak_gb=peak, cache_mb=share / 1e6)
                break
        del model

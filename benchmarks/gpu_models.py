"""Whole models with random weights, decoding as many sequences as fit (`gpu_decode.py`).

No weight is fitted: new attention gets random weights through the same graphs and configurations as a result of
`attnedit.compile`. Caches are static and full, so that a step attends to all that they hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from gpu_timing import Report, free_bytes, median_seconds, peak_gb
from torch import nn
from transformers import AttentionInterface, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.caches import with_cache
from attnedit.targets.attention import MLAConfig
from attnedit.targets.attention.gateswa.graph import gateswa_config, gateswa_graph
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit
from attnedit.targets.runtime.eager.cache import bind_cache

TARGETS = ["source", "MLA", "GateSWA", "GateSWA + MLA"]


@dataclass(frozen=True)
class Shape:
    """What is measured, and where: Qwen3-8B on a GPU unless said otherwise.

    Attributes:
        latents: kv_lora_rank and rotary slots by name; the first is the whole models'.
        reserved: bytes left to activations, workspaces and fragmentation.
        most: sequences; more of them change nothing but the run's length.
        rotated: bytes that calls in a row go through, at least: several times the chip's cache.
    """

    layers: int = 36
    hidden: int = 4096
    intermediate: int = 12288
    heads: int = 32
    groups: int = 8
    head_dim: int = 128
    vocabulary: int = 151936
    window: int = 128
    sink_tokens: int = 4
    latents: dict[str, tuple[int, int]] = field(
        default_factory=lambda: {"512+64": (512, 32), "1/4": (424, 44), "1/2": (848, 88)}
    )
    lengths: tuple[int, ...] = (32768, 8192, 2048, 131072)
    batches: tuple[int, ...] = (32, 1, 128)
    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    reserved: int = 4 << 30
    most: int = 512
    rotated: int = 256 << 20

    @property
    def kv_values(self) -> int:
        """Keys and values of one token."""
        return 2 * self.groups * self.head_dim

    def mla(self, layer: int, latent: str) -> MLAConfig:
        """Latent attention of one layer."""
        rank, slots = self.latents[latent]
        return MLAConfig(
            layer_idx=layer,
            num_attention_heads=self.heads,
            head_dim=self.head_dim,
            v_head_dim=self.head_dim,
            kv_lora_rank=rank,
            rope_columns=tuple(slot % (self.head_dim // 2) for slot in range(slots)),
            qk_nope_head_dim=self.head_dim,
            input_size=self.kv_values,
            scale=self.head_dim**-0.5,
        )


TINY = Shape(
    layers=4,
    hidden=64,
    intermediate=96,
    heads=8,
    groups=2,
    head_dim=16,
    vocabulary=100,
    window=8,
    sink_tokens=2,
    latents={"512+64": (32, 8), "1/4": (12, 2), "1/2": (16, 4)},
    lengths=(64, 40, 20, 80),
    batches=(4, 1),
    device="cpu",
    dtype=torch.float32,
    reserved=0,
    most=3,
    rotated=1 << 14,
)
"""For a trial of the program itself."""


class Models:
    """The source and what is made of it; all share the weights of everything but attention."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        # Full caches need no mask, and without one the source gets the fused kernel.
        AttentionInterface.register("unmasked", sdpa_attention_forward)
        config = Qwen3Config(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.groups,
            head_dim=shape.head_dim,
            max_position_embeddings=max(shape.lengths),
            tie_word_embeddings=False,
        )
        with torch.device(shape.device), init_empty_weights(include_buffers=False):
            self.source: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=shape.dtype).eval()
        for module in self.source.modules():
            for name, parameter in module.named_parameters(recurse=False):
                made = torch.empty(parameter.shape, device=shape.device, dtype=shape.dtype)
                made = made.normal_(std=0.02) if made.dim() > 1 else made.fill_(1)
                setattr(module, name, nn.Parameter(made, requires_grad=False))
        self.sites = capture(self.source)

    def make(self, target: str, latent: str | None = None) -> PreTrainedModel:
        """The source, or a copy of it with other attention: every fourth layer stays full beside windows.

        Args:
            target: one of `TARGETS`.
            latent: sizes by their name in the shape; None is the first.
        """
        latent = latent or next(iter(self.shape.latents))
        model = share_copy(self.source)
        if target != "source":
            configs: dict[str, Any] = {}
            graphs = {}
            for site in self.sites:
                made = self._attention(model, site, target, latent)
                if made is not None:
                    configs[site.name], graphs[site.name] = made
            splice(model, graphs)
            model = to_attnedit(model, configs)
        model.set_attn_implementation("unmasked")
        return model.requires_grad_(False).eval()

    def _attention(
        self, model: PreTrainedModel, site: AttentionSite, target: str, latent: str
    ) -> tuple[Any, nn.Module] | None:
        if target.startswith("GateSWA") and site.layer_idx % 4 != 3:
            window = gateswa_config(site, self.shape.window, sink_tokens=self.shape.sink_tokens)
            return window, gateswa_graph(model, site, window)
        if target == "GateSWA":
            return None
        config = self.shape.mla(site.layer_idx, latent)
        return config, mla_graph(model, site, config)

    def run(self, report: Report, length: int, batches: Sequence[int] = (), compiled: bool = False) -> None:
        """Every target at one length: the largest batch that fits, and one of eight; or the given batches."""
        device = self.shape.device
        for target in TARGETS:
            if report.left() < 12:
                return
            model = self.make(target)
            share = bytes_per_sequence(model, length)
            largest = max(1, min(self.shape.most, (free_bytes(device) - self.shape.reserved) // share))
            for batch in dict.fromkeys(batches or (largest, min(8, largest))):
                free_bytes(device)
                peak_gb(device)
                try:
                    seconds = step_seconds(model, batch, length, compiled)
                except RuntimeError as error:  # of memory, most of all
                    print("model", target, length, batch, str(error).splitlines()[0][:120], flush=True)
                    continue
                case = {"name": target, "length": length, "batch": batch, "compiled": compiled, "ms": 1e3 * seconds}
                layer = (seconds - head_seconds(model, batch)) / self.shape.layers
                case |= {"tokens_per_s": batch / seconds, "layer_us": 1e6 * layer}
                report.add("model", **case, peak_gb=peak_gb(device), cache_mb=share / 1e6)
            del model


def full_cache(model: PreTrainedModel, batch: int, length: int) -> StaticCache:
    """A static cache of `length` random tokens, the last of them still to come."""
    cache: StaticCache = bind_cache(model, StaticCache(model.config, length))
    model(torch.ones((batch, 1), dtype=torch.long, device=model.device), **with_cache(model, cache), logits_to_keep=1)
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    return cache


def bytes_per_sequence(model: PreTrainedModel, length: int) -> int:
    """What the cache of one sequence takes."""
    cache = full_cache(model, 1, length)
    return sum(part.numel() * part.element_size() for layer in cache.layers for part in (layer.keys, layer.values))


def head_seconds(model: PreTrainedModel, batch: int) -> float:
    """Median time of the logits of one token of each sequence, from hidden states."""
    hidden = torch.randn(batch, 1, model.config.hidden_size, device=model.device, dtype=model.dtype)
    return median_seconds(lambda: model.lm_head(hidden), model.device.type, repeats=7)


def step_seconds(model: PreTrainedModel, batch: int, length: int, compiled: bool = False) -> float:
    """Median time of one decode step of a whole batch, logits included; it writes the last token of the cache."""
    cache = full_cache(model, batch, length)
    ids = torch.ones((batch, 1), dtype=torch.long, device=model.device)
    positions = torch.full_like(ids, length - 1)

    def step() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(length - 1)
        forward(ids, **with_cache(model, cache), position_ids=positions)

    forward = model
    if compiled:
        torch._dynamo.reset()  # or the shapes before count as recompilations, of which there may be few
        forward = torch.compile(model, dynamic=False)
    return median_seconds(step, model.device.type, repeats=7)

"""Small random results for vLLM: every kind of attention, in any family, in the form that attnedit saves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from families import build
from tiny_llama import VOCABULARY, make_tokenizer
from torch import fx, nn

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.targets.attention import GateSWAConfig, MLAConfig
from attnedit.targets.attention.gateswa.graph import gateswa_config, gateswa_graph
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import save, share_copy, splice, to_attnedit

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "head_dim": 32,  # the smallest that vLLM's attention takes on a CPU
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
WINDOW = 16
FULL = {"gate": "head", "gate_bias": True, "sink_logit": True, "sink_value": True}


def latent(
    site: AttentionSite, rank: int = 24, columns: Sequence[int] = (0, 2, 5, 7), kv_bias: bool = True
) -> MLAConfig:
    """Latent attention that reads keys and values after the source's norms and biases."""
    return MLAConfig(
        layer_idx=site.layer_idx,
        num_attention_heads=site.num_attention_heads,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        kv_lora_rank=rank,
        rope_columns=tuple(columns),
        qk_nope_head_dim=site.head_dim,
        input_size=site.num_key_value_heads * (site.head_dim + site.v_head_dim),
        scale=site.scale,
        kv_bias=kv_bias,
        softcap=site.softcap,
        sinks=site.sinks is not None,
        window=site.window,
    )


def save_random(
    family: str,
    directory: Path,
    kinds: Sequence[str],
    *,
    ranks: Sequence[int] = (24,),
    columns: Sequence[int] = (0, 2, 5, 7),
    window: int = WINDOW,
    sizes: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Rewrite layer i as ``kinds[i % len(kinds)]``, "mla", "gateswa" or "full", with random weights, and save."""
    model = build(family, **{**SIZES, **(sizes or {})})
    student = share_copy(model)
    configs: dict[str, MLAConfig | GateSWAConfig] = {}
    graphs: dict[str, fx.GraphModule] = {}
    torch.manual_seed(2)
    for index, site in enumerate(capture(model)):
        kind = kinds[index % len(kinds)]
        if kind == "mla":
            config: MLAConfig | GateSWAConfig = latent(site, ranks[index % len(ranks)], columns)
            graph = mla_graph(student, site, config)
        elif kind == "gateswa":
            config = gateswa_config(site, min(window, site.window or window), **(options or FULL))
            graph = gateswa_graph(student, site, config)
        else:
            continue
        for parameter in graph.get_submodule(kind).parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.5)
        configs[site.name], graphs[site.name] = config, graph
    splice(student, graphs)
    return save(to_attnedit(student, configs), directory, tokenizer=make_tokenizer())

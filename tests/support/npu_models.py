"""Tiny models for Ascend, one for every form of attention, and their exports."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from compiled import compile_tiny, source, tokens
from families import build
from gateswa_models import rewrite
from tiny_llama import make_llama
from torch import nn
from transformers import PreTrainedModel

import attnedit
from attnedit.targets.attention import MLA, GateSWA
from attnedit.targets.runtime.npu import Manifest, export

BATCH = 3
SPLIT = {"hidden_size": 96, "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 112}
"""A latent too large for one joined key, and a number of heads that no kernel has."""


@functools.cache
def model(kind: str) -> PreTrainedModel:
    """A model by the form of its attention; what training would make of gates and sinks is random."""
    if kind == "full":
        return source("llama")
    if kind == "held":
        # No experts: in half precision a token that goes to another one decides the comparison of so few.
        return build("deepseek_v3", first_k_dense_replace=2)
    if kind == "joined":
        return compile_tiny(source("llama"), 0.5).model
    if kind == "split":
        return attnedit.compile(make_llama(**SPLIT), kv_budget=0.5, calibration=tokens(4, 32)).model
    if kind == "window":
        return rewrite("llama", window=5)
    if kind == "composition":
        result = attnedit.compile(source("llama"), "gateswa+mla", calibration=tokens(4, 32), window=4, full_layers=1)
        with torch.no_grad():
            for module in result.model.modules():
                if isinstance(module, GateSWA):
                    for parameter in module.parameters():
                        nn.init.normal_(parameter, std=0.5)
        return result.model
    if kind == "experts":
        return compile_tiny(source("qwen3_moe"), 0.5).model
    if kind == "sinks":
        found = compile_tiny(source("gpt_oss"), 0.5).model
        with torch.no_grad():
            for module in found.modules():
                if isinstance(module, MLA) and module.sinks is not None:
                    nn.init.normal_(module.sinks)
        return found
    if kind == "capped":
        return source("gemma2")
    raise AssertionError(kind)


@functools.cache
def exported(kind: str, soc: str = "910b") -> tuple[Path, Manifest]:
    """The export of such a model, in a folder that stays until the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="attnedit-npu-")) / kind
    options: dict[str, Any] = {"batch_size": BATCH, "capacity": 256, "soc": soc}
    return folder, export(SimpleNamespace(model=model(kind), tokenizer=None), folder, **options)

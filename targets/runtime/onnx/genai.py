"""Models for onnxruntime-genai: a cache of one head size, and the configuration that its loader reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import PreTrainedConfig

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.onnx.cache import LayerCache
from attnedit.targets.runtime.onnx.manifest import MODEL_FILE, Manifest

CONFIG_FILE = "genai_config.json"

MODEL_TYPE = "llama"
"""What onnxruntime-genai calls a decoder of tokens, mask, positions and a cache, whatever its graph computes."""

TOKENIZER = "PreTrainedTokenizerFast"
"""A name of tokenizer.json's kind of tokenizer that onnxruntime-extensions knows; transformers' newest it does not."""


def even_split(layers: Sequence[LayerCache]) -> tuple[LayerCache, ...]:
    """Cache layouts with one size for every key and value.

    Latent layers hold latent and slots joined, cut in the middle; shorter ones are filled up with zeros.

    Raises:
        UsageError: onnxruntime-genai has no cache for such layers.

    >>> even_split([LayerCache(0, 1, 80, 16), LayerCache(1, 1, 64, 16)])[1]
    LayerCache(layer=1, heads=1, key_size=48, value_size=48, tokens=None)
    """
    bounded = [layer.layer for layer in layers if layer.tokens is not None]
    if bounded:
        raise UsageError(
            f"--flavor genai: layer {bounded[0]} has a window cache of fixed length, and onnxruntime-genai grows the "
            "cache of every layer alike; use --flavor ort"
        )
    if len({layer.heads for layer in layers}) > 1:
        raise UsageError(
            "--flavor genai: the layers cache different numbers of heads (full and latent attention mixed), and "
            "onnxruntime-genai has one number for all; use --flavor ort"
        )
    if all(layer.key_size == layer.value_size == layers[0].key_size for layer in layers):
        return tuple(layers)
    if layers[0].heads > 1:
        raise UsageError(
            "--flavor genai: keys and values have different sizes, and onnxruntime-genai has one for both; "
            "use --flavor ort"
        )
    size = -(-max(layer.key_size + layer.value_size for layer in layers) // 2)
    return tuple(replace(layer, key_size=size, value_size=size) for layer in layers)


def write_config(manifest: Manifest, directory: Path, text: PreTrainedConfig) -> None:
    """Write genai_config.json, and name the tokenizer as onnxruntime-extensions calls it.

    Where the language model has no token that begins a text, the first that ends one stands for it.
    """
    layer = manifest.layers[0]
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask"}
    if manifest.positions:
        inputs["position_ids"] = "position_ids"
    length = manifest.max_positions or 2**15
    ends = manifest.eos_token_id or [manifest.pad_token_id]
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": MODEL_FILE,
        "head_size": layer.key_size,
        "hidden_size": text.hidden_size,
        "inputs": {
            **inputs,
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": text.num_attention_heads,
        "num_hidden_layers": len(manifest.layers),
        "num_key_value_heads": layer.heads,
    }
    config = {
        "model": {
            "type": MODEL_TYPE,
            "bos_token_id": ends[0] if text.bos_token_id is None else text.bos_token_id,
            "eos_token_id": ends,
            "pad_token_id": manifest.pad_token_id,
            "context_length": length,
            "vocab_size": manifest.vocab_size,
            "decoder": decoder,
        },
        # The cache grows by concatenation, so past and present cannot be one buffer.
        "search": {"do_sample": False, "max_length": length, "past_present_share_buffer": False},
    }
    (directory / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.exists():
        values = {**json.loads(tokenizer.read_text(encoding="utf-8")), "tokenizer_class": TOKENIZER}
        tokenizer.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

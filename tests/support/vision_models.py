"""Tiny vision-language models with random weights, and inputs with an image and left padding for each."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText, PreTrainedModel

IMAGE, PAD = 60, 0

_TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_VIT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "patch_size": 4,
    "image_size": 8,
}
_QWEN_VISION: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "in_channels": 3}
_QWEN: dict[str, Any] = {"image_token_id": IMAGE, "video_token_id": 61, "vision_start_token_id": 58}
_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **_TEXT},
        "vision_config": {"model_type": "clip_vision_model", **_VIT},
        "image_token_index": IMAGE,
    },
    "gemma3": {
        "text_config": {
            "model_type": "gemma3_text",
            **_TEXT,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "query_pre_attn_scalar": 16,
        },
        "vision_config": {"model_type": "siglip_vision_model", **_VIT},
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": 58,
        "eoi_token_index": 59,
    },
    "qwen2_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {**_QWEN_VISION, "embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
        **_QWEN,
    },
    "qwen2_5_vl": {
        "text_config": {**_TEXT, "rope_parameters": _MROPE},
        "vision_config": {
            **_QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "window_size": 8,
            "fullatt_block_indexes": [1],
        },
        **_QWEN,
    },
    "qwen3_vl": {
        "text_config": {**_TEXT, "rope_parameters": {**_MROPE, "mrope_interleaved": True}},
        "vision_config": {
            **_QWEN_VISION,
            "hidden_size": 16,
            "intermediate_size": 24,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        **_QWEN,
    },
}
VISION = list(CONFIGURATIONS)


def build_vision(name: str, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A fresh tiny model of a family, in evaluation mode, with weights large enough that attention matters.

    Args:
        name: of the family.
        seed: of the weights.
        **options: of the whole model's configuration, or of its text tower.
    """
    values = CONFIGURATIONS[name]
    text = {**values["text_config"], **{key: options.pop(key) for key in _TEXT.keys() & options}}
    config = CONFIG_MAPPING[name](**{**values, "text_config": text, "tie_word_embeddings": False, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    result: PreTrainedModel = model.eval()
    return result


@cache
def shared_vision(name: str) -> PreTrainedModel:
    """One model per family for a whole test session; tests leave it as they found it."""
    return build_vision(name)


def image_inputs(name: str) -> dict[str, Tensor]:
    """Two prompts, the shorter one padded on the left, with an image of four tokens each."""
    generator = torch.Generator().manual_seed(1)
    image = [IMAGE] * 4
    rows = [[PAD, PAD, PAD, 5, 6, *image, 7, 8, 9, 10], [11, 12, 13, *image, 14, 15, 16, 17, 18, 19]]
    ids = torch.tensor(rows)
    found = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    if name.startswith("qwen"):
        grid = torch.tensor([[1, 4, 4]] * 2)
        patches = int(grid.prod(-1).sum())
        found["pixel_values"] = torch.randn(patches, 3 * 2 * 4 * 4, generator=generator)
        found["image_grid_thw"] = grid
        found["mm_token_type_ids"] = (ids == IMAGE).int()
    else:
        found["pixel_values"] = torch.randn(2, 3, 8, 8, generator=generator)
    if name == "gemma3":
        found["token_type_ids"] = (ids == IMAGE).long()
    return found


def image_row(name: str) -> tuple[Tensor, dict[str, Tensor]]:
    """The longer prompt [1, T], and what the model takes with it."""
    inputs = image_inputs(name)
    ids = inputs.pop("input_ids")[1:]
    del inputs["attention_mask"]
    return ids, {key: value[len(value) // 2 :] for key, value in inputs.items()}


def logits_with_image(model: PreTrainedModel, name: str) -> Tensor:
    """Logits [2, T, V] of `image_inputs`, zero where there is padding."""
    inputs = image_inputs(name)
    with torch.no_grad():
        found: Tensor = model(**inputs, use_cache=False).logits
    return found * inputs["attention_mask"][..., None]


def logits_of_text(model: PreTrainedModel) -> Tensor:
    """Logits [1, T, V] of a prompt without an image."""
    with torch.no_grad():
        found: Tensor = model(torch.arange(3, 27)[None], use_cache=False).logits
    return found


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a fraction of the largest logit."""
    return float((found - expected).abs().max() / expected.abs().max())

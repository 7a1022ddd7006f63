"""Weights of a rewritten model written as they come: a shard per decoder layer, and shards of the rest."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.transformers_names import ignored_on_save, revert_weight_conversion
from attnedit.compiler.model_io.checkpoint_reader import INDEX_FILE

SHARD_BYTES = 1 << 30
"""The most in one shard of what is outside the layers, unless a single weight is larger."""


@dataclass(frozen=True)
class Shard:
    """One file of a sharded checkpoint.

    Attributes:
        file: its name.
        weights: the source's weights that it stands for.
        layer: index of the decoder layer that these are; None for what is outside.
    """

    file: str
    weights: tuple[str, ...]
    layer: int | None = None


def plan_shards(model: PreTrainedModel, weights: Sequence[str], layers: str) -> list[Shard]:
    """Divide a model's weights: what is outside the layers first, then every layer; `layers` names their list."""
    tensors = model.state_dict()
    count = len(model.get_submodule(layers))  # type: ignore[arg-type]  # a torch.nn.ModuleList
    outside: list[list[str]] = []
    size = 0
    for name in (name for name in weights if not name.startswith(f"{layers}.")):
        own = tensors[name].numel() * tensors[name].element_size()
        if not outside or size + own > SHARD_BYTES:
            outside.append([])
            size = 0
        outside[-1].append(name)
        size += own
    parts: list[tuple[list[str], int | None]] = [(names, None) for names in outside]
    for index in range(count):
        parts.append(([name for name in weights if name.startswith(f"{layers}.{index}.")], index))
    return [
        Shard(f"model-{number:05d}-of-{len(parts):05d}.safetensors", tuple(names), layer)
        for number, (names, layer) in enumerate(parts, start=1)
    ]


def write_shard(model: PreTrainedModel, state: Mapping[str, Tensor], file: Path, part: Path) -> None:
    """Write weights by their live names in the form that the source's checkpoint has them in.

    Args:
        model: that they belong to.
        state: all weights that the conversions of any of them involve.
        file: appears complete or not at all.
        part: where to write before, in the same file system.
    """
    ignored = [re.compile(pattern) for pattern in ignored_on_save(model)]
    kept = {name: value for name, value in state.items() if not any(pattern.fullmatch(name) for pattern in ignored)}
    stored = revert_weight_conversion(model, kept)
    save_file({name: value.contiguous() for name, value in stored.items()}, part, metadata={"format": "pt"})
    os.replace(part, file)


def write_index(directory: Path, shards: Sequence[Shard]) -> None:
    """List which shard has which tensor, read off the shards."""
    places: dict[str, str] = {}
    size = parameters = 0
    for shard in shards:
        with safe_open(directory / shard.file, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # no mapping
                tensor = file.get_slice(name)
                count = torch.Size(tensor.get_shape()).numel()
                places[name] = shard.file
                parameters += count
                size += count * _BYTES[tensor.get_dtype()]
    index = {"metadata": {"total_parameters": parameters, "total_size": size}, "weight_map": places}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


_BYTES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}

"""From a live model to an ONNX graph with cache inputs and outputs, by torch's own exporter.

Shapes: B batch, T new tokens, P cached tokens, S = P + T, or the capacity of fixed buffers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import AttneditError
from attnedit.targets.runtime.eager import share_copy
from attnedit.targets.runtime.onnx.attention import EXPORT, lower
from attnedit.targets.runtime.onnx.cache import CacheForm, LayerCache, Step, export_cache, stepping
from attnedit.targets.runtime.onnx.kernels import widen_bfloat16
from attnedit.targets.runtime.tracing import traceable

# Sizes for tracing: all different, and none that a real dimension of a model is likely to have.
BATCH, LENGTH, PAST = 2, 5, 11

Axes = tuple[int | str | None, ...]
"""Sizes, names of free axes, or None for what is not said."""

AXES: dict[str, Axes] = {
    "input_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "write_indices": ("batch_size",),
    "logits": ("batch_size", "sequence_length", None),
}


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of an exported model.

    Attributes:
        layers: what each layer caches.
        form: "dynamic": the cache grows, and ``attention_mask`` is [B, P + T]; "static" and "fixed": growing layers
            are buffers of a capacity, which is the length of ``attention_mask``, and ``write_indices`` [B] says
            where the new tokens go.
        positions: whether there is an input ``position_ids`` [B, T].
        sizes: numbers for axes that are not free.
    """

    layers: tuple[LayerCache, ...]
    form: CacheForm
    positions: bool
    sizes: Mapping[str, int] = field(default_factory=dict)

    def inputs(self) -> dict[str, Axes]:
        """Return the shape of every input, sizes or names of axes, in order."""
        names = ["input_ids", "attention_mask"]
        names += ["position_ids"] if self.positions else []
        names += ["write_indices"] if self.form != "dynamic" else []
        return self._sized({**{name: AXES[name] for name in names}, **self._cache("past_key_values")})

    def outputs(self) -> dict[str, Axes]:
        """Return the shape of every output, sizes or names of axes, in order."""
        return self._sized({"logits": AXES["logits"], **self._cache("present")})

    def _sized(self, shapes: dict[str, Axes]) -> dict[str, Axes]:
        return {
            name: tuple(self.sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in axes)
            for name, axes in shapes.items()
        }

    def _cache(self, prefix: str) -> dict[str, Axes]:
        past = "past_sequence_length" if prefix == "past_key_values" else "total_sequence_length"
        grown: str = past if self.form == "dynamic" else "total_sequence_length"
        shapes: dict[str, Axes] = {}
        for layer in self.layers:
            tokens = grown if layer.tokens is None else layer.tokens
            for name, size in zip(layer.names(prefix), (layer.key_size, layer.value_size), strict=True):
                shapes[name] = ("batch_size", layer.heads, tokens, size)
        return shapes

    def example(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Make inputs to trace with."""
        sizes = {"batch_size": BATCH, "sequence_length": LENGTH, "past_sequence_length": PAST}
        sizes["total_sequence_length"] = PAST + LENGTH
        made = {}
        for name, axes in self.inputs().items():
            shape = [axis if isinstance(axis, int) else sizes[str(axis)] for axis in axes]
            cached = name.startswith("past_key_values")
            made[name] = torch.zeros(shape, dtype=dtype) if cached else torch.ones(shape, dtype=torch.int64)
        return made


class _CachedModel(nn.Module):
    """A model as a function of tensors alone: the inputs of a signature to its outputs, in order."""

    def __init__(self, model: PreTrainedModel, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        batch, length, total = *ids.shape, mask.shape[1]
        named = [layer.names("past_key_values") for layer in self.signature.layers]
        past = [(inputs[key], inputs[value]) for key, value in named]
        if self.signature.form != "dynamic":
            step = Step(inputs["write_indices"], mask.bool(), 0, length)
        else:
            for layer, (key, _) in zip(self.signature.layers, past, strict=True):
                if layer.tokens is None:
                    torch._check(key.shape[2] + length == total)
            torch._check(total >= length)
            cached = total - length
            step = Step(torch.full((batch,), cached), mask.bool(), cached, length)
        cache: Any = export_cache(past, self.signature.form)
        positions = {"position_ids": inputs["position_ids"]} if self.signature.positions else {}
        with stepping(step):
            call: Any = self.model
            logits = call(input_ids=ids, attention_mask=mask, **with_cache(self.model, cache), **positions).logits
        return logits, *(part for layer in cache.layers for part in (layer.keys, layer.values))


def export_program(model: PreTrainedModel, signature: Signature, opset: int) -> ir.Model:
    """Trace a model, which is left as it was, and translate it to ONNX.

    Raises:
        AttneditError: torch could not trace or translate it.
    """
    copy = share_copy(model)
    lower(copy)
    example = signature.example(copy.dtype)
    shapes = {
        name: {axis: torch.export.Dim.AUTO for axis, size in enumerate(axes) if isinstance(size, str)}
        for name, axes in signature.inputs().items()
    }
    with traceable(copy, EXPORT, "batched_mm", "ONNX"):
        wrapper = _CachedModel(copy, signature).eval()
        traced = torch.export.export(wrapper, (example,), dynamic_shapes=(shapes,), strict=False)
        program = torch.onnx.export(
            traced,
            dynamo=True,
            input_names=list(signature.inputs()),
            output_names=list(signature.outputs()),
            opset_version=opset,
            verbose=False,
        )
    if program is None:
        raise AttneditError(f"{type(model).__name__}: torch.onnx.export returned nothing")
    widen_bfloat16(program.model)
    _name_axes(program.model, signature)
    return program.model


def _name_axes(model: ir.Model, signature: Signature) -> None:
    """Give the axes of all values the names of the signature, in place of torch's symbols.

    Raises:
        AttneditError: an axis that should be free was fixed to a number while tracing.
    """
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for found, axis in zip(value.shape or (), signature.inputs()[str(value.name)], strict=True):
            if not isinstance(axis, str):
                continue
            if isinstance(found, int):
                raise AttneditError(f"tracing fixed {axis} of {value.name} to {found}; the model cannot be exported")
            names.setdefault(str(found), axis)
    for node in model.graph.all_nodes():
        for output in node.outputs:
            if output.shape is not None:
                output.shape = ir.Shape([_renamed(dim, names) for dim in output.shape])
    declared = {**signature.inputs(), **signature.outputs()}
    for value in (*model.graph.inputs, *model.graph.outputs):
        axes = declared[str(value.name)]
        shape = value.shape if value.shape is not None else ir.Shape([None] * len(axes))
        value.shape = ir.Shape([dim if axis is None else axis for dim, axis in zip(shape, axes, strict=True)])


def _renamed(dim: Any, names: dict[str, str]) -> int | str | None:
    if isinstance(dim, int) or dim.value is None:  # a name for what is not known would make all such one size
        return dim if isinstance(dim, int) else None
    return re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(dim))

"""Write a model to a directory as ONNX: export, quantise, check, and only then appear."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from attnedit.compiler.errors import VerificationError
from attnedit.compiler.progress import Progress, stage
from attnedit.targets.runtime.eager import share_copy
from attnedit.targets.runtime.eager.checkpoint import check_free
from attnedit.targets.runtime.onnx.cache import CacheForm, layer_caches
from attnedit.targets.runtime.onnx.check import TOLERANCES, check_model
from attnedit.targets.runtime.onnx.kernels import check_kernels, choose_dtype, choose_opset
from attnedit.targets.runtime.onnx.manifest import MODEL_FILE, Manifest
from attnedit.targets.runtime.onnx.program import Signature, export_program, takes_positions
from attnedit.targets.runtime.onnx.quantize import quantize_weights
from attnedit.targets.runtime.onnx.runner import OnnxModel
from attnedit.targets.runtime.staging import check_choice, staged

EXTERNAL_ABOVE = 2**31 - 2**26
"""Bytes of weights from which they go into a file of their own: protobuf ends at 2 GiB, and the graph needs room."""


def export(
    result: Any,
    directory: str | os.PathLike[str],
    *,
    flavor: str = "ort",
    cache: CacheForm = "dynamic",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    opset: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model as ONNX, and check it against the live one; the directory appears complete or not at all.

    Args:
        result: a `CompileResult`, or anything with a transformers model as ``model`` and perhaps a ``tokenizer``;
            a model that was not rewritten is exported as it is.
        directory: where to; missing or empty.
        flavor: "ort".
        cache: "dynamic" grows the cache with every call, "static" writes into buffers of a fixed capacity.
        dtype: "float32" or "float16"; the model's own unless told.
        quantize: "int8" or "int4" rounds the weights of linear layers; None does not.
        opset: version of the ai.onnx operators; the lowest that does, unless told.
        progress: told what is going on.

    Returns:
        What was written, with the checks it passed.

    Raises:
        UsageError: an argument makes no sense, the directory is not free, or ONNX Runtime cannot run such a model.
        AttneditError: torch could not export the model.
        VerificationError: the exported model computes something else.

    Example:
        >>> from attnedit.targets.runtime.onnx import OnnxModel, export
        >>> export(result, "smollm2-onnx", dtype="float16")  # doctest: +SKIP
    """
    check_choice("--flavor", flavor, ("ort",))
    check_choice("--cache", cache, ("dynamic", "static"))
    if quantize is not None:
        check_choice("--quantize", quantize, ("int8", "int4"))
    number = choose_opset(cache, opset)
    chosen = choose_dtype(dtype, result.model.dtype)
    target = Path(directory).expanduser().resolve()
    check_free(target, overwrite=False)
    model = share_copy(result.model).to(device="cpu", dtype=chosen).eval()
    with staged(target) as staging:
        with stage("export", progress):
            signature = Signature(tuple(layer_caches(model)), cache, takes_positions(model))
            program = export_program(model, signature, number)
            check_kernels(program, number)
        with stage("write", progress):
            save_program(program, staging / MODEL_FILE)
            del program
            if quantize is not None:
                quantize_weights(staging / MODEL_FILE, quantize)
            _check_file(staging / MODEL_FILE)
            manifest = _manifest(model, signature, number, quantize)
            manifest.write(staging)
            if getattr(result, "tokenizer", None) is not None:
                result.tokenizer.save_pretrained(staging)
            if model.generation_config is not None:
                model.generation_config.save_pretrained(staging)
        with stage("check", progress):
            checks = check_model(model, OnnxModel(staging), TOLERANCES[quantize or manifest.dtype])
            manifest.checks.extend(check.to_dict() for check in checks)
            manifest.write(staging)
    return manifest


def save_program(program: ir.Model, file: Path) -> None:
    """Write a model; weights of 2 GiB and more go into a file beside it, named after it with ".data"."""
    size = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    external = f"{file.name}.data" if size > EXTERNAL_ABOVE else None
    ir.save(program, file, external_data=external)


def _check_file(file: Path) -> None:
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise VerificationError(f"onnx.checker refuses the exported model: {reason}") from error


def _manifest(model: PreTrainedModel, signature: Signature, opset: int, quantize: str | None) -> Manifest:
    config = model.config.get_text_config(decoder=True)
    generation: Any = model.generation_config
    ends = getattr(generation, "eos_token_id", None)
    ends = config.eos_token_id if ends is None else ends
    ends = [] if ends is None else [int(end) for end in (ends if isinstance(ends, list) else [ends])]
    pad = getattr(config, "pad_token_id", None)
    rows: Any = model.get_input_embeddings()
    limit = getattr(config, "max_position_embeddings", None)
    return Manifest(
        source=type(model).__name__,
        cache=signature.form,
        dtype=str(model.dtype).removeprefix("torch."),
        quantize=quantize,
        opset=opset,
        positions=signature.positions,
        vocab_size=int(rows.weight.shape[0]),
        max_positions=None if limit is None else int(limit),
        eos_token_id=ends,
        pad_token_id=int(pad) if pad is not None else ends[0] if ends else 0,
        layers=list(signature.layers),
    )


# Once per process they would say that torchvision is not there, which no language model needs.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)

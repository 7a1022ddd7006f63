"""Write a model to a directory as ONNX: export, quantise, check, and only then appear."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError, VerificationError, first_line
from attnedit.compiler.model_io.heads import check_exportable
from attnedit.compiler.progress import Progress, stage
from attnedit.targets.attention.kinds import kind_of
from attnedit.targets.attention.module import attention_modules
from attnedit.targets.runtime.check import check_model, root_mean_square
from attnedit.targets.runtime.decomposed import lowering_of
from attnedit.targets.runtime.eager import share_copy
from attnedit.targets.runtime.eager.checkpoint import check_free
from attnedit.targets.runtime.onnx.atc import OPSET, fixed_cases, fixed_programs
from attnedit.targets.runtime.onnx.cache import LayerCache, layer_caches
from attnedit.targets.runtime.onnx.genai import even_split, write_config
from attnedit.targets.runtime.onnx.kernels import check_kernels, choose_dtype, choose_opset
from attnedit.targets.runtime.onnx.manifest import MODEL_FILE, FixedSizes, Manifest
from attnedit.targets.runtime.onnx.program import Signature, export_program
from attnedit.targets.runtime.onnx.quantize import quantize_weights
from attnedit.targets.runtime.onnx.runner import OnnxModel
from attnedit.targets.runtime.staging import Exportable, check_choice, generation_facts, staged, write_companions
from attnedit.targets.runtime.tracing import takes_positions

TOLERANCES = {"float32": 1e-3, "float16": 5e-2}
"""Largest tolerated difference of logits, as a fraction of the largest logit."""

ROUNDED_TOLERANCES = {"int8": 0.25, "int4": 1.0}
"""Integer weights are other weights, and the graph was checked before they were rounded. This is the root mean square
of the difference as a fraction of the logits' own, and only tells rounding from a broken model (unrelated: 1.4)."""

EXTERNAL_ABOVE = 2**31 - 2**26
"""Bytes of weights from which they go into a file of their own: protobuf ends at 2 GiB, and the graph needs room."""


def export(
    result: Exportable,
    directory: str | os.PathLike[str],
    *,
    flavor: str = "ort",
    cache: Literal["dynamic", "static"] = "dynamic",
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    opset: int | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model as ONNX, and check it against the live one; the directory appears complete or not at all.

    Args:
        result: a `CompileResult`, or anything with a transformers model as ``model`` and perhaps a ``tokenizer``;
            a model that was not rewritten is exported as it is.
        directory: where to; missing or empty.
        flavor: "ort"; "genai" for onnxruntime-genai: every layer caches keys and values of one size, and its
            configuration is written too; "atc" for Ascend's offline compiler: standard operators of opset 17, a
            graph for prefill and one for decode, every size a number.
        cache: "dynamic" grows the cache with every call, "static" writes into buffers of a capacity chosen when it
            runs; "atc" has its own form.
        dtype: "float32" or "float16"; the model's own unless told.
        quantize: "int8" or "int4" rounds the weights of linear layers; None does not.
        opset: version of the ai.onnx operators; the lowest that does, unless told.
        batch_size: rows, for "atc" alone; 1 unless told.
        seq_len: tokens of one prefill call, for "atc" alone; 128 unless told.
        capacity: tokens that the cache holds, for "atc" alone; 2,048 unless told.
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
    fixed = _check_flavor(
        flavor, cache, quantize, opset, {"batch": batch_size, "sequence_length": seq_len, "capacity": capacity}
    )
    number = OPSET if fixed else choose_opset(cache, opset)
    check_exportable(result.model, "onnx")
    chosen = choose_dtype(dtype, result.model.dtype)
    _check_rope(result.model)
    target = Path(directory).expanduser().resolve()
    check_free(target, overwrite=False)
    source: Any = result.model  # transformers wraps `to`
    model = share_copy(source).to(device="cpu", dtype=chosen).eval()
    with staged(target) as staging:
        with stage("export", progress):
            layers = tuple(layer_caches(model))
            if flavor == "genai":
                layers = _even(model, layers)
            if fixed:
                programs = fixed_programs(model, layers, fixed)
            else:
                signature = Signature(layers, cache, takes_positions(model))
                programs = iter([(MODEL_FILE, export_program(model, signature, number))])
            for file, program in programs:
                check_kernels(program, number)
                save_program(program, staging / file)
                _check_file(staging / file)
        with stage("check", progress):
            manifest = Manifest(
                **generation_facts(model),
                cache="fixed" if fixed else cache,
                quantize=quantize,
                opset=number,
                positions=takes_positions(model),
                layers=list(layers),
                flavor=flavor,
                fixed=fixed,
            )
            manifest.write(staging)
            write_companions(result, model, staging)
            if flavor == "genai":
                write_config(manifest, staging, model.config.get_text_config(decoder=True))
            plan = fixed_cases(fixed) if fixed else None
            checks = check_model(model, OnnxModel(staging), TOLERANCES[manifest.dtype], plan)
        if quantize is not None:
            with stage("quantize", progress):
                quantize_weights(staging / MODEL_FILE, quantize)
                _check_file(staging / MODEL_FILE)
                checks = check_model(model, OnnxModel(staging), ROUNDED_TOLERANCES[quantize], measure=root_mean_square)
        with stage("write", progress):
            manifest.checks.extend(check.to_dict() for check in checks)
            manifest.write(staging)
    return manifest


def _even(model: PreTrainedModel, layers: tuple[LayerCache, ...]) -> tuple[LayerCache, ...]:
    """Caches whose keys and values have one size, as onnxruntime-genai wants them.

    Raises:
        UsageError: an attention that is traced as it is caches two sizes.
    """
    found = even_split(layers)
    for _, module in attention_modules(model):
        layer = module.config.layer_idx
        if lowering_of(module, "onnx") is None and found[layer] != layers[layer]:
            raise UsageError(
                f"layer {layer}: --flavor genai wants keys and values of one size, and {kind_of(module.config).title} "
                f"caches {layers[layer].key_size} and {layers[layer].value_size}; leave --flavor out"
            )
    return found


def _check_rope(model: PreTrainedModel) -> None:
    """Refuse frequencies that are computed anew from the length of each text: a graph has one table."""
    parameters: Any = getattr(model.config, "rope_parameters", None) or {}
    for values in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        if values.get("rope_type") == "dynamic":
            raise UsageError(
                "rope_type 'dynamic' changes with the length of the text, which no ONNX graph can follow; export a "
                "model with another, such as yarn, or run this one with transformers"
            )


def _check_flavor(
    flavor: str, cache: str, quantize: str | None, opset: int | None, sizes: Mapping[str, int | None]
) -> FixedSizes | None:
    """Refuse options that contradict each other; return the sizes of a model that has them all fixed."""
    check_choice("--flavor", flavor, ("ort", "genai", "atc"))
    check_choice("--cache", cache, ("dynamic", "static"))
    if quantize is not None:
        check_choice("--quantize", quantize, ("int8", "int4"))
    if flavor != "ort" and cache != "dynamic":
        raise UsageError(f"--flavor {flavor} has a cache of its own form; leave --cache {cache} out")
    given = {name: size for name, size in sizes.items() if size is not None}
    if flavor != "atc":
        if given:
            raise UsageError("--batch-size, --seq-len and --capacity are for --flavor atc; leave them out")
        return None
    if quantize is not None or opset not in (None, OPSET):
        raise UsageError(f"--flavor atc is of opset {OPSET} and standard operators; leave --quantize and --opset out")
    return FixedSizes(**given)


def save_program(program: ir.Model, file: Path) -> None:
    """Write a model; weights of 2 GiB and more go into a file beside it, named after it with ".data"."""
    size = sum(value.const_value.nbytes for value in program.graph.initializers.values() if value.const_value)
    external = f"{file.name}.data" if size > EXTERNAL_ABOVE else None
    ir.save(program, file, external_data=external)


def _check_file(file: Path) -> None:
    try:
        onnx.checker.check_model(str(file))
    except onnx.checker.ValidationError as error:
        raise VerificationError(f"onnx.checker refuses the exported model: {first_line(error)}") from error


# Once per process they would say that torchvision is not there, which no language model needs.
logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)

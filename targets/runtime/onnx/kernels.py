"""What ONNX Runtime can run: opsets, operators and dtypes, asked of the installed one."""

from __future__ import annotations

from collections.abc import Iterable

import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnxruntime.capi import onnxruntime_pybind11_state

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.onnx.cache import TENSOR_SCATTER_OPSET, CacheForm

LOWEST_OPSET = 18  # torch's exporter translates to this one and newer
DTYPES = {"float32": torch.float32, "float16": torch.float16}

_OPEN = 2**31 - 1


def choose_opset(form: CacheForm, opset: int | None = None) -> int:
    """Return the opset to export with: the lowest that has every operator, unless told.

    An operator's newer version often has no kernel yet, and then runs as dozens of others, many times slower; an
    older one keeps its kernels.

    Raises:
        UsageError: the given one lacks an operator that the form needs, or torch cannot write it.
    """
    least = TENSOR_SCATTER_OPSET if form == "static" else LOWEST_OPSET
    if opset is None:
        return least
    newest = onnx.defs.onnx_opset_version()
    if opset < least or opset > newest:
        why = "TensorScatter is new in 24" if opset < least and form == "static" else "torch writes from 18 on"
        raise UsageError(f"opset {opset} does not do for --cache {form} ({why}); give one from {least} to {newest}")
    return opset


def choose_dtype(dtype: str | torch.dtype | None, own: torch.dtype) -> torch.dtype:
    """Return the dtype to export in: the model's own unless told.

    Raises:
        UsageError: ONNX Runtime has no kernels for it.
    """
    chosen = str(own if dtype is None else dtype).removeprefix("torch.")
    if chosen not in DTYPES:
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} cannot run a language model in {chosen} on the CPU; "
            f"give --dtype {' or '.join(DTYPES)}"
        )
    return DTYPES[chosen]


def widen_bfloat16(model: ir.Model) -> None:
    """Compute in float32 what a model computes in bfloat16, and round: ONNX Runtime has no such kernels on the CPU.

    The numbers stay torch's, which rounds the result of every operator. Some models have such a part whatever their
    dtype, such as Falcon's biases of positions.
    """
    wide, narrow = ir.DataType.FLOAT, ir.DataType.BFLOAT16

    def cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
        node = ir.node("Cast", [value], {"to": int(dtype)})
        node.outputs[0].dtype, node.outputs[0].shape = dtype, value.shape
        return node

    for node in [node for node in model.graph.all_nodes() if node.op_type != "Cast" and node.inputs]:
        assert node.graph is not None
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == narrow:
                widened = cast(value, wide)
                node.graph.insert_before(node, widened)
                node.replace_input_with(index, widened.outputs[0])
        for value in node.outputs:
            if value.dtype == narrow:
                users, value.dtype = list(value.uses()), wide
                rounded = cast(value, narrow)
                node.graph.insert_after(node, rounded)
                for user, index in users:
                    user.replace_input_with(index, rounded.outputs[0])


def check_kernels(model: ir.Model, opset: int) -> None:
    """Refuse a model with an operator that the installed ONNX Runtime has no CPU kernel for.

    Raises:
        UsageError: names the operators.
    """
    missing = missing_kernels({(node.domain, node.op_type) for node in model.graph.all_nodes()}, opset)
    if missing:
        raise UsageError(
            f"onnxruntime {onnxruntime.__version__} has no CPU kernel for {', '.join(missing)} of opset {opset}; "
            "give an older --opset, or leave it out"
        )


def missing_kernels(operators: Iterable[tuple[str, str]], opset: int) -> list[str]:
    """Name those of the operators (domain, name) that have no CPU kernel.

    >>> missing_kernels([("", "Attention")], 24), missing_kernels([("", "Attention")], 25)
    ([], ['Attention-25'])
    """
    ranges: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for kernel in onnxruntime_pybind11_state.get_all_opkernel_def():
        if kernel.provider == "CPUExecutionProvider":
            ranges.setdefault((kernel.domain, kernel.op_name), []).append(kernel.version_range)
    missing = []
    for domain, name in sorted(operators):
        domain = "" if domain == "ai.onnx" else domain
        found = ranges.get((domain, name), [])
        if domain:
            version, fits = 1, bool(found)
        else:
            version = onnx.defs.get_schema(name, opset, domain).since_version
            # A kernel without end is for the version it starts with: what a later one means it cannot know.
            fits = any(start == version or (end != _OPEN and start <= version <= end) for start, end in found)
        if not fits:
            missing.append(f"{name}-{version}")
    return missing

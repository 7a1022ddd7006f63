"""Models for Ascend's offline compiler ATC: one opset that it reads, standard operators, every size a number."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
import onnx_ir as ir
from transformers import PreTrainedModel

from attnedit.compiler.errors import AttneditError
from attnedit.targets.runtime.onnx.cache import LayerCache
from attnedit.targets.runtime.onnx.manifest import FixedSizes
from attnedit.targets.runtime.onnx.program import Signature, export_program
from attnedit.targets.runtime.tracing import takes_positions

OPSET = 17
"""The newest that ATC is documented to read everywhere."""

EXPORTED_OPSET = 18
"""The oldest that torch writes."""

REWRITTEN = ("ReduceL1", "ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSumSquare", "Split")
"""Operators that changed in 18 and that `lower_opset` knows to write as before."""

WIDENED = ("Pad", "ScatterElements", "ScatterND")
"""Operators that 18 gave an input or a reduction more, and else left as they were."""


def fixed_programs(
    model: PreTrainedModel, layers: tuple[LayerCache, ...], sizes: FixedSizes
) -> Iterator[tuple[str, ir.Model]]:
    """Trace a model once for prefill and once for decode.

    Yields:
        file name and graph.

    Raises:
        AttneditError: torch could not trace it, or an operator has no form in the older opset.
    """
    for file, length in sizes.graphs().items():
        axes = {
            "batch_size": sizes.batch,
            "sequence_length": length,
            "total_sequence_length": sizes.capacity,
        }
        signature = Signature(layers, "fixed", takes_positions(model), axes)
        program = export_program(model, signature, EXPORTED_OPSET)
        lower_opset(program)
        yield file, program


def fixed_cases(sizes: FixedSizes) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Batch, padding and lengths of the comparisons that such sizes allow.

    >>> list(fixed_cases(FixedSizes(1, 8, 64)))
    [(1, 0, (8, 1, 1)), (1, 3, (8, 1, 1)), (1, 3, (8, 8, 1))]
    """
    length = sizes.sequence_length
    for padding in (0, min(3, length - 1)):
        yield sizes.batch, padding, (length, *[1] * min(2, sizes.capacity - length))
    if sizes.capacity > 2 * length:
        yield sizes.batch, min(3, length - 1), (length, length, 1)


def lower_opset(model: ir.Model) -> None:
    """Write a model of opset 18 in opset 17, in place; all shapes must be numbers.

    Raises:
        AttneditError: names an operator that has no form there.
    """
    for node in list(model.graph.all_nodes()):
        schema = onnx.defs.get_schema(node.op_type, EXPORTED_OPSET, node.domain)
        if node.op_type == "Split":
            _sizes_of_split(model.graph, node)
        elif node.op_type in REWRITTEN:
            _axes_as_attribute(node)
        elif node.domain or (schema.since_version > OPSET and not _as_before(node)):
            raise AttneditError(f"operator {node.op_type} has no form in opset {OPSET}; --flavor atc cannot hold it")
    model.opset_imports.clear()
    model.opset_imports[""] = OPSET
    model.ir_version = 8  # of opset 17's time


def _as_before(node: ir.Node) -> bool:
    """Whether a widened operator is used as it was before."""
    reduction = node.attributes["reduction"].as_string() if "reduction" in node.attributes else "none"
    return node.op_type in WIDENED and len(node.inputs) <= 3 and reduction not in ("max", "min")


def _axes_as_attribute(node: ir.Node) -> None:
    """Move the axes of a reduction from its second input, as in opset 18, to an attribute, as before."""
    node.attributes.pop("noop_with_empty_axes", None)
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        return
    node.attributes["axes"] = ir.AttrInt64s("axes", [int(axis) for axis in _number(axes).reshape(-1)])
    node.resize_inputs(1)


def _sizes_of_split(graph: ir.Graph, node: ir.Node) -> None:
    """Give a Split its sizes as an input: opset 18 may say the number of outputs instead."""
    if node.attributes.pop("num_outputs", None) is None:
        return
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 0
    lengths = [output.shape[axis] if output.shape is not None else None for output in node.outputs]
    if not all(isinstance(length, int) for length in lengths):
        raise AttneditError(f"the sizes of Split {node.name} are not known; --flavor atc cannot hold it")
    tensor = ir.tensor(np.array(lengths, dtype=np.int64), name=f"{node.outputs[0].name}_sizes")
    value = ir.Value(
        name=tensor.name, const_value=tensor, shape=ir.Shape([len(lengths)]), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    node.resize_inputs(2)
    node.replace_input_with(1, value)


def _number(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """The value of a constant."""
    constant = ir.convenience.get_const_tensor(value)
    if constant is None:
        raise AttneditError(f"the axes {value.name} of a reduction are computed; --flavor atc cannot hold it")
    return np.asarray(constant.numpy())

"""Integer weights, by ONNX Runtime's own quantiser."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx

from attnedit.compiler.errors import UsageError

BLOCK = 32
"""Weights that share a scale, along the input of a linear layer."""

ACCURACY_LEVEL = 4
"""Of MatMulNBits: activations are rounded to int8 for each product, which the fast kernels want."""

BITS = {"int8": 8, "int4": 4}


def quantize_weights(file: Path, form: str) -> None:
    """Round the weights of all linear layers, in place; embeddings and products inside attention stay.

    Raises:
        UsageError: nothing in the model can be rounded.
    """
    with _quiet():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.load(file), bits=BITS[form], block_size=BLOCK, is_symmetric=True, accuracy_level=ACCURACY_LEVEL
        )
        quantizer.process()
    model = quantizer.model.model
    if not any(node.op_type == "MatMulNBits" for node in model.graph.node):
        raise UsageError("the model has no linear layer whose weights could be rounded; leave --quantize out")
    external = file.with_name(f"{file.name}.data")
    if external.exists():
        external.unlink()
    large = model.ByteSize() > 2**31 - 2**26
    onnx.save(model, file, save_as_external_data=large, location=external.name if large else None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Undo what importing and running the quantiser does to logging: it sends every library's to stderr."""
    root, logger = logging.getLogger(), logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer")
    handlers, level = list(root.handlers), root.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)

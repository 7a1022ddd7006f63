"""Names inside vLLM that its plugins have no other way to."""

from __future__ import annotations

from typing import Any


def add_attention(operation: str) -> None:
    """Have compiled graphs cut at an operation, as they are at vLLM's own attention.

    Args:
        operation: ``namespace::name``.
    """
    from vllm.config import CompilationConfig

    operations: Any = CompilationConfig._attention_ops
    if operation not in operations:
        operations.append(operation)

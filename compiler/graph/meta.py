"""Models on the meta device, where shapes are computed and numbers are not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.torch_names import TorchDispatchMode
from attnedit.compiler.graph.anchor import experts_implementation


@contextmanager
def runnable_on_meta(model: PreTrainedModel) -> Iterator[None]:
    """Let a model run a few tokens without padding while inside, though its weights may be on meta."""
    on_meta = any(parameter.is_meta for parameter in model.parameters())
    if not on_meta:
        yield
        return
    # grouped_mm on meta takes bfloat16 only.
    answers: Any = _Answers
    with answers(), experts_implementation(model, "batched_mm"):
        yield


_ASKS = ("_local_scalar_dense", "item", "is_nonzero")


class _Answers(TorchDispatchMode):
    """Answers yes where a model asks for one truth value of a tensor: whether all tokens are real, in practice."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in _ASKS and args[0].is_meta and args[0].dtype == torch.bool:
            return True
        return func(*args, **(kwargs or {}))

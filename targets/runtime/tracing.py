"""What every export by tracing has in common: how a model is called, and how it stands while it is traced."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.errors import AttneditError, UsageError, first_line
from attnedit.compiler.graph.anchor import attention_implementation, experts_implementation
from attnedit.compiler.graph.modules import evaluation_mode


def takes_positions(model: nn.Module) -> bool:
    """Whether a model's forward has ``position_ids``."""
    return "position_ids" in inspect.signature(model.forward).parameters


def kept_tensors(model: nn.Module, index: int, layer: Any, places: str) -> tuple[Tensor, Tensor]:
    """Key and value [B, heads, T, size] that a layer of a cache keeps.

    Raises:
        UsageError: it keeps something else, for which an export has no such places.
    """
    key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
    if isinstance(key, Tensor) and isinstance(value, Tensor) and key.dim() == 4:
        return key, value
    what = f"layer {index} of {type(model).__name__} keeps a {type(layer).__name__}"
    raise UsageError(f"{what}, not keys and values; {places} for such a state")


@contextmanager
def traceable(model: PreTrainedModel, attention: str, experts: str, runtime: str) -> Iterator[None]:
    """Inside the block a model computes attention and experts by these implementations, without gradients.

    Raises:
        AttneditError: tracing inside the block failed; names the runtime.
    """
    try:
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            evaluation_mode(model),
            attention_implementation(model, attention),
            experts_implementation(model, experts),
        ):
            warnings.simplefilter("ignore")  # torch's and onnxscript's own
            yield
    except (RuntimeError, ValueError, TypeError, AssertionError, NotImplementedError) as error:
        kind = type(model).__name__
        raise AttneditError(f"{kind} could not be exported to {runtime}: {first_line(error)}") from error

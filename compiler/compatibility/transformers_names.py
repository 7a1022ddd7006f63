"""Private names of transformers: all that the code relies on, each held by test_compatibility.py.

Public by spelling, but without a promise: how weights are converted as they are loaded and saved. What generation is
overridden in stands in `attnedit.compiler.compatibility.live`, which checkpoints with code of their own carry too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from transformers import PreTrainedModel, masking_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.initialization import guard_torch_init_functions
from transformers.integrations import sdpa_attention
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import import_utils

# What is passed on as it is.
__all__ = [
    "LoadStateDictConfig",
    "WeightConverter",
    "WeightRenaming",
    "convert_and_load_state_dict_in_model",
    "get_model_conversion_mapping",
    "rename_source_key",
    "revert_weight_conversion",
]

ATTENTION_FIELD, EXPERTS_FIELD = "_attn_implementation_internal", "_experts_implementation_internal"
"""Of a configuration. Set directly: the properties check the name against what the class supports, and set it in
sub-configurations."""

CONVERSIONS_MODULE = WeightConverter.__module__
"""Where transformers defines what its own conversions do; a quantiser brings others."""

NOT_SAVED_AS_CODE = {"_auto_class": None}
"""Attributes of a class; set to something, transformers would save its file as the model's own code."""


class LoadingHook:
    """First base of a model class: its methods run once loading has emptied what no checkpoint holds."""

    def _move_missing_keys_from_meta_to_device(self, *args: Any, **kwargs: Any) -> None:
        parent: Any = super()
        parent._move_missing_keys_from_meta_to_device(*args, **kwargs)
        self.missing_keys_filled()

    def missing_keys_filled(self) -> None:
        """Fill what the source's class does not know."""

    def initialize_weights(self) -> None:
        """Give weights that were not loaded random values; those that were stay, whatever `torch.nn.init` is told."""
        parent: Any = super()
        parent.initialize_weights()
        with torch.no_grad(), guard_torch_init_functions():
            self.weights_missing()

    def weights_missing(self) -> None:
        """Give weights that the source's class does not know values by `torch.nn.init`."""


def set_implementations(config: Any, attention: str, experts: str | None = None) -> None:
    """Set the implementations through the properties, which check them."""
    config._attn_implementation = attention
    if experts is not None:
        config._experts_implementation = experts


def attention_of(config: Any) -> str:
    """Name of the attention implementation that a model is set to."""
    return str(config._attn_implementation)


def records_attention(model: PreTrainedModel) -> bool:
    """Whether a model's class has transformers collect the attention weights of its layers."""
    return "attentions" in (getattr(model, "_can_record_outputs", None) or {})


def supports_sdpa(model: Any) -> bool:
    """Whether a model's class says that it works with SDPA."""
    return bool(getattr(model, "_supports_sdpa", False))


def dtype_plan(model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
    """Dtypes of the weights, by parts of names, that a model loads in another dtype than this, its own unless given."""
    return model._get_dtype_plan(model.dtype if dtype is None else dtype)


def conversions_of(model: PreTrainedModel) -> list[Any]:
    """The conversions of weights that loading has left on a model."""
    return list(getattr(model, "_weight_conversions", None) or ())


def set_conversions(model: PreTrainedModel, conversions: Any) -> None:
    """Say which conversions of weights saving has to undo; None for those of the class."""
    live: Any = model  # an attribute of no tensor or module
    live._weight_conversions = conversions


def ignore_on_load(model: PreTrainedModel, patterns: Iterable[str]) -> None:
    """Let a checkpoint hold weights of these names (regular expressions) that the model does not have."""
    known: Any = model._keys_to_ignore_on_load_unexpected or ()
    model._keys_to_ignore_on_load_unexpected = {*known, *patterns}


def ignored_on_save(model: PreTrainedModel) -> list[str]:
    """Names (regular expressions) of weights that are not saved."""
    return list(model._keys_to_ignore_on_save or ())


def apply_gate(experts: Any, up: Any) -> Any:
    """The gate of a mixture's experts: of [R, 2 size] to [R, size]."""
    return experts._apply_gate(up)


def has_default_gate(experts: Any) -> bool:
    """Whether that gate is transformers' default, activation(first half) * second half."""
    return getattr(type(experts)._apply_gate, "__name__", "") == "_default_apply_gate"


@contextmanager
def repeated_heads() -> Iterator[None]:
    """Repeat keys and values for all query heads that share them, in float32 on a CUDA GPU, while inside.

    transformers leaves that to torch, none of whose fused kernels takes shared heads in float32: the logits of all
    tokens with all tokens are then held, 60 GB for 14 heads and 32,768 tokens.
    """
    module: Any = sdpa_attention
    before = module.use_gqa_in_sdpa

    def shared(mask: Tensor | None, key: Tensor, *others: Any) -> bool:
        return not (key.is_cuda and key.dtype == torch.float32) and before(mask, key, *others)

    with mock.patch.object(module, "use_gqa_in_sdpa", shared):
        yield


@contextmanager
def as_if_not_capturing() -> Iterator[None]:
    """Let models do during the capture of a CUDA graph what they do without one, while inside; no packed documents.

    They would make a mask of all tokens by all tokens, where none is needed, lest it be needed in a replay, and look
    whether positions start again.
    """

    def nothing(*_: Any) -> None:
        """Neither a capture nor positions that start again."""

    with (
        mock.patch.object(import_utils, "is_cuda_stream_capturing", nothing),
        mock.patch.object(masking_utils, "find_packed_sequence_indices", nothing),
    ):
        yield

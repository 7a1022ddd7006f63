"""What a live model must be before attnedit works on it, beyond its configuration: each refusal is one line."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.torch_names import is_compiled
from attnedit.compiler.compatibility.transformers_names import attention_of
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.heads import auto_class, auto_of_class

_QUANTISED = {
    "torch.ao.nn.quantized": "torch's dynamic quantisation",
    "torch.ao.nn.intrinsic.quantized": "torch's quantisation",
    "optimum.quanto": "quanto",
    "bitsandbytes": "bitsandbytes",
    "torchao": "torchao",
}
"""Packages whose modules or tensors stand for quantised weights."""


def check_live(model: PreTrainedModel, name: str) -> None:
    """Refuse a live model that could not be rewritten, saved or measured, before any work is done.

    Raises:
        UsageError: it is compiled, has adapters that are not merged, is quantised, has weights that are not in memory,
            has a head that is not known, is to give out attention weights, or makes masks that are no tensors.
    """
    for place, module in model.named_modules():
        where = f"{name}: {place or type(module).__name__}"
        if is_compiled(module):
            raise UsageError(f"{where} is compiled by torch.compile; give the model before that (its _orig_mod)")
        if is_adapter(module):
            raise UsageError(
                f"{where} has an adapter ({type(module).__name__}) that is not merged; merge it first: "
                "model = peft_model.merge_and_unload()"
            )
        _check_plain(module, where)
    if any(kind.__module__.startswith("peft.") for kind in type(model).__mro__):
        raise UsageError(f"{name} is a {type(model).__name__}; give the model in it, merged: merge_and_unload()")
    if auto_of_class(type(model), type(model.config)) is None:
        raise UsageError(
            f"{name} is a {type(model).__name__}, whose head attnedit does not know; load it with "
            f"{auto_class(model.config).__name__}, AutoModel, AutoModelForSequenceClassification or "
            "AutoModelForTokenClassification"
        )
    if getattr(model.config, "output_attentions", False):
        raise UsageError(
            f"the configuration of {name} has output_attentions, which keeps the attention weights of every forward; "
            "set it to false, and ask for them in the calls that want them"
        )

    if attention_of(model.config) == "flex_attention":
        raise UsageError(
            f"{name} is set to flex_attention, whose block masks rewritten attention does not read; "
            "set it to another before: model.set_attn_implementation('sdpa')"
        )


def check_savable(model: PreTrainedModel, name: str) -> None:
    """Refuse a rewritten model whose weights no checkpoint of ours can hold.

    Raises:
        UsageError: some are quantised, or elsewhere without a record of where.
    """
    for place, module in model.named_modules():
        try:
            _check_plain(module, f"{name}: {place or type(module).__name__}")
        except UsageError as error:
            what = str(error).partition(";")[0]
            raise UsageError(f"{what}; save the result before that, and quantise what is loaded") from None
    if not hasattr(model, "hf_device_map"):  # with one, transformers fetches what is elsewhere
        absent = next((key for key, value in model.named_parameters() if value.is_meta), None)
        if absent is not None:
            raise UsageError(f"{name}: {absent} is not in memory (offloaded, or on meta); save the result before that")


def check_in_memory(model: nn.Module, name: str) -> None:
    """Refuse a model some of whose weights are elsewhere.

    Raises:
        UsageError: with the first such weight.
    """
    for key, value in model.named_parameters():
        if value.is_meta:
            raise UsageError(
                f"{name}: {key} is not in memory (offloaded by device_map, or on meta); load the model whole on one "
                "device, or go layer by layer: attnedit compile --low-memory, attnedit.compile_checkpoint"
            )


def is_adapter(module: nn.Module) -> bool:
    """Whether a module is one that PEFT has put an adapter into, or trains a copy of (``modules_to_save``)."""
    return any(
        kind.__name__ in ("BaseTunerLayer", "AuxiliaryTrainingWrapper") and kind.__module__.startswith("peft.")
        for kind in type(module).__mro__
    )


def _check_plain(module: nn.Module, where: str) -> None:
    things: list[tuple[str, Any]] = [("", module), *module.named_parameters(recurse=False)]
    for key, thing in things:
        for tensor in (thing, getattr(thing, "data", thing)):
            kind = f"{type(tensor).__module__}."
            found = next((what for package, what in _QUANTISED.items() if kind.startswith(f"{package}.")), None)
            if found is not None:
                place = f"{where}.{key}" if key else where
                raise UsageError(f"{place} is quantised by {found}; give the model before that, or dequantise it first")
    for key, value in module.named_parameters(recurse=False):
        if not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool:
            raise UsageError(f"{where}.{key} is of {value.dtype}, a quantised weight; give the unquantised model")

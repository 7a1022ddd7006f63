"""Adapters that PEFT has put into a rewritten model: written beside it, and put on again when it is read."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.live_checks import is_adapter

ADAPTERS = "adapters"
"""Folder of a saved model that has a folder for each adapter, by its name."""
_WRAPPED = re.compile(r"\.(token_adapter\.base_layer|base_layer|original_module)\.")
"""Where PEFT keeps what it puts an adapter around."""
_PREFIX = "base_model.model."
"""Of names in files of PEFT."""


def adapters_of(model: PreTrainedModel) -> dict[str, Any]:
    """Configurations of the adapters in a model, by name; empty without any.

    Raises:
        UsageError: there are adapters whose configuration is gone.
    """
    if not any(is_adapter(module) for module in model.modules()):
        return {}
    found: Any = getattr(model, "peft_config", None)
    if not found:
        raise UsageError("the model has adapters but no peft_config; merge them, or save the model that PEFT wraps")
    return dict(found)


def without_adapters(model: PreTrainedModel) -> dict[str, Tensor]:
    """The state of a model as it is without its adapters, by the names that it has then."""
    inside = tuple(f"{name}." for name, module in model.named_modules() if is_adapter(module))
    kept = {}
    for name, value in model.state_dict().items():
        if not name.startswith(inside):
            kept[name] = value
        elif _WRAPPED.search(name):
            kept[_WRAPPED.sub(".", name)] = value
    return kept


def write_adapters(model: PreTrainedModel, adapters: dict[str, Any], directory: Path) -> None:
    """Write each adapter as PEFT does, so that it can also be put on by PEFT alone."""
    if not adapters:
        return
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    for name, config in adapters.items():
        folder = directory / ADAPTERS / name
        folder.mkdir(parents=True)
        state = get_peft_model_state_dict(model, adapter_name=name)
        named = {_PREFIX + key.removeprefix(_PREFIX): value.contiguous() for key, value in state.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)


def read_adapters(model: PreTrainedModel, directory: Path) -> None:
    """Put the adapters on that lie beside a saved model, in place; they are not trained further unless told.

    Raises:
        UsageError: there are some, and PEFT is not installed, or some of their weights have no place.
    """
    folders = sorted(folder for folder in (directory / ADAPTERS).glob("*") if folder.is_dir())
    if folders and importlib.util.find_spec("peft") is None:
        raise UsageError(f"{directory} has adapters of PEFT, which is not installed; install it: pip install peft")
    for folder in folders:
        model.load_adapter(str(folder), adapter_name=folder.name)
        _fill(model, folder)


def _fill(model: PreTrainedModel, folder: Path) -> None:
    """Give an adapter all its weights: transformers passes over some names that PEFT gives them (DoRA's magnitudes)."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.tuners.tuners_utils import cast_adapter_dtype
    from safetensors.torch import load_file

    stored = load_file(folder / "adapter_model.safetensors")
    stored = {name.removeprefix(_PREFIX): value for name, value in stored.items()}
    if any(value.dtype == torch.float32 for value in stored.values()):  # as PEFT keeps them over half precision
        cast_adapter_dtype(model, adapter_name=folder.name)
    set_peft_model_state_dict(model, dict(stored), adapter_name=folder.name)
    found = get_peft_model_state_dict(model, adapter_name=folder.name)
    held = {name: value.detach().cpu() for name, value in found.items()}
    lost = [
        name for name, value in stored.items() if name not in held or not torch.equal(held[name], value.to(held[name]))
    ]
    if lost:
        raise UsageError(f"{folder}: {len(lost)} weights of the adapter could not be put on (first: {lost[0]})")

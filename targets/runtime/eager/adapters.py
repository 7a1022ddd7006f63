"""Adapters that PEFT has put into a rewritten model: written beside it, and put on again when it is read."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.live_checks import is_adapter

ADAPTERS = "adapters"
"""Folder of a saved model that has a folder for each adapter, by its name."""
_WRAPPED = ".base_layer."


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
        elif _WRAPPED in name:
            kept[name.replace(_WRAPPED, ".")] = value
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
        prefix = "base_model.model."
        named = {key if key.startswith(prefix) else prefix + key: value.contiguous() for key, value in state.items()}
        save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(folder)


def read_adapters(model: PreTrainedModel, directory: Path) -> Sequence[str]:
    """Put the adapters on that lie beside a saved model, in place; they are not trained further unless told.

    Raises:
        UsageError: there are some, and PEFT is not installed.
    """
    folders = sorted(folder for folder in (directory / ADAPTERS).glob("*") if folder.is_dir())
    if folders and importlib.util.find_spec("peft") is None:
        raise UsageError(f"{directory} has adapters of PEFT, which is not installed; install it: pip install peft")
    for folder in folders:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return [folder.name for folder in folders]

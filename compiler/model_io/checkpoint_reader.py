"""A checkpoint of safetensors, read into a model on meta part by part, so that memory is needed for one part at a time.

Names and layouts in files may differ from those of the live model (prefixes, experts one by one): transformers' own
conversions are applied to the tensors of each part as they would be to all of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from attnedit.compiler.compatibility.transformers_names import (
    LoadStateDictConfig,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    dtype_plan,
    get_model_conversion_mapping,
    rename_source_key,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.source_checks import check_weights, read_index

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "README.md"]


def checkpoint_directory(model: str, revision: str | None = None) -> Path:
    """The directory of a checkpoint that can be read in parts; one of the hub is fetched.

    Raises:
        UsageError: it cannot be fetched.
    """
    path = Path(model).expanduser()
    if not path.is_dir():
        try:
            path = Path(snapshot_download(model, revision=revision, allow_patterns=_HUB_FILES))
        except (OSError, ValueError) as error:
            raise UsageError(f"{model} could not be fetched from the Hugging Face hub: {error}") from error
    return path


class CheckpointReader:
    """Fills parts of a model on meta from a checkpoint, and empties them again.

    A parameter that is tied to another is filled with it, from whichever of the two the checkpoint has.

    Args:
        directory: with model.safetensors, or shards and their index.
        model: of the checkpoint's configuration, its weights on meta, in the dtype to read them in.
        device: where parts are filled.
        name: of the checkpoint, for messages.

    Attributes:
        stored: names of the model's weights without those that are tied to others, in the model's order.
        conversions: those of transformers' conversions that the checkpoint needed.

    Raises:
        UsageError: files are missing, damaged or not where the index says, or a weight of the model is in none.
    """

    def __init__(self, directory: Path, model: PreTrainedModel, *, device: torch.device, name: str) -> None:
        self._model, self._name = model, name
        self._files = weight_files(directory, name)
        mapping: Any = get_model_conversion_mapping(model)
        self._keys = _keys_by_weight(model, mapping, sorted(self._files))
        self.conversions = [conversion for conversion in mapping if conversion.was_used()]
        self._config = LoadStateDictConfig(
            device_map={"": device},
            dtype=model.dtype,
            dtype_plan=dtype_plan(model),
            weight_mapping=mapping,
        )
        self._untie_what_differs()
        self._ties: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
        weights = list(model.state_dict())
        self.stored = [weight for weight in weights if weight not in self._ties]
        missing = [weight for weight in weights if self._holder(weight) is None]
        if missing:
            raise UsageError(
                f"the checkpoint of {name} lacks {len(missing)} of the model's tensors (first: {missing[0]}); "
                "it is incomplete, or was saved without its language-model head"
            )

    @contextmanager
    def resident(self, weights: Iterable[str]) -> Iterator[None]:
        """Hold the weights of these names (and those tied to them) while inside; not to be nested.

        Raises:
            UsageError: they are not of the model's shape, cannot be converted, or hold NaN or infinity.
        """
        wanted = [weight for weight in dict.fromkeys(weights) if weight in self._keys or weight in self._tied]
        groups = {weight: self._group(weight) for weight in wanted}
        filled = list(dict.fromkeys(name for group in groups.values() for name in group))
        try:
            self._fill({str(self._holder(weight)) for weight in wanted})
            for group in groups.values():
                if len(group) > 1:
                    holder = next(name for name in group if not _get(self._model, name).is_meta)
                    for name in group:
                        _set(self._model, name, _get(self._model, holder))
            check_weights(self._model, self._name)
            yield
        finally:
            for name in filled:
                _empty(self._model, name)
            for group in groups.values():
                for name in group[1:]:
                    _set(self._model, name, _get(self._model, group[0]))

    @contextmanager
    def streaming(self, layers: Iterable[nn.Module]) -> Iterator[None]:
        """Let the model run as if it were whole while inside: each part is read when it is about to compute.

        Args:
            layers: modules to read as a whole; others are read without their children.
        """
        whole = list(layers)
        inner = {module for layer in whole for module in layer.modules()}
        names = {module: name for name, module in self._model.named_modules()}
        with ExitStack() as handles:
            for module, name in names.items():
                if module in inner and module not in whole:
                    continue
                weights = weights_of(self._model, name) if module in whole else own_weights(self._model, name)
                if not weights:
                    continue
                open_parts: list[Any] = []

                def enter(*_: Any, weights: list[str] = weights, parts: list[Any] = open_parts) -> None:
                    part = self.resident(weights)
                    part.__enter__()
                    parts.append(part)

                def leave(*_: Any, parts: list[Any] = open_parts) -> None:
                    if parts:
                        parts.pop().__exit__(None, None, None)

                handles.callback(module.register_forward_pre_hook(enter).remove)
                handles.callback(module.register_forward_hook(leave, always_call=True).remove)
            yield

    def _fill(self, holders: set[str]) -> None:
        keys = sorted({key for holder in holders for key in self._keys[holder]})
        progress = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            with ExitStack() as files:
                handles: dict[Path, Any] = {}
                for file in sorted({self._files[key] for key in keys}):
                    handles[file] = files.enter_context(safe_open(file, framework="pt"))
                state = {key: handles[self._files[key]].get_slice(key) for key in keys}
                info, _ = convert_and_load_state_dict_in_model(self._model, state, self._config)
        except (OSError, SafetensorError, RuntimeError, ValueError) as error:
            raise UsageError(f"cannot read the weights of {self._name}: {type(error).__name__}: {error}") from error
        finally:
            if progress:
                transformers_logging.enable_progress_bar()
        if info.mismatched_keys:
            weight, found, expected = sorted(info.mismatched_keys)[0]
            raise UsageError(
                f"the checkpoint of {self._name} has {weight} as {tuple(found)}, its configuration as {tuple(expected)}"
            )
        if info.conversion_errors:
            weight, reason = next(iter(info.conversion_errors.items()))
            raise UsageError(f"the checkpoint of {self._name} has {weight} in an unknown form: {reason}")
        for holder in holders:
            if _get(self._model, holder).is_meta:
                raise UsageError(f"the checkpoint of {self._name} lacks {holder}; it is incomplete")

    @property
    def _tied(self) -> set[str]:
        return {*self._ties, *self._ties.values()}

    def _group(self, weight: str) -> list[str]:
        """The weight and all that are tied to it, the one that is stored first."""
        source = self._ties.get(weight, weight)
        return [source, *(name for name, of in self._ties.items() if of == source)]

    def _holder(self, weight: str) -> str | None:
        """The one of its group that the checkpoint has."""
        return next((name for name in self._group(weight) if name in self._keys), None)

    def _untie_what_differs(self) -> None:
        """Where a checkpoint has two tied weights that differ, they are not tied: transformers does so."""
        ties: dict[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        for weight, source in list(ties.items()):
            if weight not in self._keys or source not in self._keys:
                continue
            values = []
            for key in (*self._keys[weight], *self._keys[source]):
                with safe_open(self._files[key], framework="pt") as file:
                    values.append(file.get_tensor(key))
            if len(values) == 2 and values[0].shape == values[1].shape and torch.equal(*values):
                continue
            ties.pop(weight)
            _empty(self._model, weight)


def weights_of(model: nn.Module, module: str) -> list[str]:
    """Names of all weights (and stored buffers) of a module of that name, in order."""
    return [name for name in model.state_dict() if name.startswith(f"{module}.")]


def own_weights(model: nn.Module, module: str) -> list[str]:
    """The same without those of its children."""
    prefix = f"{module}." if module else ""
    return [name for name in model.state_dict() if name.startswith(prefix) and "." not in name[len(prefix) :]]


def weight_files(directory: Path, name: str) -> dict[str, Path]:
    """The file of every tensor of a checkpoint, each opened once to see that it is whole.

    Raises:
        UsageError: there are none, or they are not what the index says. An index cannot name a file elsewhere.
    """
    if not (directory / INDEX_FILE).is_file():
        if (directory / WEIGHTS_FILE).is_file():
            return dict.fromkeys(_tensors_in(directory / WEIGHTS_FILE, name), directory / WEIGHTS_FILE)
        raise UsageError(f"{name} holds no {WEIGHTS_FILE} or {INDEX_FILE}; only safetensors can be read layer by layer")
    listed = read_index(directory / INDEX_FILE, name, ".safetensors")
    held = {shard: _tensors_in(directory / shard, name) for shard in set(listed.values())}
    for tensor, shard in listed.items():
        if tensor not in held[shard]:
            raise UsageError(f"{name}/{shard} lacks {tensor}, which its index says it has; get an intact checkpoint")
    return {tensor: directory / shard for tensor, shard in listed.items()}


def _tensors_in(file: Path, name: str) -> set[str]:
    try:
        with safe_open(file, framework="pt") as content:
            return set(content.keys())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{name}/{file.name} is missing, truncated or damaged ({error}); fetch it again") from error


def _keys_by_weight(model: PreTrainedModel, mapping: list[Any], keys: list[str]) -> dict[str, list[str]]:
    """The checkpoint's keys that each weight of the model is made from."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    weights, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        weight, pattern = rename_source_key(key, renamings, converters, prefix, weights)
        if weight not in weights and key in weights:
            weight, pattern = rename_source_key(key, [], [], prefix, weights)
        if weight not in weights:
            continue
        found[weight].append(key)
        if pattern is not None:  # one key may make several weights
            first, *others = by_pattern[pattern].target_patterns
            for other in others:
                if (name := weight.replace(first, other)) in weights and name != weight:
                    found[name].append(key)
    return dict(found)


def _get(model: nn.Module, name: str) -> torch.Tensor:
    owner, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(model.get_submodule(owner), attribute)
    return found


def _set(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, value)


def _empty(model: nn.Module, name: str) -> None:
    """Put a weight back on meta."""
    old = _get(model, name)
    fresh = torch.empty_like(old, device="meta")
    if isinstance(old, nn.Parameter):
        fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
    _set(model, name, fresh)

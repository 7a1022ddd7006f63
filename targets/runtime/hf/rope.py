"""One rotary table for all layers: which frequencies a class can turn its keys by, and where each slot goes in it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.hf.native import OTHER, skeleton

CLOSE = 2e-6
"""Relative difference of two frequencies that are the same one, computed in fp32 twice."""
BY_LENGTH = ("dynamic", "longrope")
"""Rope types whose frequencies change with the length of the text."""

MakeConfig = Callable[[int, dict[str, Any]], PreTrainedConfig]


@dataclass(frozen=True)
class Table:
    """The rotary embedding of a checkpoint.

    Attributes:
        parameters: its ``rope_parameters``.
        frequencies: radians per position [n], of key dims 2 i and 2 i + 1.
        scaling: factor on cos and sin.
    """

    parameters: dict[str, Any]
    frequencies: Tensor
    scaling: float = 1.0

    @property
    def size(self) -> int:
        """``qk_rope_head_dim``."""
        return 2 * len(self.frequencies)

    @property
    def type(self) -> str:
        """``rope_type``."""
        return str(self.parameters["rope_type"])

    def places(self, frequencies: Iterable[float]) -> list[int] | None:
        """Give every slot an entry of its own with its frequency; None where there are not enough.

        >>> Table({"rope_type": "default"}, torch.tensor([1.0, 0.1, 0.1])).places([0.1, 0.1])
        [1, 2]
        """
        free, places = list(enumerate(self.frequencies.tolist())), []
        for wanted in frequencies:
            found = next((entry for entry in free if abs(entry[1] - wanted) <= CLOSE * wanted), None)
            if found is None:
                return None
            free.remove(found)
            places.append(found[0])
        return places


def choose_table(
    layers: list[tuple[float, ...]], source: PreTrainedConfig, make: MakeConfig, size: int | None = None
) -> Table:
    """Find the rotary embedding with a place for every slot of every layer.

    The plain one where frequencies allow it, since engines read no other alike; else the source's own; else
    "longrope", which lists its frequencies one by one.

    Args:
        layers: the slots' frequencies of each layer.
        source: configuration of the source.
        make: makes the checkpoint's configuration from ``qk_rope_head_dim`` and ``rope_parameters``.
        size: ``qk_rope_head_dim``, with a plain table; None for the smallest that does.

    Raises:
        UsageError: no table of that size has the frequencies, or they change with the length of the text.
    """
    needed = list(_union(layers).elements())
    own = flat_rope(source)
    theta = float(own.get("rope_theta") or 0)
    if own.get("rope_type", "default") not in BY_LENGTH:
        sizes = range(max(2, 2 * len(needed)), 2 * _head_dim(source) + 2, 2) if size is None else (size,)
        for candidate in sizes if theta else ():
            table = plain_table(theta, candidate)
            if table.places(needed) is not None:
                return table
    if size is not None:
        raise UsageError(
            f"engines' kernels have {size // 2} rotary frequencies, each once and equally spaced; the model needs "
            f"{len(needed)} ({len(set(needed))} different); leave --kernel-dims out, or compile for fewer cached values"
        )
    rotary_dim = int(_head_dim(source) * own.get("partial_rotary_factor", 1.0))
    sizes_of_own = [2 * len(needed), rotary_dim] if own else []
    if own.get("rope_type") == "longrope":
        sizes_of_own = sizes_of_own[1:]  # its lists of factors have a length
    for candidate in dict.fromkeys(sizes_of_own):
        if candidate and (table := _own_table(own, candidate, make)).places(needed) is not None:
            return table
    if own.get("rope_type") in BY_LENGTH:
        raise UsageError(
            f"rope_type {own['rope_type']!r} changes with the length, and the class has one table; {OTHER}"
        )
    return _listed(needed, int(source.max_position_embeddings))


def plain_table(theta: float, size: int) -> Table:
    """Make the default rotary embedding: frequencies theta^(-2i/size)."""
    frequencies = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    return Table({"rope_type": "default", "rope_theta": theta}, frequencies)


def flat_rope(config: PreTrainedConfig) -> dict[str, Any]:
    """Return ``rope_parameters`` of a source; {} where layers of different types rotate differently."""
    parameters: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    if not nested:
        return dict(parameters)
    return dict(nested[0]) if all(value == nested[0] for value in nested) else {}


def _union(layers: list[tuple[float, ...]]) -> Counter[float]:
    union: Counter[float] = Counter()
    for frequencies in layers:
        union |= Counter(frequencies)
    return union


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _own_table(own: dict[str, Any], size: int, make: MakeConfig) -> Table:
    """Build the source's own rotary embedding in another size, as the class would with the same parameters."""
    parameters = {name: value for name, value in own.items() if name != "partial_rotary_factor"}
    config = copy.deepcopy(make(size, parameters))
    config.num_hidden_layers = 1
    rotary: Any = next(module for module in skeleton(config).modules() if hasattr(module, "attention_scaling"))
    return Table(parameters, rotary.inv_freq.double(), float(rotary.attention_scaling))


def _listed(needed: list[float], positions: int) -> Table:
    """Make a table of any frequencies: longrope divides theta^(-2i/d) by a factor each, and theta may be 1."""
    frequencies = torch.tensor(sorted(needed, reverse=True) or [1.0], dtype=torch.float64)
    factors = (1 / frequencies).tolist()
    parameters = {
        "rope_type": "longrope",
        "rope_theta": 1.0,
        "factor": 1.0,  # what transformers 5.17 wants of every table of a DeepSeek class
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }
    return Table(parameters, frequencies)

"""What can be asked of the GateSWA pass, and what it means for the sites of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.config import Gate, GateSWAConfig
from attnedit.targets.attention.gateswa.graph import gateswa_config

DEFAULT_WINDOW = 128
DEFAULT_SINKS = "logit,value,keep:4"
DEFAULT_GATE: Gate = "none"
FULL_SHARE = 4
"""One layer of so many stays full where nothing says how many."""

FullLayers = int | str | Sequence[int] | None


@dataclass(frozen=True)
class Sinks:
    """What stands for the tokens outside the window.

    Attributes:
        logit: a sink logit per head.
        value: a sink value per key/value head, which needs the logit.
        tokens: kept sink tokens.
    """

    logit: bool = False
    value: bool = False
    tokens: int = 0

    @classmethod
    def parse(cls, text: str) -> Sinks:
        """Read "none", or a list of "logit", "value" and "keep:N" with commas between.

        Raises:
            UsageError: it is something else.

        >>> Sinks.parse("logit,keep:4")
        Sinks(logit=True, value=False, tokens=4)
        """
        parts = [part.strip() for part in text.split(",")]
        if parts == ["none"]:
            return cls()
        logit = value = False
        tokens = 0
        for part in parts:
            if kept := re.fullmatch(r"keep:([1-9][0-9]{0,5})", part):
                tokens = int(kept[1])
            elif part in ("logit", "value"):
                logit, value = True, value or part == "value"
            else:
                raise UsageError(
                    f"sinks {text!r}: {part!r} is not known; give none, or logit, value, keep:N with commas between"
                )
        return cls(logit, value, tokens)


@dataclass(frozen=True)
class GateSWAOptions:
    """Form of the sliding-window attention.

    Attributes:
        window: tokens each query sees, itself included.
        gate: output gate: "head", "element" or "none".
        sinks: what stands for the tokens outside the window.
    """

    window: int = DEFAULT_WINDOW
    gate: Gate = DEFAULT_GATE
    sinks: Sinks = Sinks(logit=True, value=True, tokens=4)

    def __post_init__(self) -> None:
        """Refuse what no layer could have."""
        if self.window < 1:
            raise UsageError(f"window must be at least 1, got {self.window}")
        if self.gate not in get_args(Gate):
            raise UsageError(f"no gate {self.gate!r}; there is {', '.join(get_args(Gate))}")

    @property
    def cached_tokens(self) -> int:
        """The most tokens that a layer holds."""
        return self.window + self.sinks.tokens

    def config(self, site: AttentionSite) -> GateSWAConfig:
        """Shape of the new attention of a site.

        Raises:
            UsageError: the window is larger than the site's own.
        """
        options: dict[str, Any] = {"gate": self.gate, "sink_tokens": self.sinks.tokens}
        return gateswa_config(site, self.window, **options, sink_logit=self.sinks.logit, sink_value=self.sinks.value)


def full_layers_of(asked: FullLayers, sites: list[AttentionSite]) -> int | list[int]:
    """How many layers stay full, or which.

    Args:
        asked: a number of layers; "every:N", each N-th of the sites; layer indices, as a list or with commas
            between; None for a quarter.
        sites: the sites that could get a window, in order.

    Returns:
        A number, or layer indices in ascending order.

    Raises:
        UsageError: it makes no sense for these sites.
    """
    layers = [site.layer_idx for site in sites]
    if asked is None:
        return -(-len(layers) // FULL_SHARE)
    if isinstance(asked, str):
        if every := re.fullmatch(r"every:([1-9][0-9]*)", asked.strip()):
            return _some_slide(layers[int(every[1]) - 1 :: int(every[1])], layers)
        try:
            numbers = [int(part) for part in asked.removesuffix(",").split(",")]
        except ValueError:
            raise UsageError(
                f"full_layers {asked!r}: give a number of layers, every:N, or layer indices with commas between"
            ) from None
        asked = numbers if "," in asked else numbers[0]  # "7," is a list of one layer
    if isinstance(asked, int):
        if not 0 <= asked < len(layers):
            raise UsageError(f"full_layers {asked}: of {len(layers)} layers 0 to {len(layers) - 1} can stay full")
        return asked
    if unknown := sorted(set(asked) - set(layers)):
        raise UsageError(f"full_layers: {unknown[0]} is none of the layers that can stay full ({_listed(layers)})")
    return _some_slide(sorted(set(asked)), layers)


def full_count(kv_budget: float, before: dict[int, float], windowed: dict[int, float]) -> int:
    """The most layers that can stay full within a budget.

    Args:
        kv_budget: fraction of the source's cached values.
        before: cached values per token by layer, at the context length.
        windowed: the same with a window, of the layers that can get one; the largest savings are assumed equal.

    Raises:
        UsageError: not even none can; the message has the smallest budget.
    """
    total = sum(before.values())
    left = kv_budget * total - sum({**before, **windowed}.values())
    if left < -1e-6:
        smallest = -(-sum({**before, **windowed}.values()) * 10000 // total) / 10000
        raise UsageError(
            f"kv_budget {kv_budget:g} cannot be met: with a window in every layer that can have one the cache still "
            f"needs {smallest:g}; ask for at least that, or for a smaller window"
        )
    dearest = max(before[layer] - value for layer, value in windowed.items())
    count = len(windowed) if dearest <= 0 else min(len(windowed), int(left / dearest + 1e-9))
    if count == len(windowed):
        raise UsageError(f"kv_budget {kv_budget:g} leaves every layer full: nothing would be rewritten; ask for less")
    return count


def _some_slide(full: list[int], layers: list[int]) -> list[int]:
    if len(full) == len(layers):
        raise UsageError("full_layers leaves every layer full: nothing would be rewritten; name fewer")
    return full


def _listed(layers: list[int]) -> str:
    return ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]}, {layers[1]}, ... {layers[-1]}"

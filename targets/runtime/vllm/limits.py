"""What the vLLM plugin cannot serve: read off a configuration, before any weight is, and refused in one line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.kinds import config_from_dict, kind_of

TESTED = {"cpu": ("0.26", "0.32"), "cuda": ("0.26",)}
"""Releases of vLLM that the tests ran with, by device."""


@dataclass(frozen=True)
class Settings:
    """What of an engine's settings decides whether a model can be served.

    Attributes:
        tensor_parallel: ranks that share the heads.
        others: further settings, each with whether it is in use: those named in `NOT_SERVED`.
    """

    tensor_parallel: int = 1
    others: Mapping[str, bool] | None = None


NOT_SERVED = {
    "pipeline parallelism": "use --pipeline-parallel-size 1",
    "context parallelism": "leave --decode-context-parallel-size and --prefill-context-parallel-size at 1",
    "expert parallelism": "leave out --enable-expert-parallel",
    "speculative decoding": "leave out --speculative-config",
    "LoRA": "leave out --enable-lora; fold the adapter into the model before compiling",
    "quantisation on load": "leave out --quantization",
    "a quantised KV cache": "use --kv-cache-dtype auto",
}
"""Features of vLLM that nobody ran with rewritten attention, and what to do instead."""


BY_LENGTH = ("dynamic", "longrope")
"""Rotary embeddings whose angles depend on how long the longest sequence of a batch is."""


def check(config: Any, settings: Settings) -> None:
    """Refuse what cannot be served.

    Args:
        config: of a saved result, as transformers reads it.
        settings: of the engine.

    Raises:
        UsageError: one line with the layer, the feature and the remedy.
    """
    for feature, used in (settings.others or {}).items():
        if used:
            raise UsageError(
                f"{feature} is not served with rewritten attention: nobody tested it; {NOT_SERVED[feature]}"
            )
    for kind in _rope_types(getattr(config, "rope_parameters", None) or {}):
        if kind in BY_LENGTH:
            raise UsageError(
                f"every layer has a rotary embedding of type {kind!r}, which follows the longest sequence of a batch: "
                "requests that are served together would change each other; use attnedit.load"
            )
    for name, values in config.attnedit["sites"].items():
        site = config_from_dict(values)
        for feature, remedy in _problems(site, settings):
            layer = getattr(site, "layer_idx", name)
            raise UsageError(f"layer {layer} has {feature}; {remedy}")


def block_size(config: Any) -> int | None:
    """Return how many tokens a block of the cache should have on a GPU: None for whatever vLLM chooses.

    Args:
        config: of a saved result that `check` has not refused.
    """
    served = [kind_of(config_from_dict(values)).lowering("vllm") for values in config.attnedit["sites"].values()]
    return max((one.block for one in served if one.block), default=None)


def _rope_types(parameters: Mapping[str, Any]) -> Iterator[str]:
    """Types of rotary embedding: of all layers, or of each kind of layer."""
    for name, value in parameters.items():
        if name == "rope_type":
            yield str(value)
        elif isinstance(value, Mapping):
            yield from _rope_types(value)


def _problems(config: SiteConfig, settings: Settings) -> Iterator[tuple[str, str]]:
    served = kind_of(config).lowering("vllm")
    if served is None:
        yield f"{kind_of(config).title} of another package, which the plugin does not know", "use attnedit.load"
    else:
        yield from served.problems(config, settings)

"""Layers with sliding windows of a live model: what a checkpoint without our module must know of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite, Projection
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE
from attnedit.targets.attention.kinds import configs_in
from attnedit.targets.runtime.eager.classes import source_sites
from attnedit.targets.runtime.hf.native import OTHER


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a model with windows.

    Attributes:
        site: of the source.
        config: of the windowed attention; None where the layer has the source's.
        gate: its weight [H or H e, D]; None without.
    """

    site: AttentionSite
    config: GateSWAConfig | None
    gate: Tensor | None

    @property
    def window(self) -> int | None:
        """Tokens a query sees; None for all."""
        return self.site.window if self.config is None else self.config.sliding_window

    @cached_property
    def trained_gate(self) -> Tensor | None:
        """The gate; None where all its weights are 0, too: then it is a constant."""
        return self.gate if self.gate is not None and bool(self.gate.any()) else None


def windowed_layers(model: PreTrainedModel, profile: str, sink_logits: bool = False) -> list[Layer]:
    """Read the layers of a model with sliding windows, and refuse what none of the classes has.

    Raises:
        UsageError: a layer has something else, or there is more than one window.
    """
    layers = []
    for site in source_sites(model).values():
        found_here = configs_in(model.get_submodule(site.name))
        config = cast(GateSWAConfig, found_here[0][1]) if found_here else None
        if config is not None:
            found = {
                f"{config.sink_tokens} kept sink tokens (compile with --sinks none)": config.sink_tokens > 0,
                "sink logits": config.sink_logit and not sink_logits,
                "a sink value": config.sink_value,
                "a gate with a bias": config.gate_bias,
            }
            if fact := next((fact for fact, holds in found.items() if holds), None):
                raise UsageError(f"{site.name} has {fact}, which {profile} does not; {OTHER}")
        gate = None
        if config is not None and config.gate != "none":
            gate = model.get_parameter(f"{site.name}.{GATESWA_MODULE}.g_proj.weight").detach()
        layers.append(Layer(site, config, gate))
    common_window(layers)
    return layers


def common_window(layers: list[Layer]) -> int:
    """Return the window of all layers that have one.

    Raises:
        UsageError: there are several, or none.
    """
    windows = sorted({layer.window for layer in layers if layer.window is not None})
    if len(windows) != 1:
        raise UsageError(f"the class has one sliding window, the model {windows or 'none'}; {OTHER}")
    return windows[0]


def check_plain(layers: list[Layer]) -> None:
    """Refuse layers that are not Llama's attention with norms per head, biases and windows.

    Raises:
        UsageError: a layer is not; the message names what it has.
    """
    for layer in layers:
        site = layer.site
        found = {
            "an output gate of its own": site.output_gate,
            "sink logits": site.sinks is not None,
            f"a softcap of {site.softcap}": site.softcap is not None,
            "no rotary embedding": site.rope is None,
            "rotary dims that are neighbours": site.rope is not None and site.rope.style != "half",
            f"a {site.query_norm} norm on queries": site.query_norm not in (None, "per_head"),
            f"a {site.key_norm} norm on keys": site.key_norm not in (None, "per_head"),
            "one projection for queries, keys and values": not _plain(site),
        }
        if fact := next((fact for fact, holds in found.items() if holds), None):
            raise UsageError(f"{site.name} has {fact}, which the class does not; {OTHER}")


def _plain(site: AttentionSite) -> bool:
    parts = (site.q_proj, site.k_proj, site.v_proj, site.o_proj)
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    return all(
        isinstance(part, Projection) and part.module == name and not part.transposed and part.scale == 1
        for part, name in zip(parts, names, strict=True)
    )

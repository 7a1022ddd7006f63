"""The kinds of attention that a rewritten layer can have: how each is named, described, and put into a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import GateSWAConfig, MLAConfig
from attnedit.targets.attention.gateswa_graph import GATESWA_MODULE, gateswa_graph
from attnedit.targets.attention.mla_graph import MLA_MODULE, mla_graph
from attnedit.targets.attention.rewritten import KV_CACHE_MODULE, RewrittenConfig, rewritten_graph

AnyConfig = MLAConfig | GateSWAConfig | RewrittenConfig


def latent_sizes(config: MLAConfig) -> tuple[int, int, int]:
    """One head of latents, as keys, and rotary slots, as values."""
    return 1, config.kv_lora_rank, 2 * config.num_slots


def window_sizes(config: GateSWAConfig) -> tuple[int, int, int]:
    """The source's heads."""
    return config.num_key_value_heads, config.head_dim, config.v_head_dim


@dataclass(frozen=True)
class Kind:
    """One kind of attention.

    Attributes:
        name: in config.json, and of the child module in the graph of a rewritten layer.
        title: what people call it.
        config: its configuration class.
        graph: builds the graph of one attention module: ``graph(model, site, config)``.
        cached: heads, key size and value size of what a layer caches, from its configuration; None where only its
            first forward tells.
    """

    name: str
    title: str
    config: type[AnyConfig]
    graph: Callable[[nn.Module, AttentionSite, Any], fx.GraphModule]
    cached: Callable[[Any], tuple[int, int, int]] | None = None


KINDS = {
    kind.name: kind
    for kind in (
        Kind(MLA_MODULE, "latent attention", MLAConfig, mla_graph, latent_sizes),
        Kind(GATESWA_MODULE, "gated sliding-window attention", GateSWAConfig, gateswa_graph, window_sizes),
        Kind(KV_CACHE_MODULE, "rewritten attention", RewrittenConfig, rewritten_graph),
    )
}


def kind_of(config: AnyConfig) -> Kind:
    """Return the kind that a configuration describes."""
    return next(kind for kind in KINDS.values() if type(config) is kind.config)


def config_to_dict(config: AnyConfig) -> dict[str, Any]:
    """Return the fields as JSON values, and the name of the kind as "kind"."""
    return {"kind": kind_of(config).name, **config.to_dict()}


def config_from_dict(values: Mapping[str, Any]) -> AnyConfig:
    """Read what `config_to_dict` wrote.

    Raises:
        UsageError: this version does not know the kind or a field, or a field is missing.
    """
    rest = dict(values)
    # The first files knew latent attention only, and did not say so.
    name = rest.pop("kind", MLA_MODULE)
    if name not in KINDS:
        raise UsageError(f"attention of kind {name!r} is not known to this version (it knows {', '.join(KINDS)})")
    return KINDS[name].config.from_dict(rest)


def config_of(graph: nn.Module) -> AnyConfig:
    """Configuration of the new attention in a rewritten graph."""
    found: AnyConfig = next(getattr(graph, name) for name in KINDS if hasattr(graph, name)).config
    return found

"""The kinds of attention that a rewritten layer can have, by name.

Ours are in `KINDS`. A package adds one by registering, under the entry points `attnedit.targets`, a target whose kind
has the entry point's name; a saved result names the kind, and never a module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from attnedit.compiler.errors import UsageError
from attnedit.compiler.rewriting.registry import TARGETS, load, registered
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.gateswa.kind import GATESWA_KIND
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.mla.kind import MLA_KIND
from attnedit.targets.attention.rewritten.kind import REWRITTEN_KIND

KINDS = {kind.name: kind for kind in (MLA_KIND, GATESWA_KIND, REWRITTEN_KIND)}
_OTHERS: dict[str, AttentionKind] = {}
"""Of other packages, that were used so far."""


def use_kind(kind: AttentionKind) -> AttentionKind:
    """Make a kind known for as long as the process lives; its name must be its own.

    Raises:
        UsageError: another kind has the name.
    """
    known = KINDS.get(kind.name) or _OTHERS.setdefault(kind.name, kind)
    if known.config is not kind.config:
        raise UsageError(f"there is an attention of kind {kind.name!r} already ({known.title}); rename yours")
    return known


def find_kind(name: str) -> AttentionKind | None:
    """The kind of a name, ours or of a package that registers it; None where nobody does.

    Raises:
        UsageError: the package cannot be imported, or what it registers is of another kind.
    """
    if name in KINDS or name in _OTHERS:
        return KINDS.get(name) or _OTHERS[name]
    point = registered(TARGETS, dict.fromkeys(KINDS, "")).get(name)
    if point is None:
        return None
    kind = getattr(load(point, "target"), "kind", None)
    # Others are made of rewrites.
    return use_kind(kind) if isinstance(kind, AttentionKind) and kind.name == name else None


def known_kinds() -> list[AttentionKind]:
    """Ours, and those of packages that were used so far."""
    return [*KINDS.values(), *_OTHERS.values()]


def kind_of(config: SiteConfig) -> AttentionKind:
    """Return the kind that a configuration describes.

    Raises:
        UsageError: no kind that is known has such configurations.
    """
    found = next((kind for kind in known_kinds() if type(config) is kind.config), None)
    if found is None:
        raise UsageError(f"{type(config).__name__} belongs to no kind of attention that is known here")
    return found


def config_to_dict(config: SiteConfig) -> dict[str, Any]:
    """Return the fields as JSON values, and the name of the kind as "kind"."""
    return {"kind": kind_of(config).name, **config.to_dict()}


def config_from_dict(values: Mapping[str, Any]) -> SiteConfig:
    """Read what `config_to_dict` wrote.

    Raises:
        UsageError: nobody knows the kind, this version does not know a field, or a field is missing.
    """
    rest = dict(values)
    # The first files knew latent attention only, and did not say so.
    name = rest.pop("kind", MLA_KIND.name)
    kind = find_kind(str(name))
    if kind is None:
        raise UsageError(
            f"attention of kind {name!r} is not known to this version (it knows {', '.join(KINDS)}); install the "
            f"package that registers it under the entry points {TARGETS}"
        )
    return kind.config.from_dict(rest)


def config_of(graph: nn.Module) -> SiteConfig:
    """Configuration of the new attention in a rewritten graph."""
    found = next(config for _, config in configs_in(graph))
    return found


def configs_in(graph: nn.Module) -> list[tuple[str, SiteConfig]]:
    """The children of a graph that are attention of some kind: names and configurations."""
    children = ((name, getattr(child, "config", None)) for name, child in graph.named_children())
    return [(name, config) for name, config in children if isinstance(config, SiteConfig)]


def kinds_in(config: Any) -> dict[str, AttentionKind]:
    """The kind of each attention module that a rewritten model's configuration names, by the module's name.

    Raises:
        UsageError: nobody knows a kind.
    """
    record = getattr(config, "attnedit", None) or {"sites": {}}
    return {name: kind_of(config_from_dict(values)) for name, values in record["sites"].items()}

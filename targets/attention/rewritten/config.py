"""What rewrites did to one attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig


@dataclass(frozen=True)
class RewrittenConfig(SiteConfig):
    """What was done to the graph of one attention module; plain JSON values only.

    Attributes:
        layer_idx: the layer of the cache that this attention writes.
        rewrites: in order: "rewrite" (``module:Class``), "options" (its fields), and "decisions" (of every match in
            turn, whether it was rewritten).

    Raises:
        UsageError: an entry has another form.

    >>> entry = {"rewrite": "package.module:Gate", "options": {}, "decisions": [True]}
    >>> config = RewrittenConfig(0, (entry,))
    >>> RewrittenConfig.from_dict(config.to_dict()) == config
    True
    """

    layer_idx: int
    rewrites: tuple[Mapping[str, Any], ...]

    def __post_init__(self) -> None:
        """Refuse what `attnedit.rewrite` would not have written."""
        object.__setattr__(self, "rewrites", tuple(self.rewrites))
        forms: dict[str, type] = {"rewrite": str, "options": dict, "decisions": list}
        for entry in self.rewrites:
            if not (
                isinstance(entry, Mapping)
                and set(entry) == set(forms)
                and all(isinstance(entry[name], form) for name, form in forms.items())
            ):
                raise UsageError(f"RewrittenConfig of layer {self.layer_idx}: {entry!r} describes no rewrite")

    @property
    def made_by(self) -> list[str]:
        """Their classes."""
        return [entry["rewrite"] for entry in self.rewrites]

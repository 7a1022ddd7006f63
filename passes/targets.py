"""The targets that come with attnedit, by name; those of packages are entry points."""

from __future__ import annotations

from attnedit.passes.gateswa.target import WindowTarget
from attnedit.passes.mla.target import LatentTarget
from attnedit.passes.target import AnyTarget

OWN: dict[str, AnyTarget] = {target.name: target for target in (LatentTarget(), WindowTarget())}
NAMES = (*OWN, *(f"{a}+{b}" for a in OWN for b in OWN if OWN[a].leaves and not OWN[b].leaves))
"""With the compositions: what one leaves another changes."""


def readers(option: str) -> list[str]:
    """Names of those that read an option of a compilation."""
    return [name for name in NAMES if any(option in OWN[part].reads for part in name.split("+"))]

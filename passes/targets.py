"""The targets that come with attnedit, by name; those of packages are entry points."""

from __future__ import annotations

from attnedit.passes.gateswa.target import WindowTarget
from attnedit.passes.mla.target import LatentTarget
from attnedit.passes.target import AnyTarget

OWN: dict[str, AnyTarget] = {target.name: target for target in (LatentTarget(), WindowTarget())}
OURS: dict[str, tuple[AnyTarget, ...]] = {name: (target,) for name, target in OWN.items()} | {
    f"{first}+{last}": (OWN[first], OWN[last])
    for first in OWN
    for last in OWN
    if OWN[first].leaves and not OWN[last].leaves
}
"""With the compositions: what one leaves another changes."""


def readers(option: str) -> list[str]:
    """Names of those that read an option of a compilation."""
    return [name for name, targets in OURS.items() if any(option in target.reads for target in targets)]

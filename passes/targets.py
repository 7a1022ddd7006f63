"""Targets by name: those that come with attnedit, and those of packages, which are entry points."""

from __future__ import annotations

from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.compiler.rewriting.pipeline import Target
from attnedit.compiler.rewriting.registry import PASSES, TARGETS, load, registered
from attnedit.passes.gateswa.target import WindowTarget
from attnedit.passes.mla.target import LatentTarget
from attnedit.passes.target import AnyTarget, AttentionTarget

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


def targets_named(name: str) -> tuple[Target, ...]:
    """What a name stands for, or several with "+" between: targets with a budget in order, or one made of rewrites.

    Raises:
        UsageError: nobody registers a part, or the parts do not go together.
    """
    reserved = dict.fromkeys(OURS, "")
    targets, passes = registered(TARGETS, reserved), registered(PASSES, reserved)
    found: list[Any] = []
    for part in (part.strip() for part in name.split("+")):
        made: Any = OWN.get(part)
        if part in targets:
            made = load(targets[part], "target")
        elif part in passes:
            made = load(passes[part], "pass")
        found.append(made() if callable(made) else made)
    planned = [made for made in found if isinstance(made, AttentionTarget)]
    if None in found or len(planned) not in (0, len(found)) or not all(made.leaves for made in planned[:-1]):
        others = ", ".join((*OURS, *sorted({*targets, *passes})))
        raise UsageError(f"no target {name!r}; there is {others}")
    if planned:
        return tuple(planned)
    several = [made.rewrites if isinstance(made, Target) else (made,) for made in found]
    return (Target(name, [rewrite for rewrites in several for rewrite in rewrites]),)

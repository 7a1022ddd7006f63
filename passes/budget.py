"""From one `kv_budget` to what every layer may cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError

Allocation = Literal["auto", "even", "loss"]
"""How layers share a budget; see `by_loss` for "auto"."""
LOSS_SHARE = 1 / 3
"""Of the source's cache: with less in every latent layer, shares by loss are worth measuring. SmolLM2 at a quarter
finds most facts instead of few of them; at 0.4 and a half nothing changes (docs/notebook/2026-11-long-context.md)."""
EXPONENT = 1.5
"""Of a layer's loss in its cached values. Between a sixteenth and a quarter it measures about 0.6; a higher one moves
less between layers, which allows for the noise of their losses (docs/notebook/2026-11-closed-form.md)."""
STEPS = 6
"""Into which `allocate` divides an even share: few different sizes keep compilations and kernels few."""
LEAST_STEPS, MOST_STEPS = 4, 12
"""Of these, for one layer."""


def source_values(site: AttentionSite) -> int:
    """Cached values per token of the source: G (d + e)."""
    return site.num_key_value_heads * (site.head_dim + site.v_head_dim)


def least_values(site: AttentionSite) -> int:
    """The smallest cache a converted layer can have: one slot, if it has rope, and a latent of one."""
    return 3 if site.rope else 1


def by_loss(
    allocation: Allocation, alternations: int, shapes: Mapping[str, Any], sites: Sequence[AttentionSite]
) -> bool:
    """Whether layers share their cache by what each costs.

    Args:
        allocation: as asked for; "auto" is by loss where the shares are small, but not for a quick job.
        alternations: of the fits; up to one is a quick job.
        shapes: of even shares, by the site's name.
        sites: those that become latent.
    """
    if allocation != "auto":
        return allocation == "loss"
    values = sum(shapes[site.name].values for site in sites)
    return alternations > 1 and len(sites) > 1 and values < LOSS_SHARE * sum(map(source_values, sites))


def allocate(
    sites: Sequence[AttentionSite],
    losses: Mapping[str, float],
    even: Mapping[str, float],
    weight: Mapping[str, float],
    smallest: Callable[[AttentionSite], int] = least_values,
) -> dict[str, float]:
    """Cached values of each layer by what it costs, with the same total as an even share.

    A layer's loss is taken to fall with its values v as (v / even)^-EXPONENT. Steps go one by one to where they save
    most for what they cost; losses are convex in v, so no other shares of such steps have a smaller sum.

    Args:
        sites: the layers.
        losses: of each alone, at its even share, in nats, by name; below 0 counts as 0.
        even: values per token of an even share, by name.
        weight: what a value of the layer counts in the total, by name.
        smallest: the least that a layer can cache.

    Returns:
        Values per token by name.
    """
    least = {site.name: max(smallest(site), even[site.name] * LEAST_STEPS / STEPS) for site in sites}
    most = {site.name: min(source_values(site), even[site.name] * MOST_STEPS / STEPS) for site in sites}
    values = {name: min(least[name], even[name]) for name in even}
    left = sum((even[name] - values[name]) * weight[name] for name in even)
    nothing = 1e-9 * sum(even.values())

    def gain(name: str) -> float:
        """What the next step of a layer saves, for each value that it takes."""
        steps = values[name] * STEPS / even[name]
        saved: float = max(0.0, losses[name]) * (steps**-EXPONENT - (steps + 1) ** -EXPONENT)
        return saved / (even[name] * weight[name])

    while left > nothing and (able := [name for name in even if values[name] < most[name] - nothing]):
        best = max(able, key=gain)
        step = min(even[best] / STEPS, most[best] - values[best], left / weight[best])
        values[best] += step
        left -= step * weight[best]
    return values


def plan(
    sites: list[AttentionSite],
    before: dict[int, float],
    chosen: list[AttentionSite],
    kv_budget: float,
    changed: Mapping[int, float] | None = None,
    losses: Mapping[str, float] | None = None,
    *,
    shape: Callable[[AttentionSite, int], Any],
    least: Callable[[AttentionSite], int] = least_values,
) -> dict[str, Any]:
    """Shapes of the chosen sites so that all layers together cache `kv_budget` of the source.

    Layers that stay as they are count against the budget; the rest is shared evenly, or by
    `allocate`.

    Args:
        sites: all attention sites.
        before: cached values per token of the source by layer, at the context length.
        chosen: the sites that are converted.
        kv_budget: fraction of the source's cached values, above 0 and at most 1.
        changed: what layers cache that another pass has rewritten, by layer.
        losses: what each chosen site costs alone at an even share, in nats, by name: shares follow them. None for even
            shares.
        shape: what a site caches within so many values per token.
        least: the smallest cache that a site can have.

    Returns:
        Shape by site name.

    Raises:
        UsageError: the budget cannot be met; the message has the smallest that can.
    """
    if not 0 < kv_budget <= 1:
        raise UsageError(f"kv_budget must be above 0 and at most 1, got {kv_budget:g}")
    total = sum(before.values())
    names = {site.name for site in chosen}
    others = {**before, **(changed or {})}
    kept = sum(others[site.layer_idx] for site in sites if site.name not in names)
    weight = {site.name: before[site.layer_idx] / source_values(site) for site in chosen}
    lowest = kept + sum(least(site) * weight[site.name] for site in chosen)
    if kv_budget * total < lowest - 1e-6:
        smallest = -(-lowest * 10000 // total) / 10000
        raise UsageError(
            f"kv_budget {kv_budget:g} cannot be met: other layers and one slot per latent layer "
            f"need {smallest:g}; ask for at least that"
        )
    share = (kv_budget * total - kept) / sum(before[site.layer_idx] for site in chosen)
    even = {site.name: share * source_values(site) for site in chosen}
    values = even if losses is None else allocate(chosen, losses, even, weight, least)
    shapes: dict[str, Any] = {}
    carried = 0.0  # rounding goes to the next layer, so that the total is met to one value
    for site in chosen:
        wanted = values[site.name] + carried
        found = shape(site, max(int(wanted + 1e-6), least(site)))
        carried = wanted - found.values
        shapes[site.name] = found
    return shapes

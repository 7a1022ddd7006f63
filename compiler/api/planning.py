"""Before any data is read: are the arguments sound, which sites change, and what may each of them cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, get_args

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.calibration_windows import CalibrationWindows
from attnedit.compiler.calibration_windows import calibration_windows as cut_windows
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.evaluate import KVUsage
from attnedit.compiler.pipeline import Target
from attnedit.compiler.registry import PASSES as REGISTERED_PASSES
from attnedit.compiler.registry import TARGETS as REGISTERED_TARGETS
from attnedit.compiler.registry import names_of, registered
from attnedit.compiler.sites import AttentionSite
from attnedit.compiler.window_sources import DEFAULT_WINDOW as SHORT_LENGTH
from attnedit.passes.gateswa.options import (
    DEFAULT_GATE,
    DEFAULT_SINKS,
    DEFAULT_WINDOW,
    FullLayers,
    GateSWAOptions,
    Sinks,
    full_count,
    full_layers_of,
)
from attnedit.passes.mla.budget import Allocation, Shape, common_shapes, fixed_shapes, least_values, plan
from attnedit.passes.mla.fit import FitOptions
from attnedit.targets.attention.cost import gateswa_values
from attnedit.targets.runtime.engines import stock_rank
from attnedit.targets.runtime.hf.mla import KERNEL_DIMS
from attnedit.targets.runtime.hf.towards import (
    GATES,
    Form,
    check_source,
    form_for,
    kernel_fold,
    slot_columns,
)

TARGETS = ("mla", "gateswa", "gateswa+mla")
DEFAULT_BUDGET = 0.5
"""Of the layers that become latent."""
WHOLE = ("window", "calibration_tokens", "calibration_length", "alternations", "seed")
"""Arguments that are whole numbers."""


@dataclass(frozen=True)
class Plan:
    """What is to become of the attention sites of a model.

    Attributes:
        sites: all of them.
        chosen: those that change.
        before: the source's cache.
        kv_budget: as asked for.
        latent: whether layers that get no window become latent.
        windowing: form of the windowed layers; None where there are none.
        full: layers without window, or how many.
        windowed_values: cached values per token of each chosen site with its window, averaged over the context, by
            layer.
        notes: what the user should know.
        form: of a profile that the result is to have.
        columns: of cos and sin that its rotary slots may have, by the site's name.
    """

    sites: list[AttentionSite]
    chosen: list[AttentionSite]
    before: KVUsage
    kv_budget: float | None
    latent: bool
    windowing: GateSWAOptions | None = None
    full: int | list[int] = 0
    windowed_values: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    form: Form | None = None
    columns: dict[str, list[int]] = field(default_factory=dict)

    @property
    def linear(self) -> bool:
        """Whether latent layers are linear in the hidden states, whatever the source's are."""
        return self.form is not None and self.form.latent

    def latent_sites(self, windowed: list[str] | None = None) -> list[AttentionSite]:
        """Those that become latent.

        Args:
            windowed: names of the sites that got a window; until that is known, as many as there will be are taken.
        """
        if not self.latent:
            return []
        if windowed is not None:
            return [site for site in self.chosen if site.name not in windowed]
        if self.windowing is None:
            return self.chosen
        if isinstance(self.full, int):
            return self.chosen[: self.full]
        return [site for site in self.chosen if site.layer_idx in self.full]

    def shapes(self, latent: list[AttentionSite], losses: Mapping[str, float] | None = None) -> dict[str, Shape]:
        """Shapes of the latent sites, by name; every other chosen site has its window.

        Args:
            latent: which these are.
            losses: what each costs alone at an even share, by name: shares follow them. None for even shares.

        Raises:
            UsageError: the budget cannot be met.
        """
        if not latent:
            return {}
        if self.form is not None:
            return self._common_shapes(latent, self.form)
        before = dict(enumerate(self.before.per_layer))
        own = {site.layer_idx for site in latent}
        changed = {layer: values for layer, values in self.windowed_values.items() if layer not in own}
        budget = self.kv_budget
        if budget is None:
            after = {**before, **changed, **{layer: DEFAULT_BUDGET * before[layer] for layer in own}}
            budget = sum(after.values()) / sum(before.values()) if changed else DEFAULT_BUDGET
        return plan(self.sites, before, latent, budget, changed, losses)

    def _common_shapes(self, latent: list[AttentionSite], form: Form) -> dict[str, Shape]:
        """A class has one size for all layers."""
        if form.kernel_dims:
            return fixed_shapes(latent, KERNEL_DIMS["kv_lora_rank"], kernel_fold(latent[0]), self.columns)
        budget = DEFAULT_BUDGET if self.kv_budget is None else self.kv_budget
        before = min(int(values) for values in self.before.per_layer if values)
        if (rank := stock_rank(form.engine, before, budget)) is not None:
            return fixed_shapes(latent, rank, kernel_fold(latent[0]), self.columns)
        values = int(budget * sum(self.before.per_layer) / len(self.sites) + 1e-6)
        if values < (least := max(least_values(site) for site in latent)):
            raise UsageError(
                f"kv_budget {budget:g} leaves {values} cached values per token and layer, {least} are needed"
            )
        return common_shapes(latent, values, self.columns)


def plan_sites(
    model: PreTrainedModel,
    sites: list[AttentionSite],
    before: KVUsage,
    target: str,
    windowing: GateSWAOptions | None,
    kv_budget: float | None,
    full_layers: FullLayers,
    form: Form | None = None,
) -> Plan:
    """Plan the rewriting of a model; the arguments are those of `attnedit.compile`, checked by `check_arguments`.

    Raises:
        UsageError: they make no sense for these sites.
        CaptureError: there is nothing to convert.
    """
    latent = target.endswith("mla")
    if form is not None and form.latent:
        facts = check_source(model, sites, form)
        notes = [f"profile {form.profile} has linear maps in place of {', '.join(facts)}"] if facts else []
        columns = slot_columns(model, sites, form)
        return Plan(sites, sites, before, kv_budget, latent, notes=notes, form=form, columns=columns)
    chosen, notes = choose_sites(sites)
    caching = sum(values > 0 for values in before.per_layer)
    if caching > len(sites):
        notes.append(f"{caching - len(sites)} layers that keep a cache stay as they are: others read their keys too")
    turned = [site for site in chosen if site.unread_rope]
    if latent and turned:
        notes.append(
            f"keys of {len(turned)} layers are compressed with their positions in them, which needs a larger cache for "
            f"the same quality: {turned[0].name}: {turned[0].unread_rope}"
        )
    if windowing is None:
        return Plan(sites, chosen, before, kv_budget, latent, notes=notes)
    share = min(1.0, windowing.cached_tokens / before.length)
    windowed = {site.layer_idx: gateswa_values(windowing.config(site)) * share for site in chosen}
    if full_layers is None and kv_budget is not None and not latent:
        full: int | list[int] = full_count(kv_budget, dict(enumerate(before.per_layer)), windowed)
    else:
        full = full_layers_of(full_layers, chosen)
    return Plan(sites, chosen, before, kv_budget, latent, windowing, full, windowed, notes, form)


def check_arguments(
    target: str | Target,
    kv_budget: float | None = None,
    window: int | None = None,
    full_layers: FullLayers = None,
    gate: str | None = None,
    sinks: str | None = None,
    profile: str | None = None,
    kernel_dims: bool = False,
    allocation: str = "even",
    alternations: int = FitOptions.alternations,
    engine: str | None = None,
) -> tuple[GateSWAOptions | None, Form | None]:
    """Refuse arguments that contradict each other, whatever the model; see `attnedit.compile`.

    Returns:
        The form of the windowed layers, None for a target without; the form that a profile asks for, or None.

    Raises:
        UsageError: one line that names the argument.
    """
    windowing = {"window": window, "full_layers": full_layers, "gate": gate, "sinks": sinks}
    if isinstance(target, Target) or target not in TARGETS:
        own: dict[str, Any] = {"profile": profile, "kernel_dims": kernel_dims or None, "engine": engine}
        own["allocation"] = None if allocation == "even" else allocation
        own["alternations"] = None if alternations == FitOptions.alternations else alternations
        _check_registered(target, {"kv_budget": kv_budget, **own}, windowing)
        return None, None
    if kv_budget is not None and not 0 < kv_budget <= 1:
        raise UsageError(
            f"kv budget {kv_budget:g} is not a fraction of the source's cache; give one above 0, at most 1"
        )
    _check_allocation(allocation, target, profile or engine, kernel_dims)
    form = form_for(profile, kernel_dims, target, kv_budget, gate, sinks, engine)
    if not target.startswith("gateswa"):
        _refuse_given(windowing, "gateswa and gateswa+mla", target)
        return None, form
    if target == "gateswa" and kv_budget is not None and full_layers is not None:
        raise UsageError("kv_budget and full_layers both say how many layers stay full; give one of them")
    default_gate, default_sinks = (DEFAULT_GATE, DEFAULT_SINKS) if form is None else (GATES[form.profile][0], "none")
    default_sinks = default_sinks if engine is None else "none"
    options = GateSWAOptions(
        window=DEFAULT_WINDOW if window is None else window,
        gate=default_gate if gate is None else gate,  # type: ignore[arg-type]  # refused if it is none
        sinks=Sinks.parse(default_sinks if sinks is None else sinks),
    )
    return options, form


def _check_registered(target: str | Target, own: Mapping[str, Any], windowing: Mapping[str, Any]) -> None:
    """Refuse a target that nobody made, and arguments that a target of others does not read."""
    name = target.name if isinstance(target, Target) else target
    if not isinstance(target, Target) and names_of(target, TARGETS) is None:
        others = sorted({*registered(REGISTERED_TARGETS), *registered(REGISTERED_PASSES)})
        raise UsageError(f"no target {target!r}; there is {', '.join((*TARGETS, *others))}")
    _refuse_given(own, ", ".join(TARGETS), name)
    _refuse_given(windowing, "gateswa and gateswa+mla", name)


def _refuse_given(arguments: Mapping[str, Any], targets: str, target: str) -> None:
    for name, value in arguments.items():
        if value is not None:
            raise UsageError(f"{name} is for the targets {targets}, not for {target}")


def check_numbers(arguments: Mapping[str, Any]) -> None:
    """Refuse what is no number where one belongs; None is not given.

    Args:
        arguments: of `attnedit.compile` by name.

    Raises:
        UsageError: one line that names the argument.
    """
    for name, value in arguments.items():
        kind, what = (Real, "a number") if name == "kv_budget" else (Integral, "a whole number")
        number = isinstance(value, kind) and not isinstance(value, bool)
        if name in (*WHOLE, "kv_budget") and value is not None and not number:
            raise UsageError(f"{name} must be {what}, got {value!r}")


def _check_allocation(allocation: str, target: str, profile: str | None, kernel_dims: bool) -> None:
    if allocation not in get_args(Allocation):
        raise UsageError(f"no allocation {allocation!r}; there is {', '.join(get_args(Allocation))}")
    if allocation == "even":
        return
    if not target.endswith("mla"):
        raise UsageError(f"allocation is of a latent cache: for the targets mla and gateswa+mla, not for {target}")
    if profile is not None or kernel_dims:
        raise UsageError("a profile's class has one size for all layers; leave allocation out, or profile and engine")


def calibration_windows(
    calibration: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    model: PreTrainedModel,
    windowing: GateSWAOptions | None,
    **options: Any,
) -> CalibrationWindows:
    """Windows of the data; for windowed layers the short ones too are as long as several of the attention's windows."""
    least = SHORT_LENGTH if windowing is None else max(SHORT_LENGTH, 4 * windowing.cached_tokens)
    return cut_windows(calibration, tokenizer, model, least=least, **options)


def choose_sites(sites: list[AttentionSite]) -> tuple[list[AttentionSite], list[str]]:
    """Which sites are converted, and what the user should know of the others.

    Layers that slide stay as they are where others do not; a model in which all slide is converted, window kept.

    Raises:
        CaptureError: there is nothing to convert.
    """
    notes: list[str] = []
    able = [site for site in sites if not site.already_mla]
    if not able:
        names = first_of([site.name for site in sites])
        raise CaptureError(f"all {len(sites)} attention sites ({names}) are multi-head latent attention already")
    if len(able) < len(sites):
        notes.append(f"{len(sites) - len(able)} sites are latent already and stay as they are")
    full = [site for site in able if site.window is None]
    if full and len(full) < len(able):
        notes.append(f"{len(able) - len(full)} layers already slide over a window and stay as they are")
    return full or able, notes


def check_fresh(model: PreTrainedModel, name: str) -> None:
    """Refuse a model whose attention attnedit has rewritten.

    Raises:
        UsageError: it is such a one; the message names it by `name`.
    """
    if rewritten := getattr(model.config, "attnedit", None):
        sites = first_of(list(rewritten["sites"]))
        raise UsageError(f"{name} is rewritten already ({sites}); give the model that it came from")


def first_of(names: list[str]) -> str:
    """One name, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"

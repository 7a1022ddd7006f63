"""Before any data is read: which sites change, and what may each of them cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from transformers import PreTrainedModel

from attnedit.compiler.capture.probe import sees_ahead
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.calibration_windows import calibration_windows as cut_windows
from attnedit.compiler.data.window_sources import DEFAULT_WINDOW as SHORT_LENGTH
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.evaluation.evaluate import KVUsage
from attnedit.options import CompileOptions
from attnedit.passes.gateswa.options import full_count, full_layers_of
from attnedit.passes.mla.budget import Shape, common_shapes, fixed_shapes, least_values, plan
from attnedit.targets.attention.cost import gateswa_values
from attnedit.targets.runtime.engines import stock_rank
from attnedit.targets.runtime.hf.mla import KERNEL_DIMS
from attnedit.targets.runtime.hf.towards import Form, check_source, kernel_fold, slot_columns

DEFAULT_BUDGET = 0.5
"""Of the layers that become latent."""


@dataclass(frozen=True)
class Plan:
    """What is to become of the attention sites of a model.

    Attributes:
        sites: all of them.
        chosen: those that change.
        before: the source's cache.
        options: what was asked for.
        full: layers without window, or how many.
        windowed_values: cached values per token of each chosen site with its window, averaged over the context, by
            layer.
        notes: what the user should know.
        columns: of cos and sin that its rotary slots may have, by the site's name.
    """

    sites: list[AttentionSite]
    chosen: list[AttentionSite]
    before: KVUsage
    options: CompileOptions
    full: int | list[int] = 0
    windowed_values: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, list[int]] = field(default_factory=dict)

    @property
    def budget_asked(self) -> float | None:
        """What the report says was asked for."""
        asked = self.options
        return (
            DEFAULT_BUDGET
            if asked.kv_budget is None and not asked.windowed and not asked.kernel_dims
            else asked.kv_budget
        )

    @property
    def linear(self) -> bool:
        """Whether latent layers are linear in the hidden states, whatever the source's are."""
        return self.options.form is not None and self.options.form.latent

    def latent_sites(self, windowed: list[str] | None = None) -> list[AttentionSite]:
        """Those that become latent.

        Args:
            windowed: names of the sites that got a window; until that is known, as many as there will be are taken.
        """
        if not self.options.latent:
            return []
        if windowed is not None:
            return [site for site in self.chosen if site.name not in windowed]
        if not self.options.windowed:
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
        if self.options.form is not None:
            return self._common_shapes(latent, self.options.form)
        before = dict(enumerate(self.before.per_layer))
        own = {site.layer_idx for site in latent}
        changed = {layer: values for layer, values in self.windowed_values.items() if layer not in own}
        budget = self.options.kv_budget
        if budget is None:
            after = {**before, **changed, **{layer: DEFAULT_BUDGET * before[layer] for layer in own}}
            budget = sum(after.values()) / sum(before.values()) if changed else DEFAULT_BUDGET
        return plan(self.sites, before, latent, budget, changed, losses)

    def _common_shapes(self, latent: list[AttentionSite], form: Form) -> dict[str, Shape]:
        """A class has one size for all layers."""
        if form.kernel_dims:
            return fixed_shapes(latent, KERNEL_DIMS["kv_lora_rank"], kernel_fold(latent[0]), self.columns)
        budget = DEFAULT_BUDGET if self.options.kv_budget is None else self.options.kv_budget
        before = min(int(values) for values in self.before.per_layer if values)
        if (rank := stock_rank(form.engine, before, budget)) is not None:
            return fixed_shapes(latent, rank, kernel_fold(latent[0]), self.columns)
        values = int(budget * sum(self.before.per_layer) / len(self.sites) + 1e-6)
        if values < (least := max(least_values(site) for site in latent)):
            raise UsageError(
                f"kv_budget {budget:g} leaves {values} cached values per token and layer, {least} are needed"
            )
        return common_shapes(latent, values, self.columns)


def plan_sites(model: PreTrainedModel, sites: list[AttentionSite], before: KVUsage, options: CompileOptions) -> Plan:
    """Plan the rewriting of a model.

    Raises:
        UsageError: the options make no sense for these sites.
        CaptureError: there is nothing to convert.
    """
    latent, windowing, kv_budget, form = options.latent, options.windowing, options.kv_budget, options.form
    if form is not None and form.latent:
        facts = check_source(model, sites, form)
        notes = [f"profile {form.profile} has linear maps in place of {', '.join(facts)}"] if facts else []
        columns = slot_columns(model, sites, form)
        return Plan(sites, sites, before, options, notes=notes, columns=columns)
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
        return Plan(sites, chosen, before, options, notes=notes)
    if sees_ahead(model):
        raise UsageError(
            f"{type(model).__name__} lets the tokens of an image see each other both ways, and a window only looks "
            "back; take the target mla"
        )
    share = min(1.0, windowing.cached_tokens / before.length)
    windowed = {site.layer_idx: gateswa_values(windowing.config(site)) * share for site in chosen}
    if options.full_layers is None and kv_budget is not None and not latent:
        full: int | list[int] = full_count(kv_budget, dict(enumerate(before.per_layer)), windowed)
    else:
        full = full_layers_of(options.full_layers, chosen)
    return Plan(sites, chosen, before, options, full, windowed, notes)


def calibration_windows(model: PreTrainedModel, options: CompileOptions) -> CalibrationWindows:
    """Windows of the data; for windowed layers the short ones too are as long as several of the attention's windows."""
    windowing = options.windowing
    return cut_windows(
        options.calibration,
        options.tokenizer,
        model,
        tokens=options.calibration_tokens,
        length=options.calibration_length,
        least=SHORT_LENGTH if windowing is None else max(SHORT_LENGTH, 4 * windowing.cached_tokens),
        seed=options.seed,
        progress=options.progress,
        processor=options.processor,
    )


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

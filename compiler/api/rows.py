"""The report's rows: each attention site before and after."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import left_of
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.token_windows import shares_of
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.compiler.formats import own_version
from attnedit.compiler.reporting.records import KVUsage, LayerReport, RuleReport, Verification
from attnedit.compiler.reporting.report import Report, kv_fields, used_memory
from attnedit.figures import memory_curve
from attnedit.planning import Plan
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.kinds import kind_of

_CONTRACTS = ("exact", "close", "learned")
_WEAKEST = _CONTRACTS[-1]


@dataclass
class Fitted:
    """New attention, by the site's name; filled in as targets are fitted.

    Attributes:
        graphs: with their weights, or on meta where these are written already.
        matched: names of the sites that each target was fitted for, by the target's name.
        spent: seconds for that, by the target's name.
        contracts: what the fit of each site promises, by its name: kinds of `Contract`.
        energy_kept, output_error, loss_increase: where measured; see `LayerReport`.
        full: layers that keep no window, where others got one.
        notes: what the user should know.
        rules: of rewrites; those of targets follow from `matched`, `spent` and `contracts`.
        kinds: what the report calls the new attention, where that is not its kind's name.
        earlier: names of the sites that changed before, and not now.
        checks: contracts that were held while fitting.
        rounding: what decoding may be off by; see `same_decode`.
    """

    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    matched: dict[str, Collection[str]] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=dict)
    contracts: dict[str, str] = field(default_factory=dict)
    energy_kept: dict[str, float] = field(default_factory=dict)
    output_error: dict[str, float] = field(default_factory=dict)
    loss_increase: dict[str, float] = field(default_factory=dict)
    full: list[int] | None = None
    notes: list[str] = field(default_factory=list)
    rules: list[RuleReport] = field(default_factory=list)
    kinds: dict[str, str] = field(default_factory=dict)
    earlier: frozenset[str] = frozenset()
    checks: list[Verification] = field(default_factory=list)
    rounding: float = 0.0

    def promised(self, target: str) -> str:
        """The weakest contract of a target's sites."""
        return max((self.contracts.get(name, _WEAKEST) for name in self.matched[target]), key=_CONTRACTS.index)


def compile_report(
    result: PreTrainedModel,
    plan: Plan,
    configs: Mapping[str, SiteConfig],
    fitted: Fitted,
    windows: CalibrationWindows | None,
    **facts: Any,
) -> Report:
    """What there is to report of a compilation.

    Args:
        result: the rewritten model, live or on meta.
        plan: with the sites, the source's cache and what was asked for.
        configs: of the new attention, by the site's name.
        fitted: what the fits found.
        windows: of calibration data; None where nothing was to be lost.
        **facts: the other fields of `Report`.
    """
    after, options = kv_usage(result), plan.options
    rules = [
        RuleReport(
            name=target.name,
            contract=fitted.promised(target.name),
            matched=len(fitted.matched[target.name]),
            rewritten=sum(name in configs for name in fitted.matched[target.name]),
            rejected=plan.rejected,
            seconds=fitted.spent.get(target.name, 0.0),
        )
        for target in plan.targets
        if fitted.matched.get(target.name)
    ]
    rules += fitted.rules
    return Report(
        attnedit_version=own_version(),
        target=plan.target_name,
        sites_matched=len(plan.sites),
        sites_rewritten=len(configs.keys() - fitted.earlier),
        layers=_layers(plan, configs, after, fitted),
        rules=rules,
        calibration="" if windows is None else calibration_name(options.calibration),
        calibration_tokens=0 if windows is None else windows.tokens,
        calibration_length=None if windows is None else windows.length,
        calibration_windows="" if windows is None else str(windows),
        kv_budget_asked=plan.budget_asked,
        full_layers=fitted.full,
        left=left_of(plan.sites),
        **used_memory(),
        kv_curve=memory_curve(result, plan, configs, after),
        **kv_fields(plan.before, after),
        **facts,
    )


def _layers(plan: Plan, configs: Mapping[str, SiteConfig], after: KVUsage, fitted: Fitted) -> list[LayerReport]:
    """One row per site."""
    rows = []
    measured = {name: getattr(fitted, name) for name in ("energy_kept", "output_error", "loss_increase")}
    for site in plan.sites:
        config = configs.get(site.name)
        kind = None if config is None else kind_of(config)
        figures = {} if kind is None or config is None else kind.figures_of(config)
        own = [name for name in figures if name in LayerReport.model_fields]
        columns: dict[str, Any] = {name: figures.pop(name) for name in own}
        columns |= {what: by_site.get(site.name) for what, by_site in measured.items()}
        rows.append(
            LayerReport(
                layer=site.layer_idx,
                name=site.name,
                kind="source" if kind is None else fitted.kinds.get(site.name, kind.name),
                figures=figures,
                values_before=plan.before.per_layer[site.layer_idx],
                values_after=after.per_layer[site.layer_idx],
                **columns,
            )
        )
    return rows


def calibration_name(calibration: Any) -> str:
    """How the report names the data."""
    if calibration is None:
        return "own samples"
    if isinstance(calibration, Mapping):
        return ", ".join(f"{name} ({share_of_data:.0%})" for name, share_of_data in shares_of(calibration).items())
    return str(calibration) if isinstance(calibration, str) or hasattr(calibration, "__fspath__") else "given data"

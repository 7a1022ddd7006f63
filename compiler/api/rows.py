"""What a compilation reports: each attention site before and after, memory, graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.sites import AttentionSite, left_of
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.token_windows import shares_of
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.compiler.formats import own_version
from attnedit.compiler.reporting.graph_svg import sketch
from attnedit.compiler.reporting.records import KVCurve, KVUsage, LayerReport, RuleReport, SiteGraphs, Verification
from attnedit.compiler.reporting.report import Report, kv_fields, used_memory
from attnedit.planning import Plan
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.cost import BATCH, LENGTH, attention_cost, attention_values
from attnedit.targets.attention.kinds import kind_of
from attnedit.targets.runtime.engines import window_cache

CURVE_POINTS = 32
"""Of memory against the length of the context."""
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


def memory_curve(
    model: PreTrainedModel, plan: Plan, configs: Mapping[str, SiteConfig], after_usage: KVUsage
) -> KVCurve:
    """Memory of one sequence up to the model's context; where no cost is known, in proportion to what was measured."""
    hidden_size = int(model.config.get_text_config(decoder=True).hidden_size)
    before, after = [], []
    for site in plan.sites:
        own = plan.before.per_layer[site.layer_idx]
        sizes = (site.num_attention_heads, site.num_key_value_heads, site.head_dim, site.v_head_dim)
        values = own * LENGTH if site.already_mla else attention_cost(hidden_size, *sizes, site.window).cached_values
        before.append(values)
        config = configs.get(site.name)
        cost = None if config is None else kind_of(config).cost
        share = after_usage.per_layer[site.layer_idx] / own if own else 1.0
        after.append(values * share if cost is None else cost(config).cached_values)
    lengths = sorted({max(1, plan.before.length * step // CURVE_POINTS) for step in range(1, CURVE_POINTS + 1)})
    totals = [sum(values) * model.dtype.itemsize for values in (before, after)]
    curves = [[float(total.subs({BATCH: 1, LENGTH: length})) for length in lengths] for total in totals]
    return KVCurve(lengths=lengths, before=curves[0], after=curves[1])


def site_graphs(
    model: PreTrainedModel, plan: Plan, graphs: Mapping[str, fx.GraphModule], configs: Mapping[str, SiteConfig]
) -> list[SiteGraphs]:
    """Graphs of the first site of each kind, before and after."""
    alike: dict[tuple[str, str], list[AttentionSite]] = {}
    for site in plan.sites:
        if site.name in configs:
            alike.setdefault((kind_of(configs[site.name]).name, site.kind), []).append(site)
    return [
        SiteGraphs(
            kind=kind,
            layers=[site.layer_idx for site in sites],
            before=sketch(graph_module(model, sites[0]).graph),
            after=sketch(graphs[sites[0].name].graph),
        )
        for (kind, _), sites in alike.items()
    ]


def engine_notes(model: PreTrainedModel, plan: Plan, configs: Mapping[str, SiteConfig]) -> list[str]:
    """What the engine that a result is for allocates for windows, beside what the cost model says that they hold."""
    engine = plan.options.engine
    windows = [getattr(configs.get(site.name), "sliding_window", site.window) for site in plan.sites]
    values = {attention_values(site.num_key_value_heads, site.head_dim, site.v_head_dim) for site in plan.sites}
    # Layers of other widths have pages of other sizes, which no engine's checkpoint with windows holds.
    if engine is None or not any(windows) or len(values) > 1:
        return []
    length = plan.before.length
    found = window_cache(engine, windows, values.pop(), model.dtype.itemsize, length)
    if found is None:
        return []
    size, flags = found
    return [
        f"{engine} allocates {size:,.0f} bytes per token at {length:,} tokens with {flags}: a window and a batch, in "
        "whole blocks"
    ]

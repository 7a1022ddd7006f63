"""Before any data is read: which sites change, and what may each of them cache."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

from transformers import PreTrainedModel

from attnedit.compiler.capture.probe import sees_ahead
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.calibration_windows import calibration_windows as cut_windows
from attnedit.compiler.data.window_sources import DEFAULT_WINDOW as SHORT_LENGTH
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.model_io.heads import SAMPLING, need_language_head
from attnedit.compiler.reporting.records import KVUsage
from attnedit.compiler.rewriting.registry import TARGETS, registered
from attnedit.options import CalibrateOptions, CompileOptions
from attnedit.passes.questions import Claim, Question
from attnedit.passes.target import AnyTarget
from attnedit.passes.targets import OWN
from attnedit.targets.attention.kinds import KINDS
from attnedit.targets.runtime.hf.towards import check_source, class_sizes

LATENT_ALREADY, SLIDES = "multi-head latent attention already", "a window of their own already"
REASONS = {
    LATENT_ALREADY: "sites are latent already and stay as they are",
    SLIDES: "layers already slide over a window and stay as they are",
}
"""In notes, after how many."""


@dataclass(frozen=True)
class Plan:
    """What is to become of the attention sites of a model.

    Attributes:
        sites: all of them.
        chosen: those that change.
        before: the source's cache.
        options: what was asked for.
        targets: what changes them, in order: each what those before it left; none where rewrites do.
        notes: what the user should know.
        rejected: of the sites that stay as they are, how many by reason.
    """

    sites: list[AttentionSite]
    chosen: list[AttentionSite]
    before: KVUsage
    options: CompileOptions
    targets: tuple[AnyTarget, ...]
    notes: list[str] = field(default_factory=list)
    rejected: dict[str, int] = field(default_factory=dict)

    @cached_property
    def exact(self) -> bool:
        """Whether nothing is to be lost."""
        if rewrites := self.options.rewrites:
            return all(one.contract.kind == "exact" for one in rewrites)
        return all(shape.exact for _, claim in self.claims() for shape in claim.shapes.values())

    @property
    def needs_data(self) -> bool:
        """Whether something is fitted."""
        if rewrites := self.options.rewrites:
            return any(one.fit is not None for one in rewrites)
        return not self.exact

    @property
    def target_name(self) -> str:
        """What the attention becomes: the target, or its rewrites by their classes."""
        return "+".join(one.name for one in self.options.rewrites) or self.options.target_name

    @property
    def budget_asked(self) -> float | None:
        """What the report says was asked for."""
        asked = self.options
        default = None if asked.kernel_dims or not self.targets else self.targets[0].default_budget
        return default if asked.kv_budget is None else asked.kv_budget

    def question(self, target: AnyTarget, left: list[AttentionSite], changed: Mapping[int, float]) -> Question:
        """What a target plans by.

        Args:
            target: of this plan.
            left: chosen sites that no target before it changes.
            changed: what those cache that one does, by layer.
        """
        before = dict(enumerate(self.before.per_layer))
        last = target is self.targets[-1]
        return Question(self.sites, left, before, self.before.length, self.options.kv_budget, changed, last)

    def claims(self) -> list[tuple[AnyTarget, Claim]]:
        """What each target will do; where a loss must be measured to say which layers one leaves, the first are taken.

        Raises:
            UsageError: the budget cannot be met.
        """
        found, left, changed = [], self.chosen, dict[int, float]()
        for target in self.targets:
            if not left:
                break
            claim = target.plan(self.question(target, left, changed))
            found.append((target, claim))
            stay = left[: claim.leave] if isinstance(claim.leave, int) else []
            stay = stay or [site for site in left if site.name not in claim.shapes]
            kept = {site.name for site in stay}
            changed |= {site.layer_idx: claim.shapes[site.name].values for site in left if site.name not in kept}
            left = stay
        return found


def plan_sites(model: PreTrainedModel, sites: list[AttentionSite], before: KVUsage, options: CompileOptions) -> Plan:
    """Plan the rewriting of a model.

    Raises:
        UsageError: the options make no sense for these sites.
        CaptureError: there is nothing to convert.
    """
    targets, form = options.configured, options.form
    if form is not None and form.holds.uniform:
        facts = check_source(model, sites, form)
        notes = [f"profile {form.profile} has linear maps in place of {', '.join(facts)}"] if facts else []
        given = class_sizes(model, sites, form)
        return Plan(sites, sites, before, options, tuple(target.towards(given) for target in targets), notes)
    chosen, notes, rejected = choose_sites(sites, targets)
    caching = sum(values > 0 for values in before.per_layer)
    if caching > len(sites):
        notes.append(f"{caching - len(sites)} layers that keep a cache stay as they are: others read their keys too")
    if any(target.cached_tokens for target in targets) and sees_ahead(model):
        raise UsageError(
            f"{type(model).__name__} lets the tokens of an image see each other both ways, and a window only looks "
            f"back; take the target {' or '.join(name for name, own in OWN.items() if not own.cached_tokens)}"
        )
    notes += [note for target in targets for note in target.notes(chosen)]
    known = registered(TARGETS)
    notes += [
        f"no package registers {target.kind.title} as {target.kind.name!r}: a saved copy loads only where one does"
        for target in targets
        if target.kind.name not in {*KINDS, *known}
    ]
    return Plan(sites, chosen, before, options, targets, notes, rejected)


def calibration_windows(model: PreTrainedModel, options: CompileOptions) -> CalibrationWindows:
    """Windows of the data; where layers hold few tokens the short ones too are several times as long."""
    held = max(target.cached_tokens for target in options.configured)
    return cut_windows(
        options.calibration,
        options.tokenizer,
        model,
        tokens=options.calibration_tokens,
        length=options.calibration_length,
        least=max(SHORT_LENGTH, 4 * held),
        seed=options.seed,
        progress=options.progress,
        processor=options.processor,
    )


def choose_sites(
    sites: list[AttentionSite], targets: Sequence[AnyTarget] = ()
) -> tuple[list[AttentionSite], list[str], dict[str, int]]:
    """Which sites are converted, what the user should know of the others, and how many of these by reason.

    Layers that slide stay as they are where others do not; a model in which all slide is converted, window kept.

    Raises:
        CaptureError: there is nothing to convert.
    """
    reasons = {site.name: _refusal(site, targets) for site in sites}
    able = [site for site in sites if reasons[site.name] is None]
    full = [site for site in able if site.window is None]
    if full and len(full) < len(able):
        reasons |= {site.name: SLIDES for site in able if site.window is not None}
    if not able:
        names, why = first_of([site.name for site in sites]), "; ".join(dict.fromkeys(filter(None, reasons.values())))
        link = "are" if why == LATENT_ALREADY else "cannot change:"
        raise CaptureError(f"all {len(sites)} attention sites ({names}) {link} {why}")
    rejected = dict(Counter(reason for reason in reasons.values() if reason is not None))
    said = {reason: REASONS.get(reason, f"sites stay as they are: {reason}") for reason in rejected}
    notes = [f"{count} {said[reason]}" for reason, count in rejected.items()]
    return full or able, notes, rejected


def _refusal(site: AttentionSite, targets: Sequence[AnyTarget]) -> str | None:
    """Why a site stays as it is, whatever the others are."""
    if site.already_mla:
        return LATENT_ALREADY
    found = (target.check(site) for target in targets)
    return next((reject.reason for reject in found if reject is not None), None)


def check_head(model: PreTrainedModel, options: CalibrateOptions) -> None:
    """Refuse what a model without a language head cannot have, before data is read.

    Raises:
        UsageError: distillation, own samples, or a form for engines is asked for.
    """
    need = partial(need_language_head, model)
    if options.distill_steps:
        need("distillation", "train it with fit_steps alone")
    if isinstance(options, CompileOptions) and options.form is not None:
        need("a form for engines (profile, engine, kernel_dims)", "leave it out")
    if options.calibration is None and not _lossless(options):
        need(SAMPLING, "give calibration text")
    if options.steps and options.self_generated:
        need(SAMPLING, "give calibration text and self_generated 0")


def _lossless(options: CalibrateOptions) -> bool:
    """Whether nothing is asked for that takes data."""
    if not isinstance(options, CompileOptions) or options.steps:
        return False
    if not options.planned:
        return all(one.fit is None for one in options.rewrites)
    return options.kv_budget == 1 and all(one.default_budget for one in options.configured)


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

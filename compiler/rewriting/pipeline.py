"""Rewrites in order over the attention sites of a model, each held to its contract on real numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite, by_reason
from attnedit.compiler.errors import CaptureError, VerificationError
from attnedit.compiler.execution.stream import AttentionInputs, stream
from attnedit.compiler.progress import Progress, track
from attnedit.compiler.reporting.records import RuleReport, Verification
from attnedit.compiler.rewriting.apply import Applied, Batches, Outcome, apply, run_fit, trace_patterns
from attnedit.compiler.rewriting.dumps import Dump
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.compiler.rewriting.graft import SiteGraph
from attnedit.compiler.rewriting.rewrite import Batch, Rewrite, options_of

HALF_ROUNDING = 2e-2
"""Of the largest value: what "close" may be off by beyond its tolerances where the model is in half precision."""


class Target:
    """What attention becomes: what a third party registers under the entry points `attnedit.targets`.

    This one is made of rewrites; `attnedit.AttentionTarget` is one that chooses shapes for all sites under a budget.

    Args:
        name: what `attnedit compile --target` calls it.
        rewrites: in order.
        description: one line for people.

    Attributes:
        reads: options of `attnedit.options.CompileOptions` that it reads; it is refused any other that only some
            targets read.
        leaves: whether it may leave layers for another target to change ("gateswa+mla").
        stage, does: of the pipeline, in `attnedit compile --explain`.
    """

    name: str
    rewrites: tuple[Rewrite, ...] = ()
    description: str = ""
    reads: ClassVar[frozenset[str]] = frozenset({"partial"})
    leaves: ClassVar[bool] = False
    stage: ClassVar[str] = "rewrite"
    does: str = "apply rewrites"

    def __init__(self, name: str, rewrites: Sequence[Rewrite], description: str = "") -> None:
        self.name, self.rewrites, self.description = name, tuple(rewrites), description

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"


@dataclass
class SiteRecord:
    """What the pipeline did to one site.

    Attributes:
        state: its graph, changed in place.
        entries: what a saved result records of each rewrite, in order.
        changed: whether this run added one.
        error: relative squared error of the values that were replaced, by the last rewrite; None if not measured.
    """

    state: SiteGraph
    entries: list[dict[str, Any]] = field(default_factory=list)
    changed: bool = False
    error: float | None = None

    @property
    def site(self) -> AttentionSite:
        """Its facts."""
        return self.state.site


@dataclass
class Inputs:
    """Real numbers for a pipeline.

    Attributes:
        model: the live source, in eval mode.
        prompt: token ids [B, T] on which contracts are held; None to hold none.
        windows: calibration token ids [N, T] of each length T, for rewrites with `fit`; None where none has one.
    """

    model: PreTrainedModel
    prompt: Tensor | None
    windows: Sequence[Tensor] | None


def run_pipeline(
    rewrites: Sequence[Rewrite],
    records: list[SiteRecord],
    inputs: Inputs,
    *,
    fuel: Fuel,
    dump: Dump,
    partial: bool = False,
    progress: Progress | None = None,
) -> tuple[list[RuleReport], list[Verification]]:
    """Apply rewrites, each to every site, before the next.

    Args:
        rewrites: in order; checked by `check_rewrite`.
        records: the sites; their graphs change in place.
        inputs: real numbers.
        fuel: how many rewrites may be done.
        dump: where graphs go.
        partial: let sites be that no rewrite matches.
        progress: see `attnedit.compiler.progress`.

    Returns:
        What each rewrite did, and the contracts with their errors.

    Raises:
        RewriteError: a rewrite is written wrongly.
        CaptureError: nothing rewrote a site; the message has the near misses.
        VerificationError: a rewrite broke its contract.
    """
    reports, checks = [], []
    misses: dict[str, list[str]] = {record.site.name: [] for record in records}
    recorded = {} if inputs.prompt is None else record_inputs(inputs.model, records, inputs.prompt)
    for rewrite in rewrites:
        start = perf_counter()
        pattern_for = trace_patterns(rewrite)
        outcomes: dict[str, Outcome] = {}
        for record in track(records, rewrite.name, progress):
            before = record.state.root
            outcome = outcomes[record.site.name] = apply(rewrite, pattern_for(record.state), record.state, fuel)
            dump(rewrite.name, record.site.name, before, record.state.root)
            if outcome.applied:
                entry = {"rewrite": rewrite.identity, "options": options_of(rewrite), "decisions": outcome.decisions}
                record.entries.append(entry)
                record.changed = True
            else:
                misses[record.site.name].append(f"{rewrite.name} ({rewrite.place}): {outcome.reason}")
        _fit(rewrite, records, outcomes, inputs, progress)
        check = _verify(rewrite, records, outcomes, recorded)
        checks += [] if check is None else [check]
        reports.append(_report(rewrite, outcomes, perf_counter() - start))
    if not partial and not fuel.refused:
        problems = [(r.site.name, "; ".join(misses[r.site.name])) for r in records if not r.changed]
        if problems:
            raise CaptureError(
                f"{len(problems)} of {len(records)} attention sites match no rewrite: "
                f"{'; '.join(by_reason(problems))}; "
                "mend the pattern, or let them be with partial=True"
            )
    return reports, checks


def record_inputs(model: nn.Module, records: list[SiteRecord], prompt: Tensor) -> dict[str, AttentionInputs]:
    """The arguments of each attention module in one forward pass of the source, by the site's name."""
    found: dict[str, AttentionInputs] = {}
    handles = []
    for record in records:

        def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = record.site.name) -> None:
            found[name] = AttentionInputs(args, kwargs)

        handles.append(model.get_submodule(record.site.name).register_forward_pre_hook(keep, with_kwargs=True))
    try:
        with torch.no_grad():
            model(prompt, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _fit(
    rewrite: Rewrite,
    records: list[SiteRecord],
    outcomes: dict[str, Outcome],
    inputs: Inputs,
    progress: Progress | None,
) -> None:
    """Let the author's `fit` give all parts their values, layer by layer where it reads data."""
    applied = {name: outcome.applied for name, outcome in outcomes.items() if outcome.applied}
    if rewrite.fit is None:
        for done in (one for several in applied.values() for one in several):
            run_fit(rewrite, done.match, ())
        return
    if not applied:
        return

    def visit(site: AttentionSite, given: Iterator[AttentionInputs]) -> None:
        kept = list(given)
        for done in applied[site.name]:
            run_fit(rewrite, done.match, Batches(done, kept))

    sites = [record.site for record in records if record.site.name in applied]
    stream(inputs.model, sites, inputs.windows or (), visit, progress=progress, stage=f"fit {rewrite.name}")


def _verify(
    rewrite: Rewrite, records: list[SiteRecord], outcomes: dict[str, Outcome], recorded: dict[str, AttentionInputs]
) -> Verification | None:
    """Hold every match to the contract; the largest deviation is reported."""
    worst: float | None = None
    for record in records:
        if record.site.name not in recorded:
            continue
        for done in outcomes[record.site.name].applied:
            given = recorded[record.site.name]
            batch = done.run(given.args, given.kwargs)
            error, record.error = _hold(rewrite, done, batch)
            worst = error if worst is None else max(worst, error)
    if worst is None:
        return None
    contract = rewrite.contract
    return Verification(what=f"{rewrite.name}, new values against old", contract=str(contract), error=worst)


def _hold(rewrite: Rewrite, done: Applied, batch: Batch) -> tuple[float, float]:
    """Largest deviation as a fraction of the largest value, and relative squared error.

    Raises:
        VerificationError: the contract is broken.
    """
    contract, deviation, squared, energy = rewrite.contract, 0.0, 0.0, 0.0
    for old, new in zip(batch.before, batch.after, strict=True):
        kind = torch.promote_types(old.dtype, torch.float32)
        expected, found = old.to(kind), new.to(kind)
        size = float(expected.abs().max())
        difference = (found - expected).abs()
        worst = float(difference.max())
        deviation = max(deviation, worst / max(size, 1e-30))
        squared += float(difference.double().square().sum())
        energy += float(expected.double().square().sum())
        allowed = contract.atol * size + contract.rtol * expected.abs()
        if old.dtype in (torch.float16, torch.bfloat16):
            allowed = allowed + HALF_ROUNDING * size
        kept = torch.equal(old, new) if contract.kind == "exact" else bool((difference <= allowed).all())
        broken = not kept if contract.kind != "learned" else not bool(torch.isfinite(found).all())
        if broken:
            raise VerificationError(
                f"{rewrite.name} ({rewrite.place}) promises {contract} and breaks it at {done.match.site.name}: off by "
                f"{worst:.1e} where the largest value is {size:.1e}; mend the replacement, or promise less"
            )
    return deviation, squared / max(energy, 1e-30)


def _report(rewrite: Rewrite, outcomes: dict[str, Outcome], seconds: float) -> RuleReport:
    rejected: dict[str, int] = {}
    for outcome in outcomes.values():
        for reason in outcome.rejected:
            rejected[reason] = rejected.get(reason, 0) + 1
    matched = sum(len(outcome.decisions) for outcome in outcomes.values())
    nearest = max(
        (o.nearest for o in outcomes.values() if o.nearest is not None), key=lambda m: m.matched, default=None
    )
    return RuleReport(
        name=rewrite.name,
        place=rewrite.place,
        contract=str(rewrite.contract),
        matched=matched,
        rewritten=sum(len(outcome.applied) for outcome in outcomes.values()),
        rejected=rejected,
        nearest_miss=nearest.reason if nearest is not None and not matched else None,
        seconds=seconds,
    )

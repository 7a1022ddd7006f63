"""`attnedit.rewrite`: the pipeline from a live model to one whose attention graphs rewrites have edited."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit._pipeline import Source, on_device, run
from attnedit._stages import Log, said
from attnedit.arguments import CompileArguments, check_known, shown
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.token_windows import token_windows
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.execution.verify import LENGTH, check_tokens
from attnedit.compiler.model_io.heads import SAMPLING, need_language_head
from attnedit.compiler.model_io.live_checks import check_in_memory, check_live
from attnedit.compiler.model_io.source_checks import check_config, check_weights, model_name
from attnedit.compiler.reporting.records import KVUsage
from attnedit.compiler.rewriting.dumps import Dump
from attnedit.compiler.rewriting.fuel import Fuel
from attnedit.compiler.rewriting.graft import SiteGraph
from attnedit.compiler.rewriting.pipeline import Inputs, SiteRecord, Target, run_pipeline
from attnedit.compiler.rewriting.registry import PASSES, TARGETS, load, registered
from attnedit.compiler.rewriting.rewrite import Rewrite, check_rewrite
from attnedit.options import TARGETS as OWN_TARGETS
from attnedit.options import CompileOptions
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.target import AttentionTarget
from attnedit.planning import LATENT_ALREADY, REASONS, Plan, first_of
from attnedit.result import CompileResult
from attnedit.rows import Fitted
from attnedit.targets.attention.rewritten.config import RewrittenConfig
from attnedit.targets.attention.rewritten.graph import KV_CACHE_MODULE, config_of, lower, pure
from attnedit.targets.runtime.eager import share_copy
from attnedit.targets.runtime.eager.classes import source_sites


@shown(CompileArguments)
def rewrite(
    model: PreTrainedModel,
    rewrites: Rewrite | Target | str | Sequence[Rewrite | str],
    **options: Unpack[CompileArguments],
) -> CompileResult:
    """Apply rewrites to the attention of a trained model, and hold each to its contract.

    Args:
        model: a transformers causal language model, or one that this function made; not changed unless `in_place`.
        rewrites: in order: rewrites, or names of targets and passes that packages register. A `Target`, or names with
            "+" between, are a sequence too.
        **options: the fields of `attnedit.options.CompileOptions`, but for those of our own targets and of training.

    Returns:
        The rewritten model and its report.

    Raises:
        RewriteError: a rewrite is written wrongly; addressed to its author.
        UsageError: wrong arguments or input; CaptureError (a UsageError) where a site matches no rewrite.
        VerificationError: a contract is broken.

    Example:
        >>> attnedit.rewrite(model, [HeadGate(), Int8Cache()], tokenizer=tokenizer)  # doctest: +SKIP
    """
    chosen = resolve(rewrites)
    check_known({**options}, CompileArguments, "is for reading a checkpoint, and the model is live; leave it out")
    for name in (*CalibrationOptions.model_fields, "run_directory"):
        if options.get(name) is not None:
            raise UsageError(f"{name} is for training: give the rewrites to attnedit.compile as a Target")
    target = Target("+".join(one.name for one in chosen), tuple(chosen))
    checked = CompileOptions.of(target=target, **options)
    result, report = run(RewriteSource(model, checked), checked)
    return CompileResult(result, report, checked.tokenizer, processor=checked.processor)


@dataclass(frozen=True)
class RewritePlan(Plan):
    """What rewrites are to do to the attention sites of a model.

    Attributes:
        rewrites: in order.
    """

    rewrites: tuple[Rewrite, ...] = ()

    @cached_property
    def exact(self) -> bool:
        """Whether every contract is."""
        return all(one.contract.kind == "exact" for one in self.rewrites)

    @property
    def needs_data(self) -> bool:
        """Whether a rewrite is fitted."""
        return any(one.fit is not None for one in self.rewrites)

    @property
    def target_name(self) -> str:
        """The rewrites by their classes."""
        return "+".join(one.name for one in self.rewrites)

    @property
    def budget_asked(self) -> None:
        """Rewrites have none."""


class RewriteSource(Source):
    """A live model whose graphs rewrites edit; see `attnedit._pipeline.Source`."""

    def __init__(self, model: PreTrainedModel, options: CompileOptions) -> None:
        self._rewrites = tuple(resolve(cast("str | Target", options.target)))
        self._limit, self._dump = Fuel(options.fuel), Dump(options.dump_graphs)
        self._options = options
        self.name = model_name(model)
        _check_source(model, self.name)
        if options.calibration is None and any(one.fit is not None for one in self._rewrites):
            need_language_head(model, SAMPLING, "give calibration text")
        self.model = self.result = on_device(model, options)

    def capture(self) -> list[AttentionSite]:
        """Its attention sites, with what earlier rewrites did to them."""
        sites, self._records = _records(self.model)
        return sites

    def plan(self, sites: list[AttentionSite], before: KVUsage, options: CompileOptions) -> RewritePlan:
        """Every site is there for every rewrite."""
        chosen = [record.site for record in self._records]
        latent = len(sites) - len(chosen)
        notes = [f"{latent} {REASONS[LATENT_ALREADY]}"] if latent else []
        return RewritePlan(sites, chosen, before, options, (), notes, rewrites=self._rewrites)

    def data(self, options: CompileOptions) -> CalibrationWindows:
        """Windows of one length: an author's fit may hold attention of all pairs of tokens."""
        windows = token_windows(
            options.calibration,
            options.tokenizer,
            self.model,
            tokens=options.calibration_tokens,
            seed=options.seed,
            progress=options.progress,
        )
        return CalibrationWindows([windows])

    def ready(self, plan: Plan) -> None:
        """Make the model that becomes the result."""
        self.result = self.model if self._options.in_place else share_copy(self.model)

    def fit(self, plan: Plan, windows: list[Tensor] | None, log: Log) -> Fitted:
        """Rewrite by rewrite, each over every site, and held to its contract."""
        options, records = self._options, self._records
        prompt = _prompt(self.model, windows) if options.verify else None
        with log("rewrite") as entry:
            rules, checks = run_pipeline(
                self._rewrites,
                records,
                Inputs(self.model, prompt, windows),
                fuel=self._limit,
                dump=self._dump,
                partial=options.partial,
                progress=options.progress,
            )
            entry.did = ", ".join(f"{rule.name}: {rule.rewritten} of {rule.matched} matches" for rule in rules)
            entry.checked = [said(check) for check in checks]
        changed = [record for record in records if record.entries]
        graphs = {}
        for record in changed:
            place = record.site.name
            model_config = config_of(self.result, self.result.get_submodule(place))
            config = RewrittenConfig(record.site.layer_idx, tuple(record.entries))
            graphs[place] = lower(_own(record, self.result), record.site, model_config, config)
        return Fitted(
            graphs,
            output_error={record.site.name: record.error for record in changed if record.error is not None},
            notes=[*self._limit.note(), *_import_notes(self._rewrites)],
            rules=rules,
            kinds={record.site.name: _names(record) for record in changed},
            earlier=frozenset(record.site.name for record in changed if not record.changed),
            checks=checks,
            rounding=max(one.contract.atol + one.contract.rtol for one in self._rewrites),
        )


def resolve(rewrites: Rewrite | Target | str | Sequence[Rewrite | str]) -> list[Rewrite]:
    """Rewrites in order, from rewrites, targets, and names that packages register.

    Raises:
        UsageError: a name is not registered.
        RewriteError: something is no rewrite.
    """
    if isinstance(rewrites, str):
        return [found for part in rewrites.split("+") for found in _named(part.strip())]
    if isinstance(rewrites, Target):
        rewrites = rewrites.rewrites
    several = list(rewrites) if isinstance(rewrites, Sequence) else [rewrites]
    chosen = [found for one in several for found in (_named(one) if isinstance(one, str) else [one])]
    if not chosen:
        raise UsageError("no rewrites are given; give at least one")
    for one in chosen:
        check_rewrite(one)
    return chosen


def _points(group: str) -> dict[str, Any]:
    return registered(group, dict.fromkeys(OWN_TARGETS, ""))


def _named(name: str) -> list[Rewrite]:
    targets, passes = _points(TARGETS), _points(PASSES)
    if name in OWN_TARGETS:
        raise UsageError(f"{name} is made by attnedit.compile, not by rewrites; it cannot be combined with them")
    if name not in targets and name not in passes:
        known = ", ".join(sorted({*targets, *passes})) or "none is registered"
        raise UsageError(f"no target or pass {name!r} among the entry points {TARGETS} and {PASSES}: {known}")
    found = load(targets[name], "target") if name in targets else load(passes[name], "pass")
    made = found() if callable(found) else found
    if isinstance(made, AttentionTarget):
        raise UsageError(f"{name} is made by attnedit.compile, not by rewrites; it cannot be combined with them")
    if isinstance(made, Target):
        return resolve(made)
    return resolve([made])


def _check_source(model: PreTrainedModel, name: str) -> None:
    check_live(model, name)
    check_in_memory(model, name)
    record = getattr(model.config, "attnedit", None)
    if record is None:
        check_config(model.config, name, trust_remote_code=True)  # what is live has run already
        check_weights(model, name)
        return
    other = [site for site, values in record["sites"].items() if values.get("kind") != KV_CACHE_MODULE]
    if other:
        raise UsageError(
            f"{name} is no longer ordinary attention ({first_of(other)}); rewrite the model that it came from"
        )


def _records(model: PreTrainedModel) -> tuple[list[AttentionSite], list[SiteRecord]]:
    """The sites of a model, and those to rewrite as pure graphs, with what earlier rewrites did to them."""
    earlier = getattr(model.config, "attnedit", None)
    sites = capture(model) if earlier is None else list(source_sites(model).values())
    records = []
    for site in sites:
        if site.already_mla:
            continue
        module = model.get_submodule(site.name)
        values = None if earlier is None else earlier["sites"].get(site.name)
        if values is None:
            records.append(SiteRecord(SiteGraph(site, module, graph_module(model, site))))
        else:
            root = pure(module, site)  # type: ignore[arg-type]
            records.append(SiteRecord(SiteGraph(site, module, root), copy.deepcopy(values["rewrites"])))
    if not records:
        raise CaptureError(f"all {len(sites)} attention sites are multi-head latent attention already")
    return sites, records


def _own(record: SiteRecord, result: PreTrainedModel) -> torch.fx.GraphModule:
    """The site's graph with the result's own modules and tensors in place of the source's."""
    root, theirs = record.state.root, result.get_submodule(record.site.name)
    memo: dict[int, Any] = {}
    mine = dict(record.state.module.named_modules(remove_duplicate=False))
    for name, module in theirs.named_modules(remove_duplicate=False):
        if name and name in mine:
            memo[id(mine[name])] = module
    tensors = dict((*record.state.module.named_parameters(), *record.state.module.named_buffers()))
    for name, tensor in (*theirs.named_parameters(), *theirs.named_buffers()):
        if name in tensors:
            memo[id(tensors[name])] = tensor
    return copy.deepcopy(root, memo)


def _prompt(model: PreTrainedModel, windows: list[Tensor] | None) -> Tensor:
    """Two rows of tokens [2, T], of the calibration data where there is some."""
    ids = check_tokens(windows, model)
    return torch.cat((ids, ids.roll(LENGTH // 3, 1)))


def _names(record: SiteRecord) -> str:
    return "+".join(entry["rewrite"].rpartition(":")[2].rpartition(".")[2] for entry in record.entries)


def _import_notes(rewrites: Sequence[Rewrite]) -> list[str]:
    homeless = [
        r.name for r in rewrites if r.identity.startswith(("__main__:", "builtins:")) or "<locals>" in r.identity
    ]
    if not homeless:
        return []
    return [
        f"{', '.join(dict.fromkeys(homeless))} cannot be imported by others: a saved copy loads only once it is "
        "defined at the top level of a module"
    ]

"""`attnedit.rewrite`: the pipeline with a source whose attention graphs rewrites edit."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit._live import LiveSource
from attnedit._pipeline import outcome, stages_of
from attnedit._stages import Job, run, said
from attnedit.arguments import FOR_CHECKPOINTS, CompileArguments, check_known, shown
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.data.calibration_windows import CalibrationWindows
from attnedit.compiler.data.token_windows import token_windows
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.execution.verify import LENGTH, check_tokens
from attnedit.compiler.reporting.records import KVUsage, PipelineStage
from attnedit.compiler.rewriting.graft import SiteGraph
from attnedit.compiler.rewriting.pipeline import Inputs, SiteRecord, Target, run_pipeline
from attnedit.compiler.rewriting.rewrite import Rewrite, check_rewrite
from attnedit.options import CompileOptions
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.target import AttentionTarget
from attnedit.passes.targets import targets_named
from attnedit.planning import LATENT_ALREADY, REASONS, Plan, first_of
from attnedit.result import CompileResult
from attnedit.targets.attention.rewritten.config import RewrittenConfig
from attnedit.targets.attention.rewritten.graph import KV_CACHE_MODULE, config_of, lower, pure
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
    check_known({**options}, CompileArguments, FOR_CHECKPOINTS)
    for name in (*CalibrationOptions.model_fields, "run_directory"):
        if options.get(name) is not None:
            raise UsageError(f"{name} is for training: give the rewrites to attnedit.compile as a Target")
    target = Target("+".join(one.name for one in chosen), tuple(chosen))
    checked = CompileOptions.of(target=target, **options)
    job = Job(checked, lambda asked: RewriteSource(model, asked))
    run(stages_of(checked), job)
    return outcome(job)


class RewriteSource(LiveSource):
    """A live model whose graphs rewrites edit, one that rewrites have edited before too."""

    def __init__(self, model: PreTrainedModel, options: CompileOptions) -> None:
        self._rewrites = tuple(resolve(options.rewrites))
        super().__init__(model, options)

    def check_again(self, model: PreTrainedModel) -> None:
        """Refuse a model whose attention is of a kind of its own."""
        record: Any = model.config.attnedit
        other = [site for site, values in record["sites"].items() if values.get("kind") != KV_CACHE_MODULE]
        if other:
            raise UsageError(
                f"{self.name} is no longer ordinary attention ({first_of(other)}); rewrite the model that it came from"
            )

    def capture(self) -> list[AttentionSite]:
        """Its attention sites, with what earlier rewrites did to them."""
        sites, self._records = _records(self.model)
        return sites

    def plan(self, sites: list[AttentionSite], before: KVUsage) -> Plan:
        """Every site is there for every rewrite."""
        chosen = [record.site for record in self._records]
        latent = len(sites) - len(chosen)
        notes = [f"{latent} {REASONS[LATENT_ALREADY]}"] if latent else []
        return Plan(sites, chosen, before, self.options, (), notes)

    def data(self) -> CalibrationWindows:
        """Windows of one length: an author's fit may hold attention of all pairs of tokens."""
        options = self.options
        windows = token_windows(
            options.calibration,
            options.tokenizer,
            self.model,
            tokens=options.calibration_tokens,
            seed=options.seed,
            progress=options.progress,
        )
        return CalibrationWindows([windows])

    def fit(self, job: Job, target: Target | None, entry: PipelineStage) -> None:
        """Rewrite by rewrite, each over every site, and held to its contract."""
        options, fitted, windows = self.options, job.fitted, job.windows
        prompt = _prompt(self.model, windows) if options.verify else None
        fitted.rules, fitted.checks = run_pipeline(
            self._rewrites,
            self._records,
            Inputs(self.model, prompt, windows),
            fuel=self.fuel,
            dump=self.dump,
            partial=options.partial,
            progress=options.progress,
        )
        entry.did = ", ".join(f"{rule.name}: {rule.rewritten} of {rule.matched} matches" for rule in fitted.rules)
        entry.checked = [said(check) for check in fitted.checks]
        fitted.notes += [*self.fuel.note(), *_import_notes(self._rewrites)]
        fitted.rounding = max(one.contract.atol + one.contract.rtol for one in self._rewrites)

    def lower(self, job: Job) -> None:
        """Modules that use the model's cache and attention in place of the ops of the edited graphs."""
        fitted, changed = job.fitted, [record for record in self._records if record.entries]
        for record in changed:
            place = record.site.name
            model_config = config_of(self.result, self.result.get_submodule(place))
            config = RewrittenConfig(record.site.layer_idx, tuple(record.entries))
            fitted.graphs[place] = lower(_own(record, self.result), record.site, model_config, config)
            fitted.kinds[place] = _names(record)
            if record.error is not None:
                fitted.output_error[place] = record.error
        fitted.earlier = frozenset(record.site.name for record in changed if not record.changed)


def resolve(rewrites: Rewrite | Target | str | Sequence[Rewrite | str]) -> list[Rewrite]:
    """Rewrites in order, from rewrites, targets, and names that packages register.

    Raises:
        UsageError: a name is not registered, or is a target's with a budget.
        RewriteError: something is no rewrite.
    """
    several = list(rewrites) if isinstance(rewrites, Sequence) and not isinstance(rewrites, str) else [rewrites]
    chosen: list[Rewrite] = []
    for one in several:
        for made in targets_named(one) if isinstance(one, str) else [one]:
            if isinstance(made, AttentionTarget):
                raise UsageError(
                    f"{made.name} is made by attnedit.compile, not by rewrites; it cannot be combined with them"
                )
            chosen += made.rewrites if isinstance(made, Target) else [made]
    if not chosen:
        raise UsageError("no rewrites are given; give at least one")
    for rewrite_ in chosen:
        check_rewrite(rewrite_)
    return chosen


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

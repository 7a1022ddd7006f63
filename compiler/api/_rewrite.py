"""`attnedit.rewrite`: the pipeline from a live model to one whose attention graphs rewrites have edited."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Sequence
from typing import Any, Unpack, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit._calibrate import calibration_name
from attnedit._pipeline import evaluating, on_device, set_modes
from attnedit._stages import Log, said
from attnedit.arguments import CompileArguments, check_known, shown
from attnedit.compiler.capture.capture import as_captured, capture, graph_module
from attnedit.compiler.capture.sites import left_of
from attnedit.compiler.data.token_windows import token_windows
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.evaluation.evaluate import KVUsage, kv_usage
from attnedit.compiler.execution.verify import LENGTH, check_tokens, logits_of, same_decode, same_logits
from attnedit.compiler.formats import own_version
from attnedit.compiler.model_io.heads import SAMPLING, need_language_head
from attnedit.compiler.model_io.live_checks import check_in_memory, check_live
from attnedit.compiler.model_io.source_checks import check_config, check_weights, model_name
from attnedit.compiler.reporting.records import LayerReport
from attnedit.compiler.reporting.report import Report, kv_fields, peak_memory_bytes
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
from attnedit.planning import first_of
from attnedit.result import CompileResult
from attnedit.targets.attention.rewritten.config import RewrittenConfig
from attnedit.targets.attention.rewritten.graph import KV_CACHE_MODULE, config_of, lower, pure
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit, use_captured_implementation
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
    return rewrite_live(model, CompileOptions.of(target=target, **options))


def rewrite_live(model: PreTrainedModel, options: CompileOptions) -> CompileResult:
    """`rewrite` with options that are checked."""
    chosen, in_place, progress = resolve(cast("str | Target", options.target)), options.in_place, options.progress
    limit, dump = Fuel(options.fuel), Dump(options.dump_graphs)
    name = model_name(model)
    _check_source(model, name)
    if options.calibration is None and any(one.fit is not None for one in chosen):
        need_language_head(model, SAMPLING, "give calibration text")
    model = on_device(model, options)
    log = Log(progress)
    modes = evaluating(model)
    used: list[Tensor] = []

    def windows() -> Tensor:
        if not used:
            wanted: dict[str, Any] = {"tokens": options.calibration_tokens, "seed": options.seed, "progress": progress}
            used.append(token_windows(options.calibration, options.tokenizer, model, **wanted))
        return used[0]

    implementation = contextlib.ExitStack()
    try:
        before = kv_usage(model)
        with log("capture", bar=True) as entry:
            records, left = _records(model)
            entry.did = f"{len(records)} attention sites"
            sites = [record.site for record in records]
            implementation.enter_context(as_captured(model, sites))
        result = model if in_place else share_copy(model)
        needs_data = any(one.fit is not None for one in chosen)
        prompt = _prompt(model, windows() if needs_data else None) if options.verify else None
        inputs = Inputs(model, prompt, windows)
        given: dict[str, Any] = {"fuel": limit, "dump": dump, "partial": options.partial, "progress": progress}
        with log("rewrite") as entry:
            rules, checks = run_pipeline(chosen, records, inputs, **given)
            entry.did = ", ".join(f"{rule.name}: {rule.rewritten} of {rule.matched} matches" for rule in rules)
            entry.checked = [said(check) for check in checks]
        changed = [record for record in records if record.entries]
        expected = None
        if prompt is not None and all(r.contract.kind == "exact" for r in chosen):
            expected = logits_of(model, prompt)
        configs = {r.site.name: RewrittenConfig(r.site.layer_idx, tuple(r.entries)) for r in changed}
        graphs = {}
        for record in changed:
            place = record.site.name
            module = result.get_submodule(place)
            graphs[place] = lower(_own(record, result), record.site, config_of(result, module), configs[place])
        splice(result, graphs)
        result = to_attnedit(result, configs)
        after = kv_usage(result)
        if prompt is not None:
            with log("verify", bar=True) as entry:
                before_checks = len(checks)
                if expected is not None:
                    checks.append(same_logits(expected, result, prompt))
                rounding = max(one.contract.atol + one.contract.rtol for one in chosen)
                checks.append(same_decode(result, check_tokens(used or None, model), rounding))
                entry.checked = [said(check) for check in checks[before_checks:]]
    finally:
        implementation.close()
        set_modes(model, modes)
    set_modes(result, modes)
    use_captured_implementation(result, sites)
    report = Report(
        attnedit_version=own_version(),
        source=name,
        target="+".join(r.name for r in chosen),
        sites_matched=len(records),
        sites_rewritten=sum(record.changed for record in records),
        layers=[_row(record, before, after) for record in records],
        rules=rules,
        verification=checks,
        calibration=calibration_name(options.calibration) if used else "",
        calibration_tokens=used[0].numel() if used else 0,
        seconds=log.seconds,
        pipeline=log.entries,
        peak_memory_bytes=peak_memory_bytes(),
        notes=[*limit.note(), *_import_notes(chosen)],
        left=left,
        **kv_fields(before, after),
    )
    return CompileResult(result, report, options.tokenizer, processor=options.processor)


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


def _records(model: PreTrainedModel) -> tuple[list[SiteRecord], dict[str, str]]:
    """The sites of a model as pure graphs, with what earlier rewrites did to them; what is no site."""
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
    return records, left_of(sites)


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


def _prompt(model: PreTrainedModel, windows: Tensor | None) -> Tensor:
    """Two rows of tokens [2, T], of the calibration data where there is some."""
    ids = check_tokens(None if windows is None else [windows], model)
    return torch.cat((ids, ids.roll(LENGTH // 3, 1)))


def _row(record: SiteRecord, before: KVUsage, after: KVUsage) -> LayerReport:
    site = record.site
    names = [entry["rewrite"].rpartition(":")[2].rpartition(".")[2] for entry in record.entries]
    return LayerReport(
        layer=site.layer_idx,
        name=site.name,
        kind="+".join(names) or "source",
        values_before=before.per_layer[site.layer_idx],
        values_after=after.per_layer[site.layer_idx],
        output_error=record.error,
    )


def _import_notes(rewrites: list[Rewrite]) -> list[str]:
    homeless = [
        r.name for r in rewrites if r.identity.startswith(("__main__:", "builtins:")) or "<locals>" in r.identity
    ]
    if not homeless:
        return []
    return [
        f"{', '.join(dict.fromkeys(homeless))} cannot be imported by others: a saved copy loads only once it is "
        "defined at the top level of a module"
    ]

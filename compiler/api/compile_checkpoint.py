"""`attnedit.compile_checkpoint`: the pipeline of `attnedit.compile` on a checkpoint too large to load, part by part."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import fx
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from attnedit.compiler.capture import as_captured, capture
from attnedit.compiler.checkpoint_reader import CheckpointReader, checkpoint_directory, weight_files
from attnedit.compiler.compatibility.torch_names import own_buffers
from attnedit.compiler.demo_model import SMOLLM2
from attnedit.compiler.devices import parse_dtype, resolve_device
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluate import kv_usage
from attnedit.compiler.lengths import record_lengths
from attnedit.compiler.models import load_config_only, load_tokenizer
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import Progress, stage
from attnedit.compiler.remote_code import copy_code
from attnedit.compiler.report import Report, Verification, timed
from attnedit.compiler.sites import AttentionSite
from attnedit.compiler.verify import check_tokens, logits_of, same_decode, same_logits
from attnedit.figures import site_graphs
from attnedit.layerwise import STATE_DIRECTORY, Job, LayerwiseRewrite
from attnedit.passes.gateswa.options import FullLayers
from attnedit.passes.gateswa.rewrite import check_loss
from attnedit.passes.mla.fit import FitOptions
from attnedit.planning import (
    DEFAULT_BUDGET,
    TARGETS,
    Plan,
    calibration_windows,
    check_arguments,
    check_numbers,
    plan_sites,
)
from attnedit.recipe import Recipe
from attnedit.result import with_license
from attnedit.rows import compile_report
from attnedit.run_directory import check_run, open_run
from attnedit.targets.attention.kinds import AnyConfig, kind_of
from attnedit.targets.runtime.eager import splice, to_attnedit, use_captured_implementation
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE, read_back, write_beside
from attnedit.targets.runtime.eager.classes import source_classes
from attnedit.targets.runtime.eager.shards import write_index


def compile_checkpoint(
    model: str | PathLike[str],
    directory: str | PathLike[str],
    target: str = "mla",
    *,
    kv_budget: float | None = None,
    window: int | None = None,
    full_layers: FullLayers = None,
    gate: str | None = None,
    sinks: str | None = None,
    calibration: Any = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration_tokens: int | None = None,
    calibration_length: int | None = None,
    alternations: int = FitOptions.alternations,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
    verify: bool = True,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Rewrite a checkpoint of safetensors into a directory, with one decoder layer in memory at a time.

    The result is what `attnedit.compile` gives for the loaded model, to rounding; `attnedit.load` and
    ``AutoModelForCausalLM.from_pretrained`` read it. Beside one layer, memory is needed for its calibration tensors and
    least squares, for the hidden states of the calibration windows, and for the embeddings.

    Killed, the same call goes on after the last layer that is written and ends with the same weights.

    Args:
        model: directory of the checkpoint, or a name on the hub, which is fetched.
        directory: where the result goes; missing, empty, or with the unfinished run of the same arguments.
        target: as for `attnedit.compile`.
        kv_budget: as for `attnedit.compile`.
        window: as for `attnedit.compile`.
        full_layers: "every:N" or layer indices; to choose them by measured loss takes passes through the whole model.
        gate: as for `attnedit.compile`.
        sinks: as for `attnedit.compile`.
        calibration: as for `attnedit.compile`, but given: own samples take passes through the whole model.
        tokenizer: the checkpoint's own unless given.
        calibration_tokens: as for `attnedit.compile`.
        calibration_length: as for `attnedit.compile`.
        alternations: as for `attnedit.compile`.
        seed: as for `attnedit.compile`.
        device: where to compute; CUDA if there is one, unless told.
        dtype: of the weights; "auto" is the checkpoint's own.
        revision: of a hub name.
        trust_remote_code: run the modelling code that comes with the checkpoint; it can do anything that you can.
        verify: read the result layer by layer and hold it to its contract: decoding from the cache against prefill, and
            where nothing was to be lost the logits against the source's.
        overwrite: start again, or replace an earlier result.
        progress: see `attnedit.compiler.progress`.

    Returns:
        The report, which is in the directory too.

    Raises:
        UsageError: wrong arguments or input; CaptureError (a UsageError) for attention that cannot be rewritten.
        VerificationError: the result broke its contract; the directory is left unfinished.
        AttneditError: what was written does not load; the directory is left unfinished.
    """
    if target not in TARGETS:
        raise UsageError(f"layer by layer there is only {', '.join(TARGETS)}, not {target!r}")
    arguments: dict[str, Any] = {
        "target": target,
        "kv_budget": kv_budget,
        "window": window,
        "full_layers": full_layers,
        "gate": gate,
        "sinks": sinks,
        "calibration": calibration,
        "calibration_tokens": calibration_tokens,
        "calibration_length": calibration_length,
        "alternations": alternations,
        "seed": seed,
        "model": fspath(model),
        "revision": revision,
        "dtype": str(dtype).removeprefix("torch."),
    }
    check_numbers(arguments)
    windowing, _ = check_arguments(target, kv_budget, window, full_layers, gate, sinks)
    options = FitOptions.of(alternations)
    if processes().count > 1:
        raise UsageError("layer by layer works in one process; start one")
    if calibration is None and kv_budget != 1:
        raise UsageError("own samples take passes through the whole model, which is read layer by layer; give text")
    run = {"command": "compile --low-memory", **Recipe.of(arguments, None).model_dump(mode="json")}
    seconds: dict[str, float] = {}
    output, where = Path(directory).expanduser().resolve(), resolve_device(device)
    check_run(output, run, overwrite=overwrite)
    source, reader = _open(fspath(model), dtype, where, revision=revision, trust_remote_code=trust_remote_code)
    name = str(source.config.name_or_path)
    tokenizer = tokenizer or load_tokenizer(source, revision=revision, trust_remote_code=trust_remote_code)
    with timed(seconds, "capture"), stage("capture", progress):
        sites = _capture(source, name)
        plan = plan_sites(source, sites, kv_usage(source), target, windowing, kv_budget, full_layers)
    if where.type != "cpu":
        _place_buffers(source, where)
    if isinstance(plan.full, int) and plan.full:
        raise UsageError(
            "choosing the full layers by measured loss takes passes through the whole model, which is read layer by "
            "layer here; name them: full_layers 'every:4', or indices"
        )
    windowed = [site for site in plan.chosen if windowing is not None and site.layer_idx not in _full(plan)]
    kept = plan.latent_sites([site.name for site in windowed])
    shapes = plan.shapes(kept)
    exact = windowing is None and all(shape.exact for shape in shapes.values())
    if calibration is None and not exact:
        raise UsageError("own samples take passes through the whole model, which is read layer by layer; give text")
    data = windows = None
    if not exact:
        with timed(seconds, "data"):
            asked: dict[str, Any] = {"tokens": calibration_tokens, "length": calibration_length}
            asked |= {"seed": seed, "progress": progress}
            data = calibration_windows(calibration, tokenizer, source, windowing, **asked)
        windows = data.parts
        plan.notes.extend(data.notes)
        if windowing is not None:
            check_loss(windows, windowing)
    open_run(output, run, overwrite=overwrite)
    job = Job(windowed, shapes, windowing, options, windows, seed)
    work = LayerwiseRewrite(source, reader, sites, job, output)
    with as_captured(source, sites):
        rewritten = work.run(progress)
    seconds["fit"] = rewritten.seconds
    write_index(output, work.shards)

    ids = check_tokens(windows, source, 0 if windowing is None else windowing.cached_tokens, where)
    checks: list[Verification] = []
    with timed(seconds, "verify"), stage("verify", progress):
        expected = None
        if verify and exact:
            layers: Any = source.get_submodule(work.layers)
            with as_captured(source, sites), reader.streaming(layers):
                expected = logits_of(source, ids)
        graphs = _graphs(source, sites, rewritten.configs)
        drawn = site_graphs(source, plan, graphs, rewritten.configs)
        splice(source, graphs)
        result = to_attnedit(source, rewritten.configs)
        record_lengths(result, calibration=None if data is None else data.length)
        use_captured_implementation(result, sites)
        if verify:
            written = CheckpointReader(output, result, device=where, name=str(output))
            layers = result.get_submodule(work.layers)
            with written.streaming(layers):
                if expected is not None:
                    checks.append(same_logits(expected, result, ids))
                checks.append(same_decode(result, ids, few_passes=True))
    full = None if windowing is None else _full(plan)
    kinds = {name: kind_of(config).name for name, config in rewritten.configs.items()}
    report = compile_report(
        result,
        plan,
        rewritten.configs,
        matched={kind: [name for name, own in kinds.items() if own == kind] for kind in set(kinds.values())},
        spent=rewritten.rule_seconds,
        exact=exact,
        energy_kept=rewritten.energy_kept,
        output_error=rewritten.output_error,
        loss_increase={},
        calibration=calibration,
        windows=data,
        source=name,
        target=target,
        verification=checks,
        kv_budget_asked=DEFAULT_BUDGET if kv_budget is None and windowing is None else kv_budget,
        seconds=seconds,
        full_layers=full,
        notes=[*plan.notes, "read, rewritten and written layer by layer"],
        graphs=drawn,
        recipe=Recipe.of({**arguments, "calibration_length": None if data is None else data.length}, full).model_dump(
            exclude_defaults=True
        ),
    )
    return _finish(result, output, report, tokenizer)


def _open(
    model: str, dtype: torch.dtype | str, device: torch.device, *, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, CheckpointReader]:
    """The model on meta, in the dtype asked for, and its checkpoint."""
    dtype = parse_dtype(dtype)
    if model == SMOLLM2 or Path(model).expanduser().is_file():
        raise UsageError(f"{model} is no checkpoint of safetensors, which alone can be read layer by layer")
    options: dict[str, Any] = {"revision": revision, "dequantize": False, "trust_remote_code": trust_remote_code}
    source = load_config_only(model, dtype=dtype, **options)
    directory = checkpoint_directory(model, revision)
    if dtype == "auto" and source.config.dtype is None:
        files = weight_files(directory, model)
        source = load_config_only(model, dtype=_stored_dtype(files), **options)
    if (directory / "generation_config.json").is_file():
        source.generation_config = GenerationConfig.from_pretrained(directory)
    return source, CheckpointReader(directory, source, device=device, name=model)


def _stored_dtype(files: Mapping[str, Path]) -> torch.dtype:
    """Of the first floating-point tensor."""
    for key, file in files.items():
        with safe_open(file, framework="pt") as content:
            found: torch.dtype = content.get_slice(key)[:0].dtype
        if found.is_floating_point:
            return found
    return torch.float32


def _capture(source: PreTrainedModel, name: str) -> list[AttentionSite]:
    try:
        return capture(source)
    except RuntimeError as error:  # some linear-attention layers read numbers off tensors
        raise UsageError(
            f"{name} cannot be traced without its weights ({error}); compile it as a whole, without low memory"
        ) from error


def _place_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Move what no checkpoint holds; captured models have it on the CPU."""
    for module in model.modules():
        for name, buffer in own_buffers(module).items():
            if buffer is not None and not buffer.is_meta:
                own_buffers(module)[name] = buffer.to(device)


def _full(plan: Plan) -> list[int]:
    return [] if isinstance(plan.full, int) else plan.full


def _graphs(
    source: PreTrainedModel, sites: list[AttentionSite], configs: Mapping[str, AnyConfig]
) -> dict[str, fx.GraphModule]:
    """The new attention by the site's name, its weights on meta."""
    named = {site.name: site for site in sites}
    return {name: kind_of(config).graph(source, named[name], config) for name, config in configs.items()}


def _finish(result: PreTrainedModel, output: Path, report: Report, tokenizer: PreTrainedTokenizerBase | None) -> Report:
    """Write all that is no weight; the directory is a result as soon as it is no run any more."""
    report, texts = with_license(report)
    config: Any = result.config
    config.dtype = str(result.dtype).removeprefix("torch.")
    config.architectures = [type(result).__name__]
    config.save_pretrained(output)
    copy_code(source_classes(result), output)
    if result.can_generate() and result.generation_config is not None:
        result.generation_config.save_pretrained(output)
    write_beside(output, tokenizer, report.to_json(), dict(texts))
    read_back(result, output, f"what was written to {output} does not load, so the run is left unfinished")
    (output / RUN_FILE).unlink()
    shutil.rmtree(output / STATE_DIRECTORY, ignore_errors=True)
    return report

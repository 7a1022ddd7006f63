"""Write a model to a directory for Ascend: decide, trace, check on the references, and only then appear."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.export import ExportedProgram
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.heads import check_exportable
from attnedit.compiler.progress import Progress, stage
from attnedit.targets.runtime.check import Case, check_model, root_mean_square, windows
from attnedit.targets.runtime.eager import share_copy
from attnedit.targets.runtime.eager.checkpoint import check_free
from attnedit.targets.runtime.npu import export_air, run_npu
from attnedit.targets.runtime.npu.legalise import LayerPlan, legalise
from attnedit.targets.runtime.npu.limits import BLOCK, SOCS, Soc
from attnedit.targets.runtime.npu.manifest import Manifest
from attnedit.targets.runtime.npu.program import PHASES, Phase, Sizes, cache_shapes, export_program, operators
from attnedit.targets.runtime.npu.reference import register
from attnedit.targets.runtime.npu.reference_attention import float32_allowed
from attnedit.targets.runtime.npu.run_npu import WEIGHTS_FILE, NpuModel
from attnedit.targets.runtime.npu.schema import torch_npu_version
from attnedit.targets.runtime.npu.survey import survey
from attnedit.targets.runtime.staging import Exportable, check_choice, generation_facts, staged, write_companions

TOLERANCE = 1e-3
"""Largest tolerated difference of logits in float32, as a fraction of the largest logit."""

ROUNDED_TOLERANCE = 0.25
"""The same in half precision, of root mean squares: sums round differently, and a token may go to another expert
(unrelated logits: 1.4)."""

DEFAULT_SOC = "910b"
DEFAULT_CAPACITY = 2048


def export(
    result: Exportable,
    directory: str | os.PathLike[str],
    *,
    soc: str = DEFAULT_SOC,
    dtype: str | None = None,
    batch_size: int | None = None,
    capacity: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Write a model for Ascend NPUs, and check it on reference operators; the directory appears complete or not at all.

    Nothing is run on an NPU: the directory holds two programs that call ``torch.ops.npu``, one set of weights, and the
    scripts that run them there.

    Args:
        result: a `CompileResult`, or anything with a transformers model as ``model`` and perhaps a ``tokenizer``;
            a model that was not rewritten is exported as it is.
        directory: where to; missing or empty.
        soc: system on chip whose limits decide: "910b", "910_93" or "310p".
        dtype: "bfloat16" or "float16"; the model's own if it is one of them, else the chip's best.
        batch_size: rows; 1 unless told.
        capacity: tokens that a row may have, rounded up to whole blocks of 128; 2,048 unless told.
        progress: told what is going on.

    Returns:
        What was written, with the checks it passed.

    Raises:
        UsageError: an argument makes no sense, the directory is not free, or an attention cannot be lowered.
        AttneditError: torch could not export the model.
        VerificationError: the programs compute something else.

    Example:
        >>> from attnedit.targets.runtime.npu import export
        >>> export(result, "qwen3-npu", batch_size=4)  # doctest: +SKIP
    """
    check_exportable(result.model, "npu", "an NPU export")
    check_choice("--soc", soc, SOCS)
    chip = SOCS[soc]
    chosen = _choose_dtype(dtype, result.model.dtype, chip)
    sizes = _sizes(batch_size, capacity)
    target = Path(directory).expanduser().resolve()
    check_free(target, overwrite=False)
    register()
    source: Any = result.model  # transformers wraps `to`
    precise = share_copy(source).to(device="cpu", dtype=torch.float32).eval()
    with staged(target) as staging:
        with stage("decide", progress):
            plans = [legalise(surveyed, chip, chosen) for surveyed in survey(precise)]
        with stage("export", progress):
            programs = _programs(precise, plans, sizes, chip)
        with stage("check", progress), float32_allowed():
            facts = _manifest(precise, plans, sizes, chip, programs)
            limit = min(sizes.capacity, facts.max_positions or sizes.capacity)
            cases = list(npu_cases(windows(precise), sizes.batch, limit))
            lowered = NpuModel(facts.to_dict(), {phase: made.module() for phase, made in programs.items()}, "cpu")
            checks = check_model(precise, lowered, TOLERANCE, cases)
        with stage("export in " + chosen, progress):
            model = share_copy(source).to(device="cpu", dtype=run_npu.DTYPES[chosen]).eval()
            programs = _programs(model, plans, sizes, chip)
            manifest = _manifest(model, plans, sizes, chip, programs)
            manifest.checks.extend(check.to_dict() for check in checks)
        with stage("write", progress):
            _write(programs, manifest, staging)
            for script in (run_npu, export_air):
                shutil.copyfile(str(script.__file__), staging / Path(str(script.__file__)).name)
            write_companions(result, model, staging)
        with stage("check in " + chosen, progress):
            written = NpuModel.load(staging)
            checks = check_model(model, written, ROUNDED_TOLERANCE, cases, measure=root_mean_square)
            manifest.rounded_checks.extend(check.to_dict() for check in checks)
            manifest.write(staging)
    return manifest


def npu_cases(edges: Iterable[int], batch: int, limit: int) -> Iterator[Case]:
    """Batch, padding and lengths of the comparisons: prompts and tokens around windows and at the end of a block.

    >>> list(npu_cases([3], 2, 64))[-2:]
    [(2, 1, (4, 1, 1)), (2, 2, (8, 1, 1, 1))]
    """
    cases: list[Case] = [
        (batch, 0, (5, 1, 1)),
        (batch, 0, (1, 1, 2)),
        (batch, 2, (7, 2, 1)),
        (batch, 1, (BLOCK, 1, 1)),
    ]
    for window in edges:
        cases += [
            (batch, 1, (window, 1, 1, 1)),
            (batch, 0, (window - 1, 1, 1, 1)),
            (batch, 1, (window + 1, 1, 1)),
            (batch, 2, (2 * window + 2, 1, 1, 1)),
        ]
    seen = set()
    for case in cases:
        fits = sum(case[2]) <= limit and case[2][0] > case[1]
        if fits and case not in seen:
            seen.add(case)
            yield case


def _choose_dtype(dtype: str | None, own: torch.dtype, soc: Soc) -> str:
    """Return the dtype to export in."""
    if dtype is None:
        name = str(own).removeprefix("torch.")
        return name if name in soc.dtypes else soc.dtypes[0]
    chosen = str(dtype).removeprefix("torch.")
    if chosen not in soc.dtypes:
        raise UsageError(f"--dtype {chosen} does not do for --soc {soc.name}; give {' or '.join(soc.dtypes)}")
    return chosen


def _sizes(batch: int | None, capacity: int | None) -> Sizes:
    batch, capacity = 1 if batch is None else batch, DEFAULT_CAPACITY if capacity is None else capacity
    if batch < 1 or capacity < 2:
        raise UsageError(f"batch-size {batch} and capacity {capacity} do not do: give at least 1 and at least 2")
    return Sizes(batch, -(-capacity // BLOCK))


def _programs(model: PreTrainedModel, plans: list[LayerPlan], sizes: Sizes, soc: Soc) -> dict[Phase, ExportedProgram]:
    return {phase: export_program(model, plans, sizes, phase, fused=soc.fused) for phase in PHASES}


def _manifest(
    model: PreTrainedModel,
    plans: list[LayerPlan],
    sizes: Sizes,
    soc: Soc,
    programs: Mapping[Phase, ExportedProgram],
) -> Manifest:
    return Manifest(
        **generation_facts(model),
        soc=soc.name,
        torch_npu=torch_npu_version(),
        batch=sizes.batch,
        blocks=sizes.blocks,
        block_size=BLOCK,
        caches={name: list(shape) for name, shape in cache_shapes(plans, sizes).items()},
        programs={phase: f"{phase}.pt2" for phase in PHASES},
        operators=operators(programs),
        decisions=[decision.to_dict() for plan in plans for decision in (plan.prefill, plan.decode)],
    )


def _write(programs: Mapping[Phase, ExportedProgram], manifest: Manifest, directory: Path) -> None:
    """Write programs without weights, and the weights once."""
    weights: dict[str, Tensor] = {}
    owners: dict[tuple[int, torch.Size, tuple[int, ...], torch.dtype], str] = {}
    for phase, program in programs.items():
        for name, tensor in program.state_dict.items():
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            owner = owners.setdefault(key, name) if tensor.numel() else name
            if owner != name:
                manifest.aliases[name] = owner
            elif name not in weights:
                weights[name] = tensor.detach().contiguous()
            empty = torch.empty(0, dtype=tensor.dtype)
            is_parameter = isinstance(tensor, nn.Parameter)
            program.state_dict[name] = nn.Parameter(empty, requires_grad=False) if is_parameter else empty
        torch.export.save(program, directory / manifest.programs[phase])
    save_file({name: _alone(tensor) for name, tensor in weights.items()}, directory / WEIGHTS_FILE)
    manifest.write(directory)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor that shares its memory with no other."""
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

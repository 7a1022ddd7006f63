"""Write a result as a GGUF for llama.cpp: checked, and only then in place."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph.modules import evaluation_mode
from attnedit.compiler.model_io.heads import check_exportable
from attnedit.compiler.progress import Progress, stage
from attnedit.targets.attention.kinds import kinds_in
from attnedit.targets.runtime.check import check_model, largest, root_mean_square
from attnedit.targets.runtime.eager.checkpoint import check_free
from attnedit.targets.runtime.eager.classes import MODEL_TYPE
from attnedit.targets.runtime.engines import ENGINES, LLAMA_CPP, tried
from attnedit.targets.runtime.gguf.file import KINDS, check_file, write_file
from attnedit.targets.runtime.gguf.form import Form
from attnedit.targets.runtime.gguf.reference import Reference
from attnedit.targets.runtime.gguf.tokenizer import tokenizer_keys
from attnedit.targets.runtime.hf.card import write_about
from attnedit.targets.runtime.hf.check import TOLERANCES
from attnedit.targets.runtime.hf.native import OTHER
from attnedit.targets.runtime.staging import Exportable, check_choice, staged, staged_file

MODEL_FILE = "model.gguf"
SUFFIX = ".gguf"
DTYPES = ("float32", "float16", "bfloat16")
QUANTIZERS = ("q8_0",)
ROUNDED_TOLERANCES = {"q8_0": 0.1}
"""Of root mean squares of logits."""
ELSEWHERE = "save the result instead, or export it with --to hf --profile remote"

LOADING = """# llama-server -m model.gguf -c 8192
from xllamacpp import CommonParams, Server

params = CommonParams()
params.model.path = "path/to/model.gguf"
server = Server(params)"""


@dataclass(frozen=True)
class GGUFManifest:
    """What was written.

    Attributes:
        architecture: llama.cpp's name of it.
        dtype: of matrices: "float32", "float16", "bfloat16" or "q8_0".
        checks: comparisons of what llama.cpp's graph computes from the file with the live model, passed.
        notes: what the user should know.
    """

    architecture: str
    dtype: str
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def summary(self) -> list[str]:
        """Lines for people."""
        return [f"llama.cpp's architecture {self.architecture}, {self.dtype}", *self.notes]


def export(
    result: Exportable,
    directory: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> GGUFManifest:
    """Write a rewritten model as a GGUF for llama.cpp, read it back, and compare what it computes with the live model.

    Latent attention becomes ``deepseek2``, sliding windows ``step35`` or ``granite_swa``. The file appears complete or
    not at all.

    Args:
        result: a `CompileResult`, or anything with a rewritten model as ``model`` and its ``tokenizer``, perhaps a
            ``report``.
        directory: a new file that ends in .gguf; or a directory, missing or empty, that gets ``model.gguf`` with a
            model card and the report.
        dtype: of matrices: "float32", "float16" or "bfloat16"; the model's own unless given.
        quantize: "q8_0" for blocks of 32 values with a scale, in place of a dtype.
        engine: "llama.cpp" or None.
        progress: told what is going on.

    Returns:
        What was written, with the checks it passed.

    Raises:
        UsageError: an argument makes no sense, the place is not free, or no architecture of llama.cpp that is written
            here holds the model or its tokenizer; the message says what of it.
        VerificationError: what was written is something else.

    Example:
        >>> from attnedit.targets.runtime.gguf import export
        >>> export(result, "llama-mla.gguf", quantize="q8_0")  # doctest: +SKIP
    """
    check_exportable(result.model, "gguf", "a GGUF")
    model: PreTrainedModel = result.model
    if getattr(model.config, "model_type", None) != MODEL_TYPE:
        raise UsageError(f"{type(model).__name__} was not rewritten by attnedit; llama.cpp's own converter takes it")
    if engine not in (None, LLAMA_CPP):
        check_choice("--engine", engine, ENGINES)
        raise UsageError(f"a .gguf is for engine {LLAMA_CPP}; for {engine} give --to hf")
    if dtype is not None:
        check_choice("--dtype", dtype, DTYPES)
    if quantize is not None:
        check_choice("--quantize", quantize, QUANTIZERS)
        if dtype is not None:
            raise UsageError("--dtype and --quantize both say how weights are stored; give one of them")
    kind = quantize or dtype or str(model.dtype).removeprefix("torch.")
    if kind not in KINDS:
        raise UsageError(f"a .gguf is not written in {kind}; give --dtype {' or '.join(DTYPES)}")
    target = Path(directory).expanduser().resolve()
    place = _place(target)
    with evaluation_mode(model):
        form = _form(model, half=kind in ("float16", "q8_0"))
        rows: Any = model.get_input_embeddings()
        keys, notes = tokenizer_keys(getattr(result, "tokenizer", None), model, int(rows.weight.shape[0]))
        with place as staging:
            file = staging / MODEL_FILE
            with stage("write", progress):
                write_file(form, keys, target.stem, kind, file)
                if target.suffix != SUFFIX:
                    report, form_name = getattr(result, "report", None), "GGUF for llama.cpp"
                    write_about(
                        report, staging, loading=LOADING, form=form_name, notes=[*form.notes, *notes, tried("gguf")]
                    )
            with stage("check", progress):
                reference = Reference(check_file(form, keys, kind, file))
                rounded = kind in QUANTIZERS
                coarser = max(TOLERANCES[getattr(torch, kind)], TOLERANCES[model.dtype]) if not rounded else 0.0
                tolerance = ROUNDED_TOLERANCES.get(kind, coarser)
                measure = root_mean_square if rounded else largest
                checks = check_model(model, reference, tolerance, measure=measure)
    return GGUFManifest(form.architecture, kind, [check.to_dict() for check in checks], form.notes + notes)


def _place(target: Path) -> AbstractContextManager[Path]:
    """Where to write: a directory that becomes the target, or one whose file does."""
    if target.suffix != SUFFIX:
        check_free(target, overwrite=False)
        return staged(target)
    if target.exists():
        raise UsageError(f"{target} exists; give another file")
    return staged_file(target, MODEL_FILE)


def _form(model: PreTrainedModel, *, half: bool) -> Form:
    """Bring a model into the form of an architecture of llama.cpp.

    Raises:
        UsageError: there is none that holds it; the message says what of it.
    """
    found = kinds_in(model.config)
    kinds = list(dict.fromkeys(found.values()))
    if not kinds:
        raise UsageError(f"a .gguf holds attention that attnedit made, and no layer was rewritten; {ELSEWHERE}")
    if len(kinds) > 1:
        titles = " and ".join(kind.title for kind in kinds)
        raise UsageError(f"llama.cpp has no architecture with {titles} in one model; {ELSEWHERE}")
    form: Callable[..., Form] | None = kinds[0].lowering("gguf")
    if form is None:
        raise UsageError(f"{next(iter(found))} is {kinds[0].title}, which llama.cpp does not have; {ELSEWHERE}")
    try:
        return form(model, half=half)
    except UsageError as error:
        # What reads the layers is shared with checkpoints, which have another way out.
        raise type(error)(str(error).replace(OTHER, ELSEWHERE)) from error

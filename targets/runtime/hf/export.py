"""Write a result as a checkpoint that others load without us: checked, and only then in place."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.compiler.forwards import evaluation_mode
from attnedit.compiler.licenses import source_license
from attnedit.compiler.progress import Progress, stage
from attnedit.compiler.report import Report
from attnedit.targets.attention.rewritten import KV_CACHE_MODULE
from attnedit.targets.runtime.eager.checkpoint import HTML_FILE, REPORT_FILE, check_free
from attnedit.targets.runtime.eager.classes import MODEL_TYPE
from attnedit.targets.runtime.hf.card import CARD_FILE, NATIVE, REMOTE, model_card
from attnedit.targets.runtime.hf.check import Check, check_same
from attnedit.targets.runtime.hf.gateswa import laguna_checkpoint, lfm3_checkpoint, native_checkpoint
from attnedit.targets.runtime.hf.mla import latent_checkpoint
from attnedit.targets.runtime.hf.native import Native, read_native, write_native
from attnedit.targets.runtime.hf.remote import load_code, write_remote
from attnedit.targets.runtime.staging import check_choice, staged

REMOTE_PROFILE = "remote"
LATENT = ("deepseek_v3", "youtu")
WINDOWED: dict[str, Callable[[PreTrainedModel], Native]] = {
    "laguna": laguna_checkpoint,
    "lfm3": lfm3_checkpoint,
    "native": native_checkpoint,
}
PROFILES = (*LATENT, *WINDOWED, REMOTE_PROFILE)


@dataclass(frozen=True)
class HFManifest:
    """What was written.

    Attributes:
        profile: its form.
        architecture: the class that loads it.
        checks: comparisons with the live model, passed.
        notes: what the model card says of this form.
    """

    profile: str
    architecture: str
    checks: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def export(
    result: Any,
    directory: str | os.PathLike[str],
    *,
    profile: str | None = None,
    kernel_dims: bool = False,
    gguf: bool = False,
    progress: Progress | None = None,
) -> HFManifest:
    """Write a rewritten model in a form that transformers loads without attnedit, and compare it with the live one.

    The directory appears complete or not at all; tokenizer, generation config, report and a model card are in it.

    Args:
        result: a `CompileResult`, or anything with a rewritten model as ``model``, perhaps a ``tokenizer`` and a
            ``report``.
        directory: where to; missing or empty.
        profile: "deepseek_v3" or "youtu" for latent attention; "laguna", "lfm3" or "native" (the source's own class)
            for sliding windows; "remote", with code of its own, for any result. The one that the result was compiled
            for unless given.
        kernel_dims: with deepseek_v3 and youtu: the sizes and norms that engines' kernels want; as the result was
            compiled unless given.
        gguf: with deepseek_v3 and youtu: the form that llama.cpp's converter and loader read.
        progress: told what is going on.

    Returns:
        What was written, with the checks it passed.

    Raises:
        UsageError: an argument makes no sense, the directory is not free, or the profile cannot express the model; the
            message says what of it.
        VerificationError: what was written computes something else.

    Example:
        >>> from attnedit.targets.runtime.hf import export
        >>> export(result, "llama-mla-deepseek", profile="deepseek_v3")  # doctest: +SKIP
    """
    recipe: dict[str, Any] = getattr(getattr(result, "report", None), "recipe", None) or {}
    if profile is None:
        profile = recipe.get("profile")
        kernel_dims = kernel_dims or bool(recipe.get("kernel_dims"))
    if profile is None:
        raise UsageError(f"a checkpoint needs a --profile; give {' or '.join(PROFILES)}")
    check_choice("--profile", profile, PROFILES)
    if kernel_dims and profile not in LATENT:
        raise UsageError(f"--kernel-dims goes with --profile {' or '.join(LATENT)}, not with {profile}")
    if gguf and profile not in LATENT:
        raise UsageError(f"--gguf goes with --profile {' or '.join(LATENT)}, not with {profile}")
    model: PreTrainedModel = result.model
    if getattr(model.config, "model_type", None) != MODEL_TYPE:
        raise UsageError(f"{type(model).__name__} was not rewritten by attnedit, and transformers loads it as it is")
    _check_kinds(model)
    target = Path(directory).expanduser().resolve()
    check_free(target, overwrite=False)
    with evaluation_mode(model), staged(target) as staging:
        with stage("write", progress):
            notes = _write(model, staging, profile, kernel_dims, gguf)
            _write_rest(result, staging, profile, notes)
        with stage("check", progress):
            written = load_code(staging) if profile == REMOTE_PROFILE else read_native(staging)
            checks: list[Check] = check_same(model, written.to(model.device))  # type: ignore[arg-type]
    return HFManifest(profile, type(written).__name__, [check.to_dict() for check in checks], notes)


def _check_kinds(model: PreTrainedModel) -> None:
    """Refuse what only attnedit can build again: graphs that rewrites of others made.

    Raises:
        UsageError: a layer is neither latent nor windowed.
    """
    record: Any = model.config
    for name, values in record.attnedit["sites"].items():
        if values.get("kind") == KV_CACHE_MODULE:
            rules = ", ".join(entry["rewrite"] for entry in values["rewrites"])
            raise UsageError(
                f"{name} was rewritten by {rules}, which no class of transformers has; save the result instead, which "
                "loads with attnedit, or export it to onnx"
            )


def native_form(model: PreTrainedModel, profile: str, kernel_dims: bool = False, gguf: bool = False) -> Native:
    """Bring a rewritten model into a class of transformers; nothing is written.

    Raises:
        UsageError: the profile cannot express the model; the message says what of it.
    """
    return latent_checkpoint(model, profile, kernel_dims, gguf) if profile in LATENT else WINDOWED[profile](model)


def _write(model: PreTrainedModel, staging: Path, profile: str, kernel_dims: bool, gguf: bool) -> list[str]:
    """Write weights, configuration and code; return notes for the model card."""
    if profile == REMOTE_PROFILE:
        write_remote(model, staging)
        return ["Needs the version of transformers that it was written with, or a later one; attnedit is not needed."]
    native = native_form(model, profile, kernel_dims, gguf)
    generation: GenerationConfig | None = copy.deepcopy(model.generation_config)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = getattr(model.config, "pad_token_id", None)
    write_native(native, staging, model.dtype, generation)
    return native.notes


def _write_rest(result: Any, staging: Path, profile: str, notes: list[str]) -> None:
    if getattr(result, "tokenizer", None) is not None:
        result.tokenizer.save_pretrained(staging)
    report: Report | None = getattr(result, "report", None)
    license = None
    if report is not None:
        license = report.license or source_license(report.source)
        (staging / REPORT_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
        (staging / HTML_FILE).write_text(report.to_html(), encoding="utf-8")
    loading = REMOTE if profile == REMOTE_PROFILE else NATIVE
    form = "checkpoint with code of its own" if profile == REMOTE_PROFILE else f"checkpoint of profile {profile}"
    card = model_card(report, loading=loading, form=form, notes=notes, license=license)
    (staging / CARD_FILE).write_text(card, encoding="utf-8")

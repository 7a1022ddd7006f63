"""Write a result as a checkpoint that others load without us: checked, and only then in place."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph.modules import evaluation_mode
from attnedit.compiler.model_io.heads import check_exportable
from attnedit.compiler.progress import Progress, stage
from attnedit.targets.attention.kinds import config_from_dict, kinds_in
from attnedit.targets.runtime.eager.checkpoint import check_free
from attnedit.targets.runtime.eager.classes import MODEL_TYPE, source_sites
from attnedit.targets.runtime.engines import LLAMA_CPP, SLOT_VALUES, VLLM, check_checkpoint, export_profile, tried
from attnedit.targets.runtime.hf.card import NATIVE, REMOTE, write_about
from attnedit.targets.runtime.hf.check import check_same
from attnedit.targets.runtime.hf.files import check_files
from attnedit.targets.runtime.hf.native import Native, give_own_head, read_native, write_native
from attnedit.targets.runtime.hf.profiles import (
    PROFILES,
    REMOTE_PROFILE,
    check_layers,
    check_profile,
    find_profile,
    kind_with,
    uniform_profiles,
)
from attnedit.targets.runtime.hf.remote import load_code, write_remote
from attnedit.targets.runtime.staging import Exportable, staged


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
    result: Exportable,
    directory: str | os.PathLike[str],
    *,
    profile: str | None = None,
    kernel_dims: bool = False,
    gguf: bool = False,
    engine: str | None = None,
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
        gguf: with deepseek_v3 and youtu: the form that llama.cpp's converter and loader read; `gguf.export` writes a
            better file itself.
        engine: "vllm" or "sglang": chooses the profile, and refuses what that engine could not serve. The one that the
            result was compiled for, unless it or a profile is given.
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
    check_exportable(result.model, "hf", "a checkpoint of another class")
    recipe: dict[str, Any] = getattr(getattr(result, "report", None), "recipe", None) or {}
    if engine == LLAMA_CPP:
        raise UsageError(f"engine {LLAMA_CPP} takes a GGUF: give --to gguf")
    if profile is None:
        engine = engine or recipe.get("engine")
        profile = recipe.get("profile")
        kernel_dims = kernel_dims or bool(recipe.get("kernel_dims"))
    model: PreTrainedModel = result.model
    if getattr(model.config, "model_type", None) != MODEL_TYPE:
        raise UsageError(f"{type(model).__name__} was not rewritten by attnedit, and transformers loads it as it is")
    _check_code(model)
    profile = profile_of(model, engine, profile)
    if profile is None:
        raise UsageError(f"a checkpoint needs a --profile; give {' or '.join(PROFILES)}, or an --engine")
    check_profile("--profile", profile)
    for option, given in {"--kernel-dims": kernel_dims, "--gguf": gguf}.items():
        if given and profile not in (able := uniform_profiles()):
            raise UsageError(f"{option} goes with --profile {' or '.join(able)}, not with {profile}")
    if gguf and engine is not None:
        raise UsageError(f"--gguf is for llama.cpp's converter, not for engine {engine}; leave it out")
    target = Path(directory).expanduser().resolve()
    check_free(target, overwrite=False)
    with evaluation_mode(model), staged(target) as staging:
        with stage("write", progress):
            notes = _write(model, staging, profile, kernel_dims, engine, gguf)
            _write_rest(result, staging, profile, notes)
        with stage("check", progress):
            written = load_code(staging) if profile == REMOTE_PROFILE else read_native(staging)
            checks = check_same(model, written.to(model.device))  # type: ignore[arg-type]
            if profile != REMOTE_PROFILE:
                check_files(getattr(result, "tokenizer", None), model, staging)
    return HFManifest(profile, type(written).__name__, [check.to_dict() for check in checks], notes)


def _check_code(model: PreTrainedModel) -> None:
    """Refuse what only attnedit can build again.

    Raises:
        UsageError: rewrites made a layer's graph.
    """
    record: Any = model.config
    for name, values in record.attnedit["sites"].items():
        if rules := config_from_dict(values).made_by:
            raise UsageError(
                f"{name} was rewritten by {', '.join(rules)}, which no class of transformers has; save the result "
                "instead, which loads with attnedit, or export it to onnx"
            )


def profile_of(model: PreTrainedModel, engine: str | None, profile: str | None) -> str | None:
    """Return the profile that an engine takes of a model; `profile` without an engine.

    Raises:
        UsageError: the engine takes another, or no checkpoint.
    """
    if engine is None:
        return profile
    sites = source_sites(model).values()
    normed = any(norm is not None for site in sites for norm in (site.query_norm, site.key_norm))
    return export_profile(engine, profile, kinds_in(model.config), normed=normed)


def native_form(
    model: PreTrainedModel, profile: str, kernel_dims: bool = False, engine: str | None = None, gguf: bool = False
) -> Native:
    """Bring a rewritten model into a class of transformers; nothing is written.

    Raises:
        UsageError: the profile cannot express the model, or the engine could not serve it; the message says what of it.
    """
    form = find_profile(profile)
    if form is None:
        raise AssertionError("the remote profile is no class of transformers")
    check_layers(model, kind_with(profile), f"profile {profile}")
    slots = SLOT_VALUES if engine == VLLM else None
    sizes = {"kernel_dims": kernel_dims, "gguf": gguf, "slot_values": slots} if form.uniform else {}
    native = form.write(model, **sizes)
    if form.own_head and engine != VLLM:
        give_own_head(native.config, native.state)
    return native if engine is None else replace(native, architectures=check_checkpoint(engine, native.config))


def _write(
    model: PreTrainedModel, staging: Path, profile: str, kernel_dims: bool, engine: str | None, gguf: bool
) -> list[str]:
    """Write weights, configuration and code; return notes for the model card."""
    if profile == REMOTE_PROFILE:
        write_remote(model, staging)
        return ["Needs the version of transformers that it was written with, or a later one; attnedit is not needed."]
    native = native_form(model, profile, kernel_dims, engine, gguf)
    generation: GenerationConfig | None = copy.deepcopy(model.generation_config)
    if generation is not None and generation.pad_token_id is None:
        generation.pad_token_id = getattr(model.config, "pad_token_id", None)
    write_native(native, staging, model.dtype, generation)
    return native.notes


def _write_rest(result: Any, staging: Path, profile: str, notes: list[str]) -> None:
    if getattr(result, "tokenizer", None) is not None:
        result.tokenizer.save_pretrained(staging)
    loading = REMOTE if profile == REMOTE_PROFILE else NATIVE
    form = "checkpoint with code of its own" if profile == REMOTE_PROFILE else f"checkpoint of profile {profile}"
    notes = [*notes, tried(profile)]
    write_about(getattr(result, "report", None), staging, loading=loading, form=form, notes=notes)

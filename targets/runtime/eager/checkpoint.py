"""Write a rewritten model to a directory in one step, and read it back."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from attnedit.compiler.errors import AttneditError, UsageError, VerificationError, first_line
from attnedit.compiler.model_io.live_checks import check_savable
from attnedit.compiler.model_io.locations import RUN_FILE as RUN_FILE
from attnedit.compiler.model_io.models import READING_ERRORS
from attnedit.compiler.model_io.processors import Processor, write_processor
from attnedit.compiler.model_io.remote_code import copy_code, is_own_class, trusting
from attnedit.compiler.model_io.source_checks import check_sizes, check_weight_files
from attnedit.targets.runtime.eager.adapters import adapters_of, read_adapters, without_adapters, write_adapters
from attnedit.targets.runtime.eager.classes import MODEL_TYPE, attnedit_classes, source_classes
from attnedit.targets.runtime.staging import staged

CONFIG_FILE = "config.json"
REPORT_FILE = "attnedit-report.json"
HTML_FILE = "report.html"
"""The same to look at."""


def save(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    overwrite: bool = False,
    report: Any = None,
    files: Mapping[str, str | Path] | None = None,
    processor: Processor | None = None,
) -> Path:
    """Write model, configuration, tokenizer and report; the directory appears complete or not at all.

    It is put in place only after it was read back, unless that takes a class inside a function. Adapters of PEFT go
    into folders of their own, beside the model as it is without them.

    Args:
        model: a model that `to_attnedit` made.
        directory: where to; made with its parents.
        tokenizer: saved beside the model, chat template included.
        overwrite: replace what attnedit wrote there before. A directory with anything else is never replaced.
        report: JSON text, or a value that json can write; becomes attnedit-report.json.
        files: by name, text to write or files to copy, those that there are, beside the model.
        processor: of a vision-language model; saved beside it.

    Returns:
        The directory.

    Raises:
        UsageError: the model is no attnedit model, some weights are quantised or elsewhere, or the directory not free.
        AttneditError: writing failed, or reading back; what was there before still is.
    """
    if getattr(model.config, "model_type", None) != MODEL_TYPE:
        raise UsageError(f"{type(model).__name__} was not rewritten by attnedit; use its own save_pretrained")
    check_savable(model, type(model).__name__)
    target = Path(directory).expanduser().resolve()
    check_free(target, overwrite)
    with staged(target) as staging:
        adapters = adapters_of(model)
        model.save_pretrained(staging, state_dict=without_adapters(model) if adapters else None)
        write_adapters(model, adapters, staging)
        copy_code(source_classes(model), staging)
        write_beside(staging, tokenizer, report, files, processor)
        if _can_be_imported(model):
            read_back(model, staging, f"what was written for {target} does not load, so it was not put there")
    return target


def _can_be_imported(model: PreTrainedModel) -> bool:
    """Whether the rewrites that a model went through are classes that can be imported; the report says if not."""
    record: Any = model.config
    entries = [entry for site in record.attnedit["sites"].values() for entry in site.get("rewrites", ())]
    return not any("<locals>" in str(entry.get("rewrite")) for entry in entries)


def read_back(model: PreTrainedModel, written: Path, failure: str) -> None:
    """Read what was written of a model, its weights by name, shape and dtype only.

    Raises:
        AttneditError: it does not load; the message begins with `failure`.
    """
    own = any(is_own_class(kind) for kind in source_classes(model).values())
    try:
        load_model(written, device_map="meta", trust_remote_code=own)
    except AttneditError as error:
        raise AttneditError(f"{failure}: {str(error).replace(str(written), 'the copy')}") from error


def write_beside(
    directory: Path,
    tokenizer: Any = None,
    report: Any = None,
    files: Mapping[str, str | Path] | None = None,
    processor: Processor | None = None,
) -> None:
    """Write what goes with a model's weights and configuration; the arguments are those of `save`."""
    if isinstance(processor, ProcessorMixin):
        write_processor(processor, directory)  # with a tokenizer, which gives way to the one that is given
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    if processor is not None and not isinstance(processor, ProcessorMixin):
        write_processor(processor, directory)
    if report is not None:
        text = report if isinstance(report, str) else json.dumps(report, indent=2)
        (directory / REPORT_FILE).write_text(text.rstrip() + "\n", encoding="utf-8")
    for name, content in (files or {}).items():
        if isinstance(content, str):
            (directory / name).write_text(content, encoding="utf-8")
        elif content.exists():
            shutil.copyfile(content, directory / name)


def load_model(
    directory: str | os.PathLike[str],
    dtype: torch.dtype | str = "auto",
    device_map: str | int | torch.device | Mapping[str, int | str | torch.device] | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Read what `save` (or ``save_pretrained``) wrote.

    Args:
        directory: a local directory.
        dtype: of the weights; "auto" keeps the saved one.
        device_map: as transformers takes it.
        trust_remote_code: run the modelling code that is there, where the source came with code of its own.

    Returns:
        The model, in eval mode.

    Raises:
        UsageError: nothing there, not an attnedit model, or damaged.
        VerificationError: weights are missing or left over.
    """
    path = Path(directory).expanduser()
    if not path.is_dir():
        raise UsageError(f"{path} is no directory; give one that attnedit saved a model in")
    found = _model_type(path)
    if found != MODEL_TYPE:
        what = f"a model of type {found!r}" if found else "no readable config.json"
        raise UsageError(f"{path} holds {what}, not a model that attnedit saved")
    check_weight_files(path, str(path))
    local = {"local_files_only": True, "trust_remote_code": False}  # transformers need import nothing itself
    try:
        with trusting(str(path) if trust_remote_code else None):
            config = AutoConfig.from_pretrained(path, **local)
        check_sizes(config, str(path))
        kind: Any = attnedit_classes(config)[1]  # its annotations know nothing of output_loading_info
        model, info = kind.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            use_safetensors=True,
            **local,
        )
    except AttneditError:
        raise
    except READING_ERRORS as error:
        raise UsageError(f"cannot read the model in {path}: {first_line(error)}") from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if keys := sorted(str(key) for key in info.get(kind) or ()):
            raise VerificationError(
                f"{path} has {len(keys)} {kind.replace('_', ' ')} (first: {keys[0]}); its weights are not its "
                "configuration's"
            )
    result: PreTrainedModel = model.eval()
    if next(result.parameters()).is_meta:
        return result
    read_adapters(result, path)
    return result


def check_free(target: Path, overwrite: bool) -> None:
    """Refuse a directory that `save` would refuse.

    Raises:
        UsageError: a file, or a directory with something in it that may not be replaced.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UsageError(f"{target} is a file; give a directory")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UsageError(f"{target} is not empty; give another directory, or overwrite")
    if _model_type(target) != MODEL_TYPE and not (target / RUN_FILE).exists():
        raise UsageError(f"{target} holds files that attnedit did not write, so it is not overwritten; empty it first")


def _model_type(directory: Path) -> str | None:
    try:
        config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    found = config.get("model_type") if isinstance(config, dict) else None
    return found if isinstance(found, str) else None

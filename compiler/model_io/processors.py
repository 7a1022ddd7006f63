"""Processors of vision-language models: read for samples with images, and carried from a source to its result."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, TypeAlias

from transformers import AutoProcessor, ProcessorMixin
from transformers.utils.hub import cached_file

from attnedit.compiler.errors import UsageError, first_line
from attnedit.compiler.model_io.locations import Location

Processor: TypeAlias = ProcessorMixin | str | os.PathLike[str]
"""One that is at hand, or the directory of one."""

PREPROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")


def processor_directory(location: Location, revision: str | None) -> Path | None:
    """The directory with the processor's files of a model; None for a model without images."""
    if location.directory is not None:
        found = location.directory if location.gguf is None else None
        return found if found is not None and holds_processor(found) else None
    names = (*PREPROCESSOR_FILES, *TEMPLATE_FILES)
    files = [_cached(location.path, name, revision) for name in names]
    there = [Path(file) for file in files if file is not None]
    return there[0].parent if there and holds_processor(there[0].parent) else None


def _cached(name: str, file: str, revision: str | None) -> str | None:
    quiet = {f"_raise_exceptions_for_{what}": False for what in ("gated_repo", "missing_entries", "connection_errors")}
    found: Any = cached_file(name, file, revision=revision, **quiet)
    return None if found is None else str(found)


def holds_processor(directory: Path) -> bool:
    """Whether a directory has the files of a processor."""
    return any((directory / name).is_file() for name in PREPROCESSOR_FILES)


def read_processor(processor: Processor | None, why: str) -> ProcessorMixin:
    """A processor that is ready to use; `why` it is needed, for messages.

    Raises:
        UsageError: there is none, or it cannot be read.
    """
    if processor is None:
        raise UsageError(f"{why}, and that needs the model's processor; give it as processor")
    if isinstance(processor, ProcessorMixin):
        return processor
    try:
        read: Any = AutoProcessor.from_pretrained(os.fspath(processor), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UsageError(f"{why}, and the processor in {processor} cannot be read: {first_line(error)}") from error
    if not isinstance(read, ProcessorMixin):
        raise UsageError(f"{why}, and {processor} holds only a {type(read).__name__}, which makes no samples of chats")
    return read


def write_processor(processor: Processor, directory: Path) -> None:
    """Write a processor, or copy its files, into a directory; chat templates that are there already stay."""
    if isinstance(processor, ProcessorMixin):
        processor.save_pretrained(directory)
        return
    for name in (*PREPROCESSOR_FILES, *TEMPLATE_FILES):
        file = Path(processor) / name
        if file.is_file() and not (name in TEMPLATE_FILES and (directory / TEMPLATE_FILES[0]).exists()):
            shutil.copyfile(file, directory / name)

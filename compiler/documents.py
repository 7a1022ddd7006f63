"""Documents out of files and datasets: plain text, jsonl, parquet, or a name that `datasets` knows."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from attnedit.compiler.errors import UsageError

_FILE_SUFFIXES = {".txt", ".md", ".rst", ".text", ".jsonl", ".ndjson", ".json", ".parquet"}
_TEXT_FIELDS = ("text", "content", "document")
_CHAT_FIELDS = ("messages", "conversations")


def read_documents(source: str | PathLike[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the texts of a file or a dataset; chats go through the tokenizer's chat template.

    Args:
        source: path, or dataset name as ``NAME`` or ``NAME:CONFIGURATION`` (split ``train``, streamed).
        tokenizer: for chats.

    Raises:
        UsageError: missing, not UTF-8, not the format its suffix says, or without a text field.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        raise UsageError(f"{source} is a directory; give a text, jsonl or parquet file")
    if path.exists():
        return _read_file(path, tokenizer)
    if path.suffix.lower() in _FILE_SUFFIXES or str(source).startswith((".", "/", "~")):
        raise UsageError(f"{source} does not exist; give a text, jsonl or parquet file, or the name of a dataset")
    return _read_dataset(str(source), tokenizer)


def _read_file(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path, tokenizer)
        return
    try:
        if suffix not in (".jsonl", ".ndjson"):
            text = path.read_text(encoding="utf-8")
            if "\0" in text:
                raise UsageError(f"{path} is not text (NUL at character {text.index(chr(0))}); give another file")
            yield text
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _document(_parse(line, f"{path} line {number}"), tokenizer, f"{path} line {number}")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or give another file") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where} is not JSON ({error.msg}); write one object with text or messages a line") from error


def _read_parquet(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    import pyarrow  # heavy, and only this format needs it
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        columns = [name for name in (*_TEXT_FIELDS, *_CHAT_FIELDS) if name in table.schema_arrow.names][:1]
        if not columns:
            raise UsageError(f"{path} has no column {_fields()}; its columns are {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=columns):
            for record in batch.to_pylist():
                yield _document(record, tokenizer, str(path))
    except (pyarrow.ArrowException, OSError) as error:
        raise UsageError(f"cannot read {path} as parquet: {error}") from error


def _read_dataset(name: str, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    import datasets  # takes a second to import, and most calibration comes from files
    from huggingface_hub.errors import HFValidationError

    repository, _, configuration = name.partition(":")
    try:
        stream = datasets.load_dataset(repository, configuration or None, split="train", streaming=True)
        for record in stream:
            yield _document(record, tokenizer, f"dataset {name}")
    except (OSError, ValueError, RuntimeError, HFValidationError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"{name} is no file here and could not be read as a dataset ({reason}); give a path, or NAME:CONFIGURATION"
        ) from error


def _document(record: object, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text of one record: a string, a text field, or a chat."""
    if isinstance(record, str):
        return record
    if isinstance(record, Mapping):
        for field in _TEXT_FIELDS:
            if isinstance(record.get(field), str):
                return cast(str, record[field])
        for field in _CHAT_FIELDS:
            if isinstance(record.get(field), list):
                return _chat(record[field], tokenizer, where)
        found = ", ".join(map(str, record)) or "nothing"
        raise UsageError(f"{where} has no field {_fields()} (it has {found})")
    raise UsageError(f"{where} holds a {type(record).__name__}, not an object with text or messages")


def _chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    from jinja2.exceptions import TemplateError  # what a chat template raises; only chats need it

    if not tokenizer.chat_template:
        raise UsageError(f"{where} is a chat, and the tokenizer has no chat template; give plain texts")
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{where} does not suit the tokenizer's chat template: {error}") from error


def _fields() -> str:
    return " or ".join((*_TEXT_FIELDS[:1], *_CHAT_FIELDS[:1]))

"""Documents out of files and datasets: plain text, jsonl, json, parquet, or a name that `datasets` knows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from attnedit.compiler.errors import UsageError, first_line

_LINES = {".jsonl", ".ndjson"}
_TABLES = {".csv", ".tsv"}
_FILE_SUFFIXES = {".txt", ".md", ".rst", ".text", ".json", ".parquet", *_LINES, *_TABLES}
_TEXT_FIELDS = ("text", "content", "document")
_CHAT_FIELDS = ("messages", "conversations", "conversation")
_TURNS = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
)
"""Fields of a question and its answer: Alpaca's, Dolly's, and those of libraries for fine-tuning."""
_CONTEXT_FIELDS = ("input", "context")
"""What an instruction works on, where there is any."""
_SYSTEM_FIELD, _HISTORY_FIELD = "system", "history"
"""What a system prompt is, and pairs of earlier questions and answers, beside a chat or an instruction."""
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
"""ShareGPT's names of those who speak, and the roles of chat templates."""
_BYTE_ORDER_MARK = "\ufeff"
_LONGEST_NAME = 4096
"""Characters of a path on most systems."""


def read_documents(source: str | PathLike[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Yield the texts of a file or a dataset; chats go through the tokenizer's chat template.

    Args:
        source: path, or dataset name as ``NAME`` or ``NAME:CONFIGURATION`` (split ``train``, streamed).
        tokenizer: for chats.

    Raises:
        UsageError: missing, not UTF-8, not the format its suffix says, or a record without text.
    """
    path = source_path(source)
    if path.is_dir():
        raise UsageError(f"{source} is a directory; give a text, jsonl, json or parquet file")
    if path.exists():
        return (_document(record, tokenizer, where) for record, where in read_records(path))
    if path.suffix.lower() in _FILE_SUFFIXES or str(source).startswith((".", "/", "~")):
        raise UsageError(f"{source} does not exist; give a text, jsonl, json or parquet file, or the name of a dataset")
    return _read_dataset(str(source), tokenizer)


def source_path(source: str | PathLike[str]) -> Path:
    """Return where a source would be as a file.

    Raises:
        UsageError: it is a text and no name.
    """
    name = str(source)
    if "\n" in name or len(name) > _LONGEST_NAME:
        raise UsageError(
            f"a string of {len(name)} characters names no file and no dataset ({name[:30]!r}...); give texts as a list "
            "of strings"
        )
    return Path(source).expanduser()


def read_records(path: Path) -> Iterator[tuple[object, str]]:
    """Yield the records of a file, and where each stands, for messages; a plain text is one.

    Raises:
        UsageError: not UTF-8, or not the format its suffix says.
    """
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        yield from _read_parquet(path)
        return
    if suffix in _TABLES:
        raise UsageError(f"{path} is a table; save it as jsonl or parquet, with a column text")
    try:
        if suffix in _LINES:
            with path.open(encoding="utf-8-sig") as lines:
                yield from _read_lines(path, lines)
            return
        text = path.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise UsageError(f"{path} is not text (NUL at character {text.index(chr(0))}); give another file")
        if suffix == ".json":
            yield from _read_json(path, text)
        else:
            yield text, str(path)
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it, or give another file") from error
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error


def _read_lines(path: Path, lines: Iterable[str]) -> Iterator[tuple[object, str]]:
    for number, line in enumerate(lines, start=1):
        line = line.lstrip(_BYTE_ORDER_MARK)  # files that were joined may have one in the middle
        if line.strip():
            where = f"{path} line {number}"
            yield _parse(line, where), where


def _read_json(path: Path, text: str) -> Iterator[tuple[object, str]]:
    """An array of records, also as the only list of an object; one record; or, in spite of the name, lines."""
    try:
        whole = json.loads(text)
    except ValueError as error:
        lines = text.splitlines()
        if getattr(error, "msg", "") != "Extra data" or not _is_json(lines[0]):
            raise UsageError(
                f"{path} is not JSON ({error}); write an array of objects with text or messages"
            ) from error
        yield from _read_lines(path, lines)
        return
    if isinstance(whole, Mapping) and not _known(whole):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == 1 else whole
    if not isinstance(whole, list):
        yield whole, str(path)
        return
    for number, record in enumerate(whole, start=1):
        yield record, f"{path} record {number}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _parse(line: str, where: str) -> object:
    try:
        return json.loads(line)
    except ValueError as error:
        reason = getattr(error, "msg", error)
        raise UsageError(f"{where} is not JSON ({reason}); write one object with text or messages a line") from error


def _read_parquet(path: Path) -> Iterator[tuple[object, str]]:
    import pyarrow  # heavy, and only this format needs it
    from pyarrow import parquet

    try:
        table = parquet.ParquetFile(path)
        fields = dict.fromkeys(
            [
                *(*_TEXT_FIELDS, *_CHAT_FIELDS, *itertools.chain(*_TURNS)),
                *(*_CONTEXT_FIELDS, _SYSTEM_FIELD, _HISTORY_FIELD),
            ]
        )
        columns = [name for name in fields if name in table.schema_arrow.names]
        if not _known(columns):
            raise UsageError(f"{path} has no column {_fields()}; its columns are {', '.join(table.schema_arrow.names)}")
        for batch in table.iter_batches(columns=columns):
            for record in batch.to_pylist():
                yield record, str(path)
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
        reason = first_line(error)
        raise UsageError(
            f"{name} is no file here and could not be read as a dataset ({reason}); give a path, or NAME:CONFIGURATION"
        ) from error


def _document(record: object, tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    """The text of one record: a string, a text field, a chat, or a question with its answer."""
    if isinstance(record, str):
        return record
    if not isinstance(record, Mapping):
        raise UsageError(f"{where} holds {_kind(record)}, not an object with text or messages")
    for field in _TEXT_FIELDS:
        if isinstance(record.get(field), str):
            return cast(str, record[field])
    for field in _CHAT_FIELDS:
        if isinstance(record.get(field), list):
            return _chat([*_before(record, record[field], where), *record[field]], tokenizer, where)
    for asked, answered in _TURNS:
        if isinstance(record.get(asked), str) and isinstance(record.get(answered), str):
            given = [record.get(field) for field in _CONTEXT_FIELDS if asked == "instruction"]
            return _exchange(record, [record[asked], *given], record[answered], tokenizer, where)
        if isinstance(record.get(asked), list) and isinstance(record.get(answered), list):
            turns = [*record[asked], *record[answered]]
            return _chat([*_before(record, turns, where), *turns], tokenizer, where)
    wrong = [field for field in _known(record) if field in record]
    if wrong:
        found = " and ".join(f"{field} is {_kind(record[field])}" for field in wrong)
        raise UsageError(f"{where}: {found}, where text is expected; mend the record, or leave it out")
    found = ", ".join(map(str, record)) or "nothing"
    raise UsageError(f"{where} has no field {_fields()} (it has {found})")


def _known(record: Collection[str]) -> list[str]:
    """Fields of a record, or of a table, that text is read from; of a question and its answer both must be there."""
    found = [field for field in (*_TEXT_FIELDS, *_CHAT_FIELDS) if field in record]
    return found or next((list(turn) for turn in _TURNS if all(field in record for field in turn)), [])


def _kind(value: object) -> str:
    return "null" if value is None else f"a {type(value).__name__}"


def _exchange(
    record: Mapping[str, Any], asked: list[Any], answer: str, tokenizer: PreTrainedTokenizerBase, where: str
) -> str:
    """A question, in parts of which some may be empty, and its answer: as a chat, where there is a template."""
    question = "\n\n".join(part for part in asked if isinstance(part, str) and part.strip())
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    turns = [*_before(record, turns, where), *turns]
    if not tokenizer.chat_template:
        return "\n\n".join(turn["content"] for turn in turns)
    return _chat(turns, tokenizer, where)


def _before(record: Mapping[str, Any], turns: list[Any], where: str) -> list[dict[str, str]]:
    """What stands in fields of its own before the turns of a record: a system prompt, and earlier exchanges."""
    before = []
    system, first = record.get(_SYSTEM_FIELD), turns[0] if turns else None
    known = isinstance(first, Mapping) and "system" in (first.get("role"), first.get("from"))
    if isinstance(system, str) and system.strip() and not known:
        before.append({"role": "system", "content": system})
    for pair in record.get(_HISTORY_FIELD) or ():
        if not isinstance(pair, list) or [type(part) for part in pair] != [str, str]:
            raise UsageError(f"{where}: {_HISTORY_FIELD} must hold pairs of texts; mend the record, or leave it out")
        before += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    return before


def _chat(messages: list[Any], tokenizer: PreTrainedTokenizerBase, where: str) -> str:
    from jinja2.exceptions import TemplateError  # what a chat template raises; only chats need it

    if not tokenizer.chat_template:
        raise UsageError(f"{where} is a chat, and the tokenizer has no chat template; give plain texts")
    if others := parts_of_chats({"messages": messages}):
        raise UsageError(
            f"{where} holds a part of type {others[0]!r}, not text alone; images calibrate the closed form of "
            "vision-language models, nothing else: give text"
        )
    messages = [_with_role(message, where) for message in messages]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False))
    except (TemplateError, LookupError, TypeError, AttributeError, ValueError) as error:
        raise UsageError(f"{where} does not suit the tokenizer's chat template: {error}") from error


def parts_of_chats(record: object) -> list[str]:
    """Types of the parts of a record's messages that are no text, such as "image"."""
    messages = record.get("messages") if isinstance(record, Mapping) else None
    contents = [message.get("content") for message in messages or () if isinstance(message, Mapping)]
    parts = itertools.chain.from_iterable(content for content in contents if isinstance(content, list))
    return [str(part.get("type")) for part in parts if isinstance(part, Mapping) and part.get("type", "text") != "text"]


def _with_role(message: Any, where: str) -> Any:
    """A message as chat templates have it: its role, also where ShareGPT says `from`, and its text."""
    if not isinstance(message, Mapping):
        return message
    role, content = message.get("role"), message.get("content")
    if role is None and "from" in message:
        speaker, content = str(message["from"]), message.get("value")
        if speaker.lower() not in _SPEAKERS:
            raise UsageError(f"{where} has a message from {speaker!r}; known are {', '.join(sorted(_SPEAKERS))}")
        role = _SPEAKERS[speaker.lower()]
    if role is None:
        raise UsageError(f"{where} has a message without a role; mend the record, or leave it out")
    if isinstance(content, list) and all(isinstance(part, Mapping) and "text" in part for part in content):
        content = "".join(str(part["text"]) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise UsageError(f"{where} has a message whose text is {_kind(content)}; mend the record, or leave it out")
    rest = {name: value for name, value in message.items() if name not in ("from", "value")}
    return {**rest, "role": role, "content": content}


def _fields() -> str:
    return " or ".join((*_TEXT_FIELDS[:1], *_CHAT_FIELDS[:1]))

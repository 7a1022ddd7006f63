"""Chats with images as calibration samples: token ids, and what the model takes with them, as its processor says."""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.data.documents import parts_of_chats, read_records, source_path
from attnedit.compiler.data.token_windows import context_length
from attnedit.compiler.data.window_sources import check_vocabulary
from attnedit.compiler.errors import UsageError, first_line
from attnedit.compiler.execution.model_inputs import ModelInputs
from attnedit.compiler.model_io.heads import is_multimodal
from attnedit.compiler.model_io.processors import Processor, read_processor

_PLACES = ("path", "image", "video", "audio")
"""Fields of a part of a message that may name a file."""


def image_samples(
    source: object, processor: Processor | None, model: PreTrainedModel, tokens: int, inputs: ModelInputs
) -> list[Tensor] | None:
    """Read the chats of a file one of which has an image (or a video, or sound): so many tokens, but one at least.

    What the model takes with the samples goes into `inputs`.

    Returns:
        Token ids int64 [1, T] of each sample, of whatever length; None where the source holds text alone.

    Raises:
        UsageError: a chat that the processor does not take, or that is longer than the model's context.
    """
    if not is_multimodal(model.config) or not isinstance(source, str | PathLike):
        return None
    path = source_path(source)
    if not path.is_file() or not any(parts_of_chats(record) for record, _ in read_records(path)):
        return None
    ready: Any = read_processor(processor, f"{source} holds images")
    found: list[Tensor] = []
    for record, where in read_records(path):
        made = _processed(ready, record, path.parent, where)
        ids = check_vocabulary_but_images(made.pop("input_ids").to(torch.int64), model)
        if ids.shape[1] > (context := context_length(model)):
            raise UsageError(
                f"{where} has {ids.shape[1]} tokens, images included, and the model's context is {context}"
            )
        made.pop("attention_mask", None)  # one sample, without padding
        inputs.add(ids, made)
        found.append(ids)
        if sum(each.shape[1] for each in found) >= tokens:
            break
    return found


def check_vocabulary_but_images(ids: Tensor, model: PreTrainedModel) -> Tensor:
    """The ids; refused where they hold some without embedding that stand for no image."""
    config: Any = model.config
    placeholders = [getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")]
    text = ids[~torch.isin(ids, torch.tensor([one for one in placeholders if isinstance(one, int)]))]
    if text.numel():
        check_vocabulary(text, model)
    return ids


def _processed(processor: Any, record: object, folder: Path, where: str) -> dict[str, Tensor]:
    messages = record.get("messages") if isinstance(record, Mapping) else None
    if not isinstance(messages, list):
        raise UsageError(f"{where} has no messages; a file with images holds chats alone, as the processor takes them")
    try:
        made = processor.apply_chat_template(
            [_in_folder(message, folder) for message in messages],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
    except Exception as error:  # templates, image files and processors raise whatever they like
        raise UsageError(f"{where} does not suit the processor: {first_line(error)}") from error
    return {name: value for name, value in made.items() if isinstance(value, Tensor)}


def _in_folder(message: Any, folder: Path) -> Any:
    """A message whose files are named from where the chats are."""
    if not isinstance(message, Mapping) or not isinstance(message.get("content"), list):
        return message
    return {**message, "content": [_placed(part, folder) for part in message["content"]]}


def _placed(part: Any, folder: Path) -> Any:
    if not isinstance(part, Mapping):
        return part
    files = {name: part[name] for name in _PLACES if isinstance(part.get(name), str) and part[name]}
    return {**part, **{name: str(folder / file) for name, file in files.items() if (folder / file).is_file()}}

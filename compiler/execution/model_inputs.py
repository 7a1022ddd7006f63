"""What a model's own forward takes with some token ids: images, and which of the tokens they stand for.

Passes know calibration data as windows of token ids. Where images go with a window, they are found by its ids as the
model is run on it, and the model merges them into the embeddings as it always does.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.errors import UsageError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class ModelInputs:
    """Arguments of a model's forward beside its token ids, by the ids.

    Attributes:
        by_ids: of each window, by the digest of its ids.
    """

    by_ids: dict[bytes, Inputs] = field(default_factory=dict)

    def add(self, ids: Tensor, inputs: Inputs) -> None:
        """Note what goes with the ids [1, T].

        Raises:
            UsageError: other inputs go with the same ids.
        """
        known = self.by_ids.setdefault(_key(ids), inputs)
        if known is not inputs and digest_of(known) != digest_of(inputs):
            raise UsageError(
                "two calibration samples have the same tokens and different images; change a word in one of them"
            )

    def digest(self) -> bytes:
        """Of all of them: 32 bytes."""
        found = hashlib.sha256()
        for key in sorted(self.by_ids):
            found.update(key + digest_of(self.by_ids[key]))
        return found.digest()


_given: ContextVar[ModelInputs | None] = ContextVar("given", default=None)


@contextmanager
def giving(inputs: ModelInputs, *models: PreTrainedModel) -> Iterator[None]:
    """Inside the block the models get what goes with the token ids that they are run on.

    What a model keeps of one forward for the next, such as positions behind an image, is afterwards what it was.
    """
    if not inputs.by_ids:
        yield
        return
    bodies = list({id(body): body for body in (body_of(model) for model in models)}.values())
    before = [(body, {name: value for name, value in vars(body).items() if name[0] != "_"}) for body in bodies]
    handles = [body.register_forward_pre_hook(_give, with_kwargs=True) for body in bodies]
    token = _given.set(inputs)
    try:
        yield
    finally:
        _given.reset(token)
        for handle in handles:
            handle.remove()
        for body, values in before:
            vars(body).update(values)


def given_digest() -> bytes:
    """Of what the current block of `giving` gives; empty outside of one."""
    inputs = _given.get()
    return b"" if inputs is None else inputs.digest()


def is_given(ids: Tensor) -> bool:
    """Whether something goes with one of the windows [N, T]: such ids are to be run one by one, and as they are."""
    inputs = _given.get()
    return inputs is not None and any(_key(row[None]) in inputs.by_ids for row in ids)


def body_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head, which costs the most for large vocabularies; images are merged in here."""
    return model.base_model if model.base_model is not model else model


def digest_of(inputs: Inputs) -> bytes:
    """Of the arguments of one window."""
    found = hashlib.sha256()
    for name in sorted(inputs):
        found.update(name.encode() + inputs[name].cpu().contiguous().numpy().tobytes())
    return found.digest()


def _give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    inputs, ids = _given.get(), kwargs.get("input_ids", args[0] if args else None)
    if inputs is None or not isinstance(ids, Tensor):
        return None
    found = inputs.by_ids.get(_key(ids))
    if found is None:
        return None
    parameter = next(module.parameters())
    moved = {
        name: value.to(ids.device, parameter.dtype if value.is_floating_point() else None)
        for name, value in found.items()
    }
    return args, {**kwargs, **moved}


def _key(ids: Tensor) -> bytes:
    return hashlib.sha256(ids.detach().cpu().contiguous().numpy().tobytes()).digest()


def position_ids(model: nn.Module, ids: Tensor, start: int) -> dict[str, Tensor]:
    """The argument of that name for tokens [B, T] after `start` others, where the model takes it.

    Most models count what is in the cache; some always start at 0 unless told.
    """
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return {}
    positions = torch.arange(start, start + ids.shape[1], device=ids.device)
    return {"position_ids": positions.expand(ids.shape)}

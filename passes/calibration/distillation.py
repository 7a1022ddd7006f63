"""Distillation: the whole student learns the next-token distributions of the teacher.

Logits of a vocabulary are large, so they are made for a chunk of positions at a time, and again in the backward pass.

Letters in shapes: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from attnedit.compiler.stream import replaced_forward

POSITIONS = 2048
"""Positions whose logits are held at once."""


class Distillation(nn.Module):
    """Loss of a batch: divergence of next-token distributions, and how far hidden states point apart.

    Args:
        student: the rewritten model, what is trained requiring gradients.
        teacher: the live source in eval mode.
        layers: names of decoder layers, in both models, where hidden states are compared; empty for none.
    """

    def __init__(self, student: PreTrainedModel, teacher: PreTrainedModel, layers: Sequence[str] = ()) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher]  # not a submodule: it has nothing to train or to save
        self._layers = list(layers)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Compare both models on token ids [B, T].

        Returns:
            Mean over positions of KL(teacher || student) in nats, and mean of 1 - cosine over positions and layers.
        """
        (teacher,) = self._teacher
        with torch.no_grad():
            wanted, wanted_features = _run(teacher, ids, self._layers)
        found, found_features = _run(self.student, ids, self._layers)
        total = found.last_hidden_state.new_zeros((), dtype=torch.float32)
        own, theirs = (out.last_hidden_state.flatten(0, 1).split(POSITIONS) for out in (found, wanted))
        for mine, other in zip(own, theirs, strict=True):
            total = total + checkpoint(self._divergence, mine, other, found, wanted, use_reentrant=False)
        features = total.new_zeros(())
        for mine, other in zip(found_features, wanted_features, strict=True):
            features = features + (1 - functional.cosine_similarity(mine.float(), other.float(), dim=-1)).mean()
        return total / ids.numel(), features / max(1, len(self._layers))

    def _divergence(self, mine: Tensor, other: Tensor, found: Any, wanted: Any) -> Tensor:
        """Sum over positions of the divergence, from last hidden states [P, D]."""
        with torch.no_grad():
            expected = _head(self._teacher[0], wanted, other).float().log_softmax(-1)
        logits = _head(self.student, found, mine).float().log_softmax(-1)
        return functional.kl_div(logits, expected, reduction="sum", log_target=True)


def _run(model: PreTrainedModel, ids: Tensor, layers: Sequence[str]) -> tuple[Any, list[Tensor]]:
    """Output of the model without its head, and hidden states after some layers."""
    features: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        features.append(output[0] if isinstance(output, tuple) else output)

    handles = [model.get_submodule(name).register_forward_hook(keep) for name in layers]
    try:
        output = _body(model)(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return output, features


def _head(model: PreTrainedModel, output: Any, hidden: Tensor) -> Tensor:
    """Logits [P, V] of last hidden states [P, D], through the model's own forward: it may scale or cap them."""
    part = copy.copy(output)
    part.last_hidden_state = hidden[None]
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    with replaced_forward(_body(model), lambda *_, **__: part):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0]


def _body(model: PreTrainedModel) -> nn.Module:
    return model.base_model

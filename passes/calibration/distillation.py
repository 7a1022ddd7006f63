"""Distillation: the whole student learns the next-token distributions of the teacher.

Logits of a vocabulary are large, so they are made for a chunk of positions at a time, and each chunk's gradient with
respect to the last hidden states is taken at once (as in Liger Kernel, arXiv 2410.10989, section 3.2): the head runs
once.

Letters in shapes: B windows, T tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from attnedit.compiler.evaluation.logits import body, head
from attnedit.passes.calibration.fitting import first_output, hooked
from attnedit.passes.calibration.optimiser import suggested_rate

POSITIONS = 2048
"""Positions whose logits are held at once."""
HIGHEST_RATE = 0.005
Divergence = Callable[[Tensor, Tensor], Tensor]


class Distillation:
    """Losses and gradients of a batch: divergence of next-token distributions, and how far hidden states point apart.

    Args:
        student: the rewritten model, what is trained requiring gradients.
        teacher: the live source in eval mode.
        layers: names of decoder layers, in both models, where hidden states are compared; empty for none.
        divergence: `summed_divergence`, or a compiled form of it.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: Sequence[str] = (),
        divergence: Divergence | None = None,
    ) -> None:
        self._student, self._teacher, self._layers = student, teacher, list(layers)
        self._divergence = divergence or summed_divergence

    def losses(
        self, ids: Tensor, scale: float | None = None, feature_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Compare both models on token ids [B, T].

        Args:
            ids: token ids [B, T].
            scale: accumulate gradients of (divergence + feature_weight * features) times this; None for none.
            feature_weight: see `scale`; a scalar on the device, None for 0.

        Returns:
            Mean over positions of KL(teacher || student) in nats, and mean of 1 - cosine over positions and layers;
            detached.
        """
        with torch.no_grad():
            wanted, wanted_features = _run(self._teacher, ids, self._layers)
        with torch.set_grad_enabled(scale is not None):
            found, found_features = _run(self._student, ids, self._layers)
            features = found.last_hidden_state.new_zeros((), dtype=torch.float32)
            for mine, other in zip(found_features, wanted_features, strict=True):
                features = features + (1 - functional.cosine_similarity(mine.float(), other.float(), dim=-1)).mean()
            features = features / max(1, len(self._layers))
        # Logits and all that hangs on them are gone after each chunk; only the gradient of the hidden states stays.
        hidden = found.last_hidden_state.detach().requires_grad_(scale is not None)
        total = features.new_zeros(())
        rows = hidden.flatten(0, 1).split(POSITIONS), wanted.last_hidden_state.flatten(0, 1).split(POSITIONS)
        for mine, other in zip(*rows, strict=True):
            with torch.set_grad_enabled(scale is not None):
                with torch.no_grad():
                    expected = head(self._teacher, wanted, other)
                divergence = self._divergence(head(self._student, found, mine), expected) / ids.numel()
                if scale is not None:
                    (divergence * scale).backward()
            total = total + divergence.detach()
        if scale is not None:
            ends, gradients = [found.last_hidden_state], [hidden.grad]
            if self._layers and feature_weight is not None:
                ends, gradients = [*ends, features], [*gradients, feature_weight * scale]
            torch.autograd.backward(ends, gradients)
        return total, features.detach()


def summed_divergence(logits: Tensor, expected: Tensor) -> Tensor:
    """Sum over positions of KL(expected || logits) in nats, in float32, of logits [P, V]."""
    wanted = expected.float().log_softmax(-1)
    return functional.kl_div(logits.float().log_softmax(-1), wanted, reduction="sum", log_target=True)


def distillation_rate(divergence: float) -> float:
    """Highest learning rate for a start with this mean divergence in nats.

    Found on SmolLM2, all weights trained, with starts of about 0.1, 0.5 and 1.1 and steps of 8,192 tokens
    (docs/notebook/2026-11-training.md).
    """
    return suggested_rate(divergence, 0.0035, HIGHEST_RATE)


def _run(model: PreTrainedModel, ids: Tensor, layers: Sequence[str]) -> tuple[Any, list[Tensor]]:
    """Output of the model without its head, and hidden states after some layers."""
    features: list[Tensor] = []

    def keep(*call: Any) -> None:
        features.append(first_output(call[-1]))

    with hooked(model, dict.fromkeys(layers, keep)):
        return body(model)(input_ids=ids, use_cache=False), features

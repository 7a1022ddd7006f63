"""A causal language model in two parts: hidden states of all positions, then logits of some.

Logits of a vocabulary are large: those of 32,768 positions and 151,936 tokens are 19 GiB in float32.

Letters in shapes: B windows, T tokens, D hidden size, P positions, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.transformers_names import repeated_heads
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.execution.stream import replaced_forward
from attnedit.compiler.model_io.source_checks import embedding_weight

VALUES = 2**26
"""Logits held at once by `token_losses`; 256 MiB in float32."""


def body(model: PreTrainedModel) -> nn.Module:
    """The model without its head: what its forward runs once and reads the last hidden states of."""
    decoder: nn.Module = model.get_decoder()  # not base_model: OPT's runs only the decoder inside that
    return decoder


def head(model: PreTrainedModel, output: Any, hidden: Tensor) -> Tensor:
    """Logits [P, V] of last hidden states [P, D], through the model's own forward: it may scale or cap them.

    Args:
        model: the whole model.
        output: what `body` returned; where the head looks for more than hidden states.
        hidden: any positions of its last hidden states.

    Raises:
        CaptureError: the model's forward does not run what `body` names.
    """
    part = copy.copy(output)
    part.last_hidden_state = hidden[None]
    ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=hidden.device)
    runs: list[None] = []

    def skip(*_: Any, **__: Any) -> Any:
        runs.append(None)
        return part

    with replaced_forward(body(model), skip):
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    if not runs:
        raise CaptureError(f"{type(model).__name__} does not run its {type(body(model)).__name__} as a whole")
    return logits[0]


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Negative log-likelihoods [B, T - 1] in nats of tokens 2 to T of rows of ids [B, T]; float32, on the device."""
    everywhere = torch.ones_like(ids[:, 1:], dtype=torch.bool)
    parts = [
        functional.cross_entropy(logits, goals, reduction="none")
        for logits, goals in logits_of_tokens(model, ids, everywhere)
    ]
    return torch.cat(parts).view(len(ids), -1)


def logits_of_tokens(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Logits that predict some of the tokens 2 to T of each row, row after row, few of them at a time.

    Args:
        model: causal language model.
        ids: token ids [B, T] on the model's device, without padding but at the end.
        wanted: which tokens, [B, T - 1].

    Yields:
        Logits [P, V] in float32 and the tokens [P] that they should predict.
    """
    goals = ids[:, 1:][wanted]
    done = 0
    for part in _parts_of_logits(model, ids, wanted):
        yield part.float(), goals[done : done + len(part)]
        done += len(part)


def _parts_of_logits(model: PreTrainedModel, ids: Tensor, wanted: Tensor) -> Iterator[Tensor]:
    size = max(1, VALUES // len(embedding_weight(model)))
    with repeated_heads():
        output: Any = None if body(model) is model else body(model)(input_ids=ids, use_cache=False)
    if not _separable(model, output):
        with repeated_heads():
            logits = model(input_ids=ids, use_cache=False).logits
        yield from logits[:, :-1][wanted].split(size)
        return
    for hidden in output.last_hidden_state[:, :-1][wanted].split(size):
        yield head(model, output, hidden)


def _separable(model: PreTrainedModel, output: Any) -> bool:
    """Whether `head` does what the model does with this output of its body; modelling code of others may not."""
    if getattr(output, "last_hidden_state", None) is None:
        return False
    try:
        head(model, output, output.last_hidden_state[0, :1])
    except CaptureError:
        return False
    return True

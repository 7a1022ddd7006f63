"""One training step's forward and backward passes as a single launch, where single kernels are too short to wait for.

A small model's step is thousands of kernels of a few microseconds each, and the processor cannot launch them as fast as
a GPU runs them. A CUDA graph launches them all at once (PyTorch documentation, "CUDA Graphs", whole-network capture).
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnedit.compiler.compatibility.transformers_names import as_if_not_capturing
from attnedit.compiler.errors import AttneditError, UsageError, first_line
from attnedit.compiler.processes import processes

WARM_UP = 3
"""Calls of one shape that run as they are: they compile, and allocate what stays."""
Losses = Callable[..., Mapping[str, Tensor]]
"""Takes tensors, returns losses by name, and leaves gradients in parameters."""


@dataclass
class _Graph:
    """Kernels of one call, with the memory that they read and write."""

    graph: Any
    inputs: Sequence[Tensor]
    losses: Mapping[str, Tensor]
    gradients: Sequence[Tensor | None]


class Replayed:
    """A function that leaves gradients in parameters, from CUDA graphs once it has been called a few times.

    Tensors that it is given must tell all that changes between calls: a replay repeats everything else, numbers in
    Python too. Losses and gradients are overwritten by the next call.

    Args:
        function: whose gradients are those of `parameters`.
        parameters: all that get gradients. They must have none before a call.
    """

    def __init__(self, function: Losses, parameters: Sequence[nn.Parameter]) -> None:
        self._function, self._parameters = function, list(parameters)
        self._stream = torch.cuda.Stream()
        self._key: Any = None
        self._calls = 0
        self._graph: _Graph | None = None

    def __call__(self, *tensors: Tensor) -> Mapping[str, Tensor]:
        """Losses of these tensors.

        Raises:
            AttneditError: the function looks at values, or does something else that a graph cannot hold.
        """
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if key != self._key:
            # Windows only ever grow: what was captured for shorter ones is not needed again, its memory is.
            self._key, self._calls, self._graph = key, 0, None
        self._calls += 1
        if self._calls <= WARM_UP:
            return self._aside(tensors)
        if self._graph is None:
            self._graph = self._captured(tensors)
        for mine, given in zip(self._graph.inputs, tensors, strict=True):
            mine.copy_(given)
        self._graph.graph.replay()
        for parameter, gradient in zip(self._parameters, self._graph.gradients, strict=True):
            parameter.grad = gradient
        return self._graph.losses

    def _aside(self, tensors: Sequence[Tensor]) -> Mapping[str, Tensor]:
        """Run the function on the stream that it is captured on, so that nothing it keeps belongs to another one."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            losses = self._function(*tensors)
        torch.cuda.current_stream().wait_stream(self._stream)
        return losses

    def _captured(self, tensors: Sequence[Tensor]) -> _Graph:
        inputs = [tensor.clone() for tensor in tensors]
        graph = torch.cuda.CUDAGraph()
        gc.collect()  # a graph that is collected during a capture breaks it
        try:
            with as_if_not_capturing(), torch.cuda.graph(graph, stream=self._stream):
                losses = self._function(*inputs)
        except RuntimeError as error:
            # Random numbers and memory of the process belong to the broken capture from here on.
            reason = first_line(error.__context__ or error)
            raise AttneditError(f"no CUDA graph holds the training steps: {reason}; leave out cuda_graphs") from error
        return _Graph(graph, inputs, losses, [parameter.grad for parameter in self._parameters])


def check_graphs(device: torch.device, *, accumulation: int, in_turn: bool) -> None:
    """Refuse graphs where there can be none.

    Args:
        device: of the models.
        accumulation: parts that a batch is computed in; their gradients add up, which a replay does not.
        in_turn: whether layers are fitted one after the other, from hidden states on disk.

    Raises:
        UsageError: they cannot be captured here, and why.
    """
    reasons = {
        f"are for CUDA GPUs, and the model is on {device.type}": device.type != "cuda",
        "hold whole weights, and here they are in parts": processes().sharded,
        "hold whole batches; leave out accumulation": accumulation > 1,
        "hold all layers; leave out memory_limit": in_turn,
    }
    for reason, found in reasons.items():
        if found:
            raise UsageError(f"cuda_graphs {reason}")

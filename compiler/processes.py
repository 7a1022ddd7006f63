"""Several processes with a device each, as `accelerate launch` starts them; one process is the usual case.

Every process learns from its share of each batch; gradients and losses are summed. Each holds the whole model, or with
``accelerate launch --use_fsdp --fsdp_version 2`` its part of every weight.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import is_npu_available
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnedit.compiler.errors import UsageError

PATIENCE = timedelta(hours=24)
"""How long the others wait while the main process works alone."""


def accelerator() -> str | None:
    """Type of the accelerator here, "cuda" or "npu", or None; asking imports torch_npu where that is installed."""
    if torch.cuda.is_available():
        return "cuda"
    return "npu" if is_npu_available() else None


class Processes:
    """The processes of this run.

    Attributes:
        count: how many.
        rank: which one this is.
        sharded: whether each is to hold a part of every weight in place of the whole model.
    """

    def __init__(self) -> None:
        self._state: PartialState | None = None
        self.count, self.rank, self.sharded = 1, 0, False
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            # accelerate joins processes on CPUs only when told that there is nothing else.
            self._state = PartialState(cpu=accelerator() is None, timeout=PATIENCE)
            self.count, self.rank = self._state.num_processes, self._state.process_index
            # accelerate tells those it launches what was asked for in these variables.
            self.sharded = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
            if self.sharded and os.environ.get("FSDP_VERSION", "1") != "2":
                raise UsageError("sharded training is built on FSDP2; launch with --use_fsdp --fsdp_version 2")

    @property
    def main(self) -> bool:
        """Whether this is the process that writes and prints."""
        return self.rank == 0

    @property
    def device(self) -> torch.device | None:
        """The device of this process; None in a run of one."""
        return None if self._state is None else self._state.device

    def share(self, rows: Tensor) -> Tensor:
        """This process's rows of a batch [B]; every B / count-th."""
        return rows[self.rank :: self.count]

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Sum gradients over the processes, in place; a parameter without gradient here counts as zero.

        Those of parameters in parts have been summed when they were put in parts.
        """
        if self.count == 1:
            return
        for parameter in parameters:
            if isinstance(parameter, DTensor):
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)

    def add(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sum numbers over the processes, by name; every process needs the same names."""
        if self.count == 1:
            return dict(values)
        names = sorted(values)
        # Ascend's collective library does not sum float64.
        dtype = torch.float32 if self.device is not None and self.device.type == "npu" else torch.float64
        total = torch.tensor([values[name] for name in names], dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return dict(zip(names, total.tolist(), strict=True))

    def copy_from_main(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the main one's numbers, in place."""
        if self.count > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def wait(self) -> None:
        """Go on when all have come here."""
        if self._state is not None:
            self._state.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go through first: what it leaves on disk is there for the others."""
        if not self.main:
            self.wait()
        yield
        if self.main:
            self.wait()


@functools.cache
def processes() -> Processes:
    """The processes of this run; those of `accelerate launch` are joined at the first call."""
    return Processes()

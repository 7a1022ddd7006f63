"""Devices and dtypes by their names."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from attnedit.compiler.errors import AttneditError, UsageError, first_line
from attnedit.compiler.processes import accelerator, processes


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Turn ``"bfloat16"`` into `torch.bfloat16`; ``"auto"`` stays.

    >>> parse_dtype("bfloat16")
    torch.bfloat16

    Raises:
        UsageError: not a floating-point dtype that models are kept in.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in known:
        raise UsageError(f"unknown dtype {dtype!r}; give one of auto, {', '.join(known)}")
    return known[dtype]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Turn ``"auto"`` (or None) into CUDA or an Ascend NPU where there is one, else the CPU; check any other.

    Raises:
        UsageError: no such device here.
    """
    if device is None or device == "auto":
        return processes().device or torch.device(accelerator() or "cpu")
    if str(device).partition(":")[0] == "npu" and accelerator() != "npu":
        raise UsageError(
            f"device {str(device)!r} is not usable here: it needs an Ascend NPU with CANN and torch_npu "
            "(docs/ascend.md)"
        )
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("nothing can be computed on it")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {str(device)!r} is not usable here; give cpu, cuda, npu, or leave it auto") from error
    return resolved


@contextmanager
def device_failures(work: str, out_of_memory: str, broken: str = "try again") -> Iterator[None]:
    """Say in one line what a device that is out of memory, or broke down, means for this work.

    >>> with device_failures("training", "use smaller batches"):
    ...     raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")
    Traceback (most recent call last):
    attnedit.compiler.errors.AttneditError: training: out of memory; use smaller batches

    Raises:
        AttneditError: in place of errors of these two kinds; others pass.
    """
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
            raise AttneditError(f"{work}: out of memory; {out_of_memory}") from error
        if "CUDA error" in text or "NPU error" in text:
            raise AttneditError(f"{work}: the device failed ({first_line(error)}); {broken}") from error
        raise

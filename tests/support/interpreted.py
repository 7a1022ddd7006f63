"""Programs of `tests/support` that check triton kernels: on a GPU where there is one, else in triton's interpreter."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton for this platform")
HOPPER = 232448
"""Bytes of shared memory."""


@functools.cache
def results_of(program: str) -> dict[str, Any]:
    """The JSON that a program prints, run once: triton decides when it is imported whether kernels are interpreted."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, Path(__file__).with_name(program)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result

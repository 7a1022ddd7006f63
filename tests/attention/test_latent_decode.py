"""The decode kernel: on a GPU where there is one, in triton's interpreter where there is none."""

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

from attnedit.targets.attention.mla.decode import choose_blocks, choose_splits, decodes_fused

HOPPER = 232448  # bytes of shared memory
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no triton for this platform")


@functools.cache
def cases() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    program = Path(__file__).parents[1] / "support" / "latent_decode_cases.py"
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


@needs_triton
def test_kernel_equals_the_reference() -> None:
    errors = cases()["errors"]
    assert len(errors) >= 21
    assert {name: error for name, error in errors.items() if not error < (8e-3 if "bfloat16" in name else 1e-3)} == {}


@needs_triton
def test_kernel_takes_what_it_is_made_for() -> None:
    assert cases()["choices"] == {"half": True, "float": False, "long": False, "grad": False, "masked by head": False}


def test_processors_keep_the_plain_path() -> None:
    query, latent = torch.zeros((1, 2, 1, 16)).half(), torch.zeros((1, 4, 16)).half()
    assert not decodes_fused(query, None, latent, None)


@pytest.mark.parametrize("heads", [1, 9, 32, 128])
@pytest.mark.parametrize(("rank", "rope"), [(512, 64), (424, 88), (160, 32), (848, 176), (1000, 0)])
def test_blocks_fit(heads: int, rank: int, rope: int) -> None:
    blocks = choose_blocks(heads, rank, rope, HOPPER)
    assert blocks is not None
    assert 16 <= blocks.heads <= 32
    tiles = 2 * blocks.stages * blocks.tokens * (rank + rope)
    assert blocks.resident * tiles < HOPPER
    assert choose_blocks(heads, rank, rope, 8192) is None


def test_no_blocks_for_very_wide_latents() -> None:
    assert choose_blocks(32, 1025, 64, 1 << 30) is None


@pytest.mark.parametrize("programs", [1, 7, 32, 100, 128, 500])
@pytest.mark.parametrize("keys", [1, 300, 8192, 131072])
def test_splits_fill_the_processors(programs: int, keys: int) -> None:
    splits = choose_splits(programs, keys, 264)
    assert 1 <= splits <= max(1, keys // 128)
    rounds = programs * splits / 264
    if keys >= 131072:
        assert rounds / -(-rounds // 1) > 0.9

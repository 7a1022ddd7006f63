"""Checkpoints of ``--engine sglang`` served by SGLang, and compared with eager: needs ATTNEDIT_SGLANG_PYTHON."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from compiled import tokens
from families import build
from tiny_llama import make_tokenizer
from vllm_models import SIZES, WINDOW
from vllm_serving import NEW, assert_as_eager, prompts

import attnedit

pytestmark = [
    pytest.mark.engines,
    pytest.mark.skipif("ATTNEDIT_SGLANG_PYTHON" not in os.environ, reason="it names no python with SGLang"),
]

RUNNER = Path(__file__).parents[1] / "support" / "sglang_runner.py"
LATENT = {"target": "mla", "kv_budget": 0.5}
WINDOWS = {"target": "gateswa", "window": WINDOW, "full_layers": 1}


def serve(folder: Path, directory: Path) -> dict[str, Any]:
    """Answers of SGLang in a process of its own, which it ends when something goes wrong."""
    asked, answered = folder / "job.json", folder / "answers.json"
    asked.write_text(json.dumps({"directory": str(directory), "prompts": prompts(), "max_tokens": NEW}))
    command = [os.environ["ATTNEDIT_SGLANG_PYTHON"], str(RUNNER), str(asked), str(answered)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert answered.exists(), done.stderr[-4000:]
    found: dict[str, Any] = json.loads(answered.read_text())
    return found


@pytest.mark.parametrize(
    ("family", "options"),
    [
        pytest.param("llama", LATENT, id="llama-mla"),
        pytest.param("llama", WINDOWS, id="llama-gateswa"),
        pytest.param("qwen3", WINDOWS, id="qwen3-gateswa"),  # norms of queries and keys
        pytest.param("qwen2", WINDOWS, id="qwen2-gateswa"),  # biases
    ],
)
def test_sglang_answers_as_eager(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    """With a head tied to the embeddings in the source, which not all of SGLang's classes know."""
    model = build(family, **SIZES, tie_word_embeddings=True)
    result = attnedit.compile(model, **options, engine="sglang", alternations=0, calibration=tokens(4, 64))
    result.tokenizer = make_tokenizer()
    result.export("hf", tmp_path / "exported")
    assert_as_eager(serve(tmp_path, tmp_path / "exported"), result.model, prompts())

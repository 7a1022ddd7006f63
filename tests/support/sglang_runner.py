"""Run by the Python that has SGLang: answer the prompts of a file greedily, and write the answers."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # TF32 would be no float32

SETTINGS = {
    "dtype": "float32",
    "sampling_backend": "pytorch",
    "grammar_backend": "none",
    "disable_cuda_graph": True,
    "disable_overlap_schedule": True,
    "max_total_tokens": 4096,
    "max_running_requests": 8,
    "mem_fraction_static": 0.2,
    "log_level": "error",
}


def device_settings() -> dict[str, Any]:
    import torch

    if torch.cuda.is_available():
        return {"device": "cuda", "attention_backend": "triton"}
    # The only backend there reads the pool of windows by places of the other layers'.
    return {"device": "cpu", "attention_backend": "torch_native", "disable_hybrid_swa_memory": True}


def run(job: dict[str, Any]) -> dict[str, Any]:
    import sglang

    engine = sglang.Engine(model_path=job["directory"], **SETTINGS, **device_settings())
    sampling = {"temperature": 0.0, "max_new_tokens": job["max_tokens"], "ignore_eos": True}
    answers = engine.generate(
        input_ids=job["prompts"], sampling_params=sampling, return_logprob=True, logprob_start_len=0
    )
    engine.shutdown()
    return {"answers": [[_answer(answer["meta_info"]) for answer in answers]]}


def _answer(found: dict[str, Any]) -> dict[str, Any]:
    """Of a prompt SGLang gives a log probability for every token, which is none for the first."""
    own = found["output_token_logprobs"]
    return {
        "ids": [token for _, token, *_ in own],
        "logprobs": [value for value, *_ in own],
        "prompt_logprobs": [value for value, *_ in found["input_token_logprobs"] if value is not None],
    }


if __name__ == "__main__":  # the engine's processes import this file again
    asked, answered = map(Path, sys.argv[1:])
    answered.write_text(json.dumps(run(json.loads(asked.read_text()))))

"""Run by the Python that has vLLM: serve jobs read as JSON from a file, one after the other, and write the answers."""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ["HF_HUB_OFFLINE"] = "1"

SETTINGS = {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 512, "max_num_seqs": 8}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Answer prompts greedily, twice: the second time is from the prefix cache where there is one."""
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    engine: Any = None
    try:
        engine = LLM(job["directory"], **{**SETTINGS, **job.get("settings", {})})
        sampling = {"temperature": 0, "max_tokens": job["max_tokens"], "logprobs": 1, "ignore_eos": True}
        answers = []
        for part in ({"prompt_logprobs": 1}, {}):
            prompts = [{"prompt_token_ids": ids} for ids in job["prompts"]]
            outputs = engine.generate(prompts, SamplingParams(**sampling, **part), use_tqdm=False)
            answers.append([_answer(output) for output in outputs])
        cache = engine.llm_engine.vllm_config.cache_config
        compiled = any(getattr(x, "compiled", False) for x in _modules(engine))
        found = {"answers": answers, "tokens": cache.kv_cache_size_tokens, "block": cache.block_size}
        return {**found, "compiled": compiled}
    except BaseException as error:
        return {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    finally:
        if engine is not None:
            engine.llm_engine.engine_core.shutdown()
            del engine
        cleanup_dist_env_and_memory()
        gc.collect()


def _modules(engine: Any) -> list[Any]:
    """The modules of the model, where it is in this process."""
    core = getattr(engine.llm_engine.engine_core, "engine_core", None)
    if core is None:
        return []
    return list(core.model_executor.driver_worker.get_model().modules())


def _answer(output: Any) -> dict[str, Any]:
    prompt = output.prompt_logprobs or []
    ids, own = output.prompt_token_ids, output.outputs[0]
    return {
        "ids": list(own.token_ids),
        "logprobs": [step[token].logprob for step, token in zip(own.logprobs, own.token_ids, strict=True)],
        "prompt_logprobs": [step[ids[place]].logprob for place, step in enumerate(prompt) if place],
        "cached": output.num_cached_tokens,
    }


if __name__ == "__main__":
    jobs = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps({name: run(job) for name, job in jobs.items()}))

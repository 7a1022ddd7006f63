"""Results served by vLLM through our plugin, and compared with eager: needs ATTNEDIT_VLLM_PYTHON (make test-vllm)."""

from __future__ import annotations

import json
import math
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import tokens
from families import build
from tiny_llama import make_tokenizer
from vllm_models import SIZES, WINDOW, save_random
from vllm_server import complete, server
from vllm_serving import (
    GIBIBYTE,
    NEW,
    all_logs,
    assert_as_eager,
    environment,
    gated,
    on_gpu,
    prompts,
    python,
    release,
    serve,
)

import attnedit
from attnedit.compiler.data.token_windows import demo_text
from attnedit.compiler.model_io.models import load_source
from attnedit.targets.runtime.eager import load_model

pytestmark = pytest.mark.engines

FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma3_text", "qwen3_moe", "gpt_oss")
KINDS = {"mla": ("mla",), "gateswa": ("gateswa", "full"), "gateswa+mla": ("gateswa", "mla")}
SLIDING = {"sliding_window": 32}
CASES = {f"{family}-{kind}": (family, kind) for family in FAMILIES for kind in KINDS}
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "In 1969, three astronauts",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vllm")


OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ranks": ("llama", "mla", {"ranks": (24, 11)}),
    "no-slots": ("llama", "mla", {"columns": ()}),
    "softcap": ("gemma2", "gateswa+mla", {"sizes": SLIDING}),
    "odd": ("llama", "gateswa+mla", {"ranks": (21,)}),
    "fused": ("phi3", "gateswa+mla", {}),
    "whole-norms": ("olmo2", "gateswa+mla", {}),
}


class Directories:
    """Saved results by name, each made when first asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __getitem__(self, name: str) -> Path:
        path = self.folder / name
        if not path.exists():
            if name in OTHERS:
                family, kind, options = OTHERS[name]
            else:
                family, kind = CASES[name]
                options = {"sizes": SLIDING} if family in ("mistral", "gemma3_text", "gpt_oss") else {}
            if family == "gpt_oss":  # beside its own sink logits no sink value is served
                options = {**options, "gate": "element", "sink_logit": True}
            save_random(family, path, KINDS[kind], **{**gated(), **options})
        return path


@pytest.fixture(scope="module")
def directories(folder: Path) -> Directories:
    return Directories(folder)


@pytest.fixture(scope="module")
def served(folder: Path, directories: Directories, request: pytest.FixtureRequest) -> dict[str, Any]:
    """Answers for all the tests that were chosen, from one process: its start takes longer than a tiny model."""
    chosen: list[Any] = [item for item in request.session.items if "served" in getattr(item, "fixturenames", ())]
    names = [item.callspec.params["name"] for item in chosen if not left_out(item.callspec.params["name"])]
    return serve(folder, {name: {"directory": str(directories[name])} for name in names})


def left_out(name: str) -> str | None:
    """Why this vLLM cannot serve a case on a CPU."""
    if on_gpu():
        return None
    if release() == "0.26" and "moe" in name:
        return "vLLM 0.26 has no kernel on a CPU for experts as small as these"
    if release() == "0.26" and "gpt_oss" in name and "gateswa" in name:
        return "vLLM 0.26 takes sink logits on a CPU in bfloat16 only"
    if release() == "0.26" and name == "odd":
        return "vLLM 0.26 has no blocks on a CPU for layers whose tokens' sizes do not divide one another"
    return None


@pytest.mark.parametrize("name", [*CASES, *OTHERS])
def test_vllm_answers_as_eager(name: str, served: dict[str, Any], directories: Directories) -> None:
    if reason := left_out(name):
        pytest.skip(reason)
    assert_as_eager(served[name], load_model(directories[name]), prompts())


def test_prompts_in_parts_and_cached_prefixes(folder: Path, directories: Directories) -> None:
    """32 tokens a step, longer prompts come in parts; the second time they are in the prefix cache."""
    names = ["llama-mla", "llama-gateswa", "llama-gateswa+mla", "mistral-mla", "gemma3_text-gateswa+mla"]
    if release() != "0.26":  # which gives gpt-oss 128 tokens
        names.append("gpt_oss-mla")
    given = [prompts(1)[4][:64] + prompt for prompt in prompts()]
    settings = {"max_num_batched_tokens": 32, "block_size": 32}
    jobs = {name: {"directory": str(directories[name]), "settings": settings, "prompts": given} for name in names}
    found = serve(folder, jobs)
    for name in names:
        assert_as_eager(found[name], load_model(directories[name]), given)
        assert any(answer["cached"] for answer in found[name]["answers"][1])


def test_compiled_by_torch(folder: Path, directories: Directories) -> None:
    names = ("llama-mla", "llama-gateswa+mla")
    settings = {"enforce_eager": False}
    found = serve(folder, {name: {"directory": str(directories[name]), "settings": settings} for name in names})
    for name in names:
        assert_as_eager(found[name], load_model(directories[name]), prompts())
        assert found[name]["compiled"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(folder: Path, directories: Directories, dtype: str) -> None:
    """As near to float32 as eager is in that precision, on the tokens that vLLM chose."""
    names = ["llama-mla", "llama-gateswa+mla", "qwen3-gateswa"]
    if on_gpu() and dtype == "float16":  # sink logits are refused there
        names = ["llama-mla"]
    jobs = {name: {"directory": str(directories[name]), "settings": {"dtype": dtype}} for name in names}
    found = serve(folder, jobs)
    for name in names:
        exact, half = (load_model(directories[name], dtype=kind) for kind in (torch.float32, getattr(torch, dtype)))
        assert "error" not in found[name], found[name]["traceback"]
        for prompt, answer in zip(prompts(), found[name]["answers"][0], strict=True):
            ids = torch.tensor(prompt + answer["ids"])
            logs = torch.tensor(answer["prompt_logprobs"] + answer["logprobs"])
            expected = all_logs(exact, ids)
            assert (logs - expected).abs().mean() < 2 * (all_logs(half, ids) - expected).abs().mean()


def test_heads_shared_by_two(folder: Path, directories: Directories) -> None:
    if on_gpu() and torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    names = ("llama-gateswa+mla", "qwen3-mla")
    jobs = {name: {"directory": str(directories[name]), "settings": {"tensor_parallel_size": 2}} for name in names}
    # One core each: vLLM binds its workers to the nodes of a machine otherwise, of which there may be one.
    found = serve(folder, jobs, VLLM_ENABLE_V1_MULTIPROCESSING="1", VLLM_CPU_OMP_THREADS_BIND="0|1")
    for name in names:
        assert_as_eager(found[name], load_model(directories[name]), prompts())


def test_a_latent_cache_has_the_size_of_the_report(folder: Path, llama_result: Any) -> None:
    result, directory = llama_result
    found = serve(folder, {"compiled": {"directory": str(directory)}})["compiled"]
    assert_as_eager(found, load_model(directory), prompts())
    assert found["tokens"] == pytest.approx(GIBIBYTE / result.report.kv_bytes_after, rel=0.02)


@pytest.fixture(scope="module")
def llama_result(folder: Path) -> tuple[Any, Path]:
    """A compiled model: what its weights were folded to, the report, all as a user has it."""
    result = attnedit.compile(build("llama", **SIZES), "mla", kv_budget=0.5, calibration=tokens(4, 64), alternations=0)
    result.tokenizer = make_tokenizer()
    return result, result.save(folder / "compiled")


def test_a_window_has_the_blocks_that_vllm_allocates(folder: Path) -> None:
    """Of a window its tokens less one and those of a step, in whole blocks, and one for where it begins."""
    context, block, step, layers = 4096, 32, 64, 4
    sizes = {"max_position_embeddings": context, "num_hidden_layers": layers}
    directory = save_random("llama", folder / "window", ("gateswa", "full"), sizes=sizes, **gated())
    settings = {"max_num_batched_tokens": step, "block_size": block, "max_model_len": context}
    found = serve(folder, {"window": {"directory": str(directory), "settings": settings}})["window"]
    assert_as_eager(found, load_model(directory), prompts())
    page = block * 2 * 2 * 32 * 4  # tokens, keys and values, heads, head_dim, bytes
    full, window = context // block, math.ceil((WINDOW - 1 + step) / block) + 1
    expected = GIBIBYTE / (page * layers / 2 * (full + window)) * context
    assert found["tokens"] == pytest.approx(expected, rel=0.02)
    assert found["tokens"] > 1.9 * GIBIBYTE / (page / block * layers)  # nearly twice what the source has room for


def test_stock_vllm_allocates_for_windows_what_the_report_says(folder: Path) -> None:
    """Checkpoints of ``--engine vllm``, which need no plugin, with the settings that the report names."""
    sizes = {**SIZES, "max_position_embeddings": 4096, "num_hidden_layers": 5}
    options = {"window": WINDOW, "full_layers": 2, "alternations": 0, "engine": "vllm", "calibration": tokens(4, 64)}
    results, allocated, jobs = {}, {}, {}
    classes = {"llama": "LlamaForCausalLM"}
    if release() != "0.26":  # whose own configuration of Laguna stops at that of transformers 5
        classes["qwen3"] = "LagunaForCausalLM"
    for family, architecture in classes.items():
        result = results[family] = attnedit.compile(build(family, **sizes), "gateswa", **options)
        result.tokenizer = make_tokenizer()
        directory = folder / f"stock-windows-{family}"
        result.export("hf", directory)
        assert json.loads((directory / "config.json").read_text())["architectures"] == [architecture]
        noted = next(note for note in result.report.notes if note.startswith("vllm allocates"))
        allocated[family] = float(noted.split()[2].replace(",", ""))
        flags = re.findall(r"--(max-num-batched-tokens|block-size) (\d+)", noted)
        settings = {name.replace("-", "_"): int(value) for name, value in flags}
        assert len(settings) == 2
        jobs[family] = {"directory": str(directory), "settings": {**settings, "max_model_len": 4096}}
    found = serve(folder, jobs)
    for family, result in results.items():
        assert_as_eager(found[family], result.model, prompts())
        assert found[family]["tokens"] == pytest.approx(GIBIBYTE / allocated[family], rel=0.02)


def test_stock_vllm_serves_latents_of_its_size(folder: Path) -> None:
    """Without the plugin, as the page of vLLM says: one CPU kernel takes 512 + 64, another is left out."""
    if release() == "0.26" and not on_gpu():
        pytest.skip("vLLM 0.26 has no latent attention on a CPU of its own")
    sizes = {**SIZES, "head_dim": 64, "hidden_size": 80, "num_attention_heads": 5, "num_key_value_heads": 5}
    options = {"kv_budget": 0.9, "engine": "vllm", "calibration": tokens(4, 64), "alternations": 0}
    result = attnedit.compile(build("llama", **sizes), "mla", **options)
    result.tokenizer = make_tokenizer()
    directory = folder / "stock-latents"
    result.export("hf", directory)
    config = json.loads((directory / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert (config["kv_lora_rank"], config["qk_rope_head_dim"]) == (512, 64)
    settings = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
    found = serve(folder, {"stock": {"directory": str(directory), "settings": settings}})["stock"]
    assert_as_eager(found, result.model, prompts())
    values = 576 * 4 * config["num_hidden_layers"]
    assert found["tokens"] == pytest.approx(GIBIBYTE / values, rel=0.02)
    assert values == result.report.kv_bytes_after


def test_a_real_model(folder: Path) -> None:
    """SmolLM2 at half of its cache, on real text."""
    source, (calibration, text) = load_source("smollm2", dtype="float32", device="cpu"), demo_text()
    assert source.tokenizer is not None
    result = attnedit.compile(
        source.model,
        "mla",
        kv_budget=0.5,
        tokenizer=source.tokenizer,
        calibration=[calibration],
        calibration_tokens=4096,
        calibration_length=512,
        alternations=0,
    )
    directory = result.save(folder / "smollm2")
    given = [source.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    long = source.tokenizer(text[:1600])["input_ids"]
    assert len(long) > 300
    settings = {"max_model_len": 1024}
    job = {"directory": str(directory), "prompts": [*given, long], "settings": settings}
    found = serve(folder, {"real": job})["real"]
    whole = {**found, "answers": [answers[: len(given)] for answers in found.get("answers", [])]}
    model = load_model(directory)
    assert_as_eager(whole, model, given)
    # The second token of a text is as unlikely as e^-17, and the first one's activations are outliers: there eager's
    # float32 is itself 4e-4 from float64.
    answer = found["answers"][0][-1]
    ids = torch.tensor(long + answer["ids"])
    eager, exact = all_logs(model, ids), all_logs(load_model(directory, dtype=torch.float64), ids)
    allowed = 1e-4 + 2 * (eager - exact).abs()
    assert ((torch.tensor(answer["prompt_logprobs"] + answer["logprobs"]) - eager).abs() < allowed).all()
    assert found["tokens"] == pytest.approx(GIBIBYTE / result.report.kv_bytes_after, rel=0.02)


REFUSED = {
    "kept": ({"sink_tokens": 4}, {}, "layer 0 has 4 kept first tokens (--sinks keep:4)"),
    "quantised": ({}, {"quantization": "fp8"}, "quantisation on load"),
    "cache": ({}, {"kv_cache_dtype": "fp8"}, "a quantised KV cache"),
    "pipeline": ({}, {"pipeline_parallel_size": 2}, "pipeline parallelism"),
    "heads": ({}, {"tensor_parallel_size": 4}, "2 key/value heads for 4 ranks"),
}


def test_refused_in_one_line(folder: Path) -> None:
    jobs = {}
    cases = dict(REFUSED)
    if on_gpu():
        few = torch.cuda.device_count() < 4  # which vLLM asks before
        cases = {name: case for name, case in cases.items() if not (few and "parallel" in str(case[1]))}
        cases["half"] = ({}, {"dtype": "float16"}, "layer 0 has sink logits, which vLLM's FLASH_ATTN takes in bfloat16")
    for name, (options, settings, _) in cases.items():
        directory = save_random("llama", folder / f"refused-{name}", ("gateswa", "full"), **options)
        jobs[name] = {"directory": str(directory), "settings": settings}
    expected = {name: case[2] for name, case in cases.items()}
    if not on_gpu():  # a GPU's backends take heads of 16
        small = save_random("llama", folder / "refused-size", ("gateswa",), sizes={"head_dim": 16}, **gated())
        jobs["size"], expected["size"] = {"directory": str(small)}, "this model has 16"
    found = serve(folder, jobs)
    for name, text in expected.items():
        error = found[name].get("error", "it was served")
        assert error.startswith("UsageError: ")
        assert text in error
        assert "\n" not in error


def test_sink_logits_in_an_older_vllm(folder: Path) -> None:
    """Its kernel takes them in bfloat16: there they are served, and in float32 they are refused."""
    if release() != "0.26" or on_gpu():
        pytest.skip("of vLLM 0.26 on a CPU")
    directory = str(save_random("llama", folder / "sinks", ("gateswa", "full")))
    half = {"directory": directory, "settings": {"dtype": "bfloat16"}}
    found = serve(folder, {"single": {"directory": directory}, "half": half})
    assert found["single"]["error"].startswith(
        "UsageError: layer 0 has sink logits, which vLLM 0.26 takes on a CPU in "
    )
    assert "error" not in found["half"], found["half"]["traceback"]


def test_a_server_answers_and_answers_the_same_after_a_restart(folder: Path, directories: Directories) -> None:
    """Requests shorter and longer than the window, two at once, then a stop and a start."""
    directory = directories["llama-gateswa+mla"]
    texts = ["ab", "The quick brown fox jumps over the lazy dog, and on it goes. " * 2]
    assert len(texts[1]) > 2 * WINDOW
    model, tokenizer = load_model(directory), make_tokenizer()
    expected = []
    for text in texts:
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=True).input_ids
        new = model.generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=2)[0]
        expected.append(new[ids.shape[1] :].tolist())
    for run in range(2):
        with server(directory, folder / f"server-{run}.log") as address:
            assert [complete(address, text) for text in texts] == expected
            with ThreadPoolExecutor(2) as pool:
                assert list(pool.map(partial(complete, address), texts)) == expected


def test_the_benchmark_of_throughput_runs(folder: Path) -> None:
    """Windows and latents of a tiny model, through vLLM's connector for benchmarks."""
    # On a CPU 0.26 takes layers of both kinds only where the sizes of their tokens divide one another.
    model = "MLA 1/4" if release() == "0.26" and not on_gpu() else "GateSWA + MLA 1/8"
    program, out = Path(__file__).parents[2] / "benchmarks" / "vllm_throughput.py", folder / "throughput.json"
    command = [python(), str(program), "--tiny", "--models", model, "--lengths", "64", "--batches", "1"]
    subprocess.run([*command, "--out", str(out)], env=environment(), capture_output=True, text=True, check=True)
    (found,) = json.loads(out.read_text())["models"]
    assert found["cache_tokens"] > 0
    assert found["decode"][0]["batch"] == 1
    assert all(case["tokens_per_s"] > 0 for case in found["decode"])
    assert found["first_token"][0]["ms"] > 0

"""Results served by the real llama.cpp: `make test-engines`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_models import RULES, VOCABULARY, latent, sliding, trained_tokenizer, with_tokenizer
from transformers import PreTrainedModel

import attnedit
from attnedit.compiler.data.token_windows import demo_text
from attnedit.compiler.model_io.models import load_source
from attnedit.targets.runtime.gguf import export

pytestmark = pytest.mark.engines

PYTHON = os.environ.get("ATTNEDIT_LLAMACPP_PYTHON", "")
SERVER = Path(__file__).with_name("llamacpp_server.py")
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time",
    "Water boils at",
    "In 1969, three astronauts",
]
STEPS = 12


class Server:
    """A llama.cpp server that runs."""

    def __init__(self, address: str, log: Path) -> None:
        self.address, self._log = address, log

    def ask(self, path: str, **body: Any) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=300) as response:
            return json.load(response)

    def complete(self, ids: list[int], steps: int = STEPS) -> tuple[list[int], list[tuple[int, float]]]:
        """Greedy tokens; and those that end a character with their log probabilities."""
        sampling = {"temperature": 0, "n_probs": 1, "post_sampling_probs": False, "ignore_eos": True}
        options = {"cache_prompt": False, "return_tokens": True, **sampling}
        found = self.ask("/completion", prompt=ids, n_predict=steps, **options)
        return found["tokens"], [(step["id"], step["logprob"]) for step in found["completion_probabilities"]]

    @property
    def cache_mib(self) -> float:
        """Of all caches, as the engine logs it once the model is loaded."""
        sizes = re.findall(r"CPU KV buffer size = +([\d.]+) MiB", self._log.read_text(errors="replace"))
        return sum(float(size) for size in sizes)


@contextlib.contextmanager
def serving(file: Path, **options: Any) -> Iterator[Server]:
    assert PYTHON, "ATTNEDIT_LLAMACPP_PYTHON names no python with xllamacpp; run make test-engines"
    log = file.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [PYTHON, str(SERVER), json.dumps({"model": str(file), **options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address.startswith("http"), log.read_text(errors="replace")[-2000:]
        try:
            yield Server(address, log)
        finally:
            process.communicate("")


@torch.inference_mode()
def eager(model: PreTrainedModel, ids: list[int], steps: int = STEPS) -> tuple[list[int], list[float]]:
    """Greedy tokens and their log probabilities, the end of a text ignored as the server is told to."""
    call: Any = model
    tokens, logprobs, cache, part = [], [], None, torch.tensor([ids])
    ends = model.generation_config.eos_token_id if model.generation_config is not None else None
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    for _ in range(steps):
        out = call(part, past_key_values=cache, use_cache=True)
        cache, found = out.past_key_values, out.logits[0, -1].float()
        shown = found.clone()
        shown[ends] = -torch.inf
        best = int(shown.argmax())
        tokens.append(best)
        logprobs.append(float(found.log_softmax(-1)[best]))
        part = torch.tensor([[best]])
    return tokens, logprobs


def check_same(server: Server, model: PreTrainedModel, ids: list[int], steps: int = STEPS) -> None:
    # The server adds up a whole vocabulary of probabilities in float32: off by 2e-4 for 49,152 tokens.
    tolerance = 1e-4 if model.config.vocab_size < 1000 else 1e-3
    compare(server.complete(ids, steps), eager(model, ids, steps), tolerance)


@torch.inference_mode()
def check_next(server: Server, model: PreTrainedModel, ids: list[int]) -> None:
    """Log probabilities of all tokens, normalised again."""
    call: Any = model
    expected = call(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)
    found = torch.full_like(expected, -torch.inf)
    options = {"temperature": 0, "n_probs": len(expected), "post_sampling_probs": False}
    answer = server.ask("/completion", prompt=ids, n_predict=1, **options)
    for token in answer["completion_probabilities"][0]["top_logprobs"]:
        found[token["id"]] = token["logprob"]
    assert float((found.log_softmax(-1) - expected).abs().max()) < 1e-4


def compare(
    found: tuple[list[int], list[tuple[int, float]]], expected: tuple[list[int], list[float]], tolerance: float = 1e-3
) -> None:
    assert found[0] == expected[0]
    left = list(zip(*expected, strict=True))
    assert found[1]
    # The server says nothing of tokens that end within a character; the others come in their order.
    for token, logprob in found[1]:
        while left and not (left[0][0] == token and abs(left[0][1] - logprob) < tolerance):
            del left[0]
        assert left, f"token {token} with {logprob}: none such is left of {expected}"
        del left[0]


@pytest.fixture(scope="module")
def source() -> Any:
    return load_source("smollm2", dtype="float32", device="cpu")


def compiled(source: Any, target: str, **options: Any) -> attnedit.CompileResult:
    quick = {"calibration": demo_text(), "calibration_tokens": 1024, "calibration_length": 512, "alternations": 0}
    return attnedit.compile(source.model, target, tokenizer=source.tokenizer, **quick, **options)


@pytest.fixture(scope="module")
def mla(source: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[attnedit.CompileResult, Path]:
    result = compiled(source, "mla", kv_budget=0.5, engine="llama.cpp")
    file = tmp_path_factory.mktemp("mla") / "model.gguf"
    export(result, file)
    return result, file


@pytest.fixture(scope="module")
def windows(source: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[attnedit.CompileResult, Path]:
    result = compiled(source, "gateswa", full_layers="every:4", gate="head", engine="llama.cpp")
    for name, parameter in result.model.named_parameters():
        if "g_proj" in name:  # a gate that does something
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    file = tmp_path_factory.mktemp("gateswa") / "model.gguf"
    export(result, file)
    return result, file


def test_latent_attention_is_served(mla: tuple[attnedit.CompileResult, Path]) -> None:
    result, file = mla
    tokenizer: Any = result.tokenizer
    with serving(file, n_ctx=2048, cache="F32") as server:
        for prompt in PROMPTS:
            ids = tokenizer(prompt)["input_ids"]
            assert server.ask("/tokenize", content=prompt, add_special=True)["tokens"] == ids
            check_same(server, result.model, ids)
            check_next(server, result.model, ids)
        cached = sum(site["kv_lora_rank"] + 2 * len(site["rope_columns"]) for site in _sites(result))
        assert server.cache_mib == pytest.approx(cached * 2048 * 4 / 2**20, rel=0.02)


def test_a_stop_and_a_restart_change_nothing(mla: tuple[attnedit.CompileResult, Path]) -> None:
    result, file = mla
    tokenizer: Any = result.tokenizer
    answers = []
    for _ in range(2):
        with serving(file, n_ctx=512, cache="F16") as server:
            answers.append(server.complete(tokenizer(PROMPTS[0])["input_ids"]))
            said = server.ask(
                "/v1/chat/completions",
                messages=[{"role": "user", "content": "What is the capital of France?"}],
                max_tokens=8,
                temperature=0,
            )
            assert said["object"] == "chat.completion"
            assert said["usage"]["completion_tokens"] >= 1
            assert isinstance(said["choices"][0]["message"]["content"], str)
    assert answers[0] == answers[1]


@pytest.mark.parametrize("form", [{"dtype": "float16"}, {"dtype": "bfloat16"}, {"quantize": "q8_0"}])
def test_other_forms_say_nearly_the_same(
    mla: tuple[attnedit.CompileResult, Path], form: dict[str, str], tmp_path: Path
) -> None:
    result, _ = mla
    tokenizer: Any = result.tokenizer
    export(result, tmp_path / "model.gguf", **form)
    ids = tokenizer(PROMPTS[0])["input_ids"]
    _, wanted = eager(result.model, ids, 1)
    with serving(tmp_path / "model.gguf", n_ctx=512, cache="F16") as server:
        _, found = server.complete(ids, 1)
    assert abs(found[0][1] - wanted[0]) < 0.3


def test_windows_are_served(windows: tuple[attnedit.CompileResult, Path]) -> None:
    result, file = windows
    tokenizer: Any = result.tokenizer
    long = tokenizer(demo_text()[0])["input_ids"][:400]
    with serving(file, n_ctx=2048, n_batch=256, cache="F32") as server:
        for prompt in PROMPTS:
            check_same(server, result.model, tokenizer(prompt)["input_ids"])
            check_next(server, result.model, tokenizer(prompt)["input_ids"])
        check_same(server, result.model, long)  # the window is 128 tokens
        check_next(server, result.model, long)
        full = sum("sliding_window" not in site for site in _sites(result)) + _untouched(result)
        slides = result.model.config.num_hidden_layers - full
        per_token = 2 * result.model.config.num_key_value_heads * 64
        cells = -(-(128 + 256) // 256) * 256  # a window and a batch, in whole blocks
        expected = per_token * 4 * (full * 2048 + slides * cells) / 2**20
        assert server.cache_mib == pytest.approx(expected, rel=0.02)


def test_two_at_once_say_what_each_says_alone(windows: tuple[attnedit.CompileResult, Path]) -> None:
    result, file = windows
    tokenizer: Any = result.tokenizer
    texts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS[:2]]
    found: dict[int, Any] = {}
    with serving(file, n_ctx=1024, n_parallel=2, cache="F32") as server:

        def ask(index: int) -> None:
            found[index] = server.complete(texts[index], 24)

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for index, ids in enumerate(texts):
        compare(found[index], eager(result.model, ids, 24))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"sinks": "logit"}),
        ("qwen2", {"sinks": "logit"}),
        ("qwen2", {}),
        ("qwen3", {"gate": "head"}),
        ("llama", {"gate": "head", "tie_word_embeddings": True}),
    ],
)
def test_sinks_biases_norms_and_gates_are_served(family: str, options: dict[str, Any], tmp_path: Path) -> None:
    model = sliding(family, hidden_size=64, head_dim=16, **options)
    export(with_tokenizer(model), tmp_path / "model.gguf")
    ids = torch.randint(3, VOCABULARY, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with serving(tmp_path / "model.gguf", n_ctx=128, cache="F32") as server:
        check_same(server, model, ids)
        check_same(server, model, ids[:3])


TEXTS = [
    "Hello world, it's 12345 o'clock -- isn't it?",
    "  two  spaces\tand\n\n\nlines \r\n end   ",
    "naïve café, Straße, Ελληνικά, русский, 日本語, 1٢３",
    "x=[i**2 for i in range(10)]; print(f'{x!r}')",
    "🙂 don't WE'LL they'Re I'D <bos> <|x|> 3.14159",
]


@pytest.mark.parametrize("rules", list(RULES))
def test_tokenizers_cut_text_alike(rules: str, tmp_path: Path) -> None:
    tokenizer = trained_tokenizer(rules)
    export(with_tokenizer(latent(vocab=len(tokenizer)), tokenizer), tmp_path / "model.gguf")
    with serving(tmp_path / "model.gguf", n_ctx=128) as server:
        for text in [*TEXTS, *(demo_text()[0][at : at + 300] for at in range(0, 30_000, 3_000))]:
            found = server.ask("/tokenize", content=text, add_special=True, parse_special=True)["tokens"]
            assert found == tokenizer(text)["input_ids"], text


def _sites(result: attnedit.CompileResult) -> list[dict[str, Any]]:
    record: Any = result.model.config
    return list(record.attnedit["sites"].values())


def _untouched(result: attnedit.CompileResult) -> int:
    return int(result.model.config.num_hidden_layers) - len(_sites(result))

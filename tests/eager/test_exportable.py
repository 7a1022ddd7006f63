"""transformers' exportable modules, as ExecuTorch lowers them: static caches made early, export, the live tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import build
from mixed_models import rewritten
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.integrations.executorch import (
    TorchExportableModuleForDecoderOnlyLM,
    TorchExportableModuleWithHybridCache,
    TorchExportableModuleWithStaticCache,
)

from attnedit.compiler.compatibility.caches import cache_parameter, with_cache
from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.eager import share_copy

LENGTH, CAPACITY = 9, 24  # the ring of three tokens wraps around more than once
PROMPT = torch.tensor([[5, 9, 17, 3, 44, 21, 8]])


def exportable(model: PreTrainedModel) -> Any:
    model = share_copy(model)
    model.generation_config.cache_implementation = "static"
    model.generation_config.eos_token_id = None
    return TorchExportableModuleForDecoderOnlyLM(model, batch_size=1, max_cache_len=CAPACITY)


def live(model: PreTrainedModel) -> list[int]:
    settings = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    generate: Any = model.generate
    return generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)[0].tolist()


def step(program: Any, ids: Tensor, start: int) -> Tensor:
    return program(input_ids=ids, cache_position=torch.arange(start, start + ids.shape[1]))


def decoded(prefill: Any, decode: Any) -> list[int]:
    """Greedy tokens from a program of the whole prompt and one of a token, with the former's buffers copied over."""
    logits = step(prefill, PROMPT, 0)
    theirs = dict(prefill.named_buffers())
    for name, buffer in decode.named_buffers():
        if "cache" in name or "length" in name:
            buffer.copy_(theirs[name])
    return continued(decode, logits)


def token_by_token(decode: Any) -> list[int]:
    """Greedy tokens, the prompt read a token at a time, as runners without a prefill program do."""
    for position in range(PROMPT.shape[1]):
        logits = step(decode, PROMPT[:, position : position + 1], position)
    return continued(decode, logits)


def continued(decode: Any, logits: Tensor) -> list[int]:
    tokens = PROMPT[0].tolist()
    while len(tokens) < PROMPT.shape[1] + LENGTH:
        tokens.append(int(logits[0, -1].argmax()))
        logits = step(decode, torch.tensor([tokens[-1:]]), len(tokens) - 1)
    return tokens


CASES = [
    *(("qwen3", target, True) for target in ("mla", "gateswa", "gateswa+mla", "gateswa+source")),
    *((family, target, False) for family in ("llama", "qwen3") for target in ("mla", "gateswa+mla", "mla+source")),
    ("gpt2", "gateswa", False),
    ("gemma3_text", "source+mla", False),
    ("gemma3_text", "source+gateswa", False),
    ("mistral", "mla", False),
]
"""Family, targets, and whether the tracer is the strict one. Sliding layers of a source stay as they are."""


@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")
@pytest.mark.parametrize(("family", "target", "strict"), CASES)
def test_exported_programs_give_the_live_tokens(family: str, target: str, strict: bool) -> None:
    model = rewritten(family, target)
    expected = live(model)
    with torch.no_grad():
        prefill, decode = (exportable(model).export(input_ids=ids, strict=strict) for ids in (PROMPT, PROMPT[:, :1]))
        assert decoded(prefill.module(), decode.module()) == expected
        program = decode.module()
        for _ in range(2):  # a second prompt begins in the same buffers
            assert token_by_token(program) == expected


def test_both_modules_take_rewritten_models() -> None:
    assert type(exportable(rewritten("llama", "mla")).model) is TorchExportableModuleWithStaticCache
    assert type(exportable(rewritten("gemma3_text", "source+mla")).model) is TorchExportableModuleWithHybridCache


def test_buffers_are_as_small_as_what_is_cached() -> None:
    """A latent of ten and three rotary pairs; a window of three and two kept sinks."""
    buffers = dict(exportable(rewritten("llama", "gateswa+mla")).model.named_buffers())
    assert buffers["key_cache_0"].shape == buffers["value_cache_0"].shape == (1, 2, 5, 8)
    assert buffers["key_cache_1"].shape == (1, 1, CAPACITY, 10)
    assert buffers["value_cache_1"].shape == (1, 1, CAPACITY, 6)


@pytest.mark.parametrize("target", ["mla", "gateswa", "gateswa+mla"])
def test_a_static_cache_may_be_made_early(target: str) -> None:
    model = rewritten("llama", target)
    cache = StaticCache(config=model.config, max_cache_len=CAPACITY)
    cache.early_initialization(1, 2, 8, torch.float32, model.device)
    settings: dict[str, Any] = {"max_new_tokens": LENGTH, "do_sample": False, "eos_token_id": None}
    settings |= {"disable_compile": True, str(cache_parameter(model)): cache}
    found = model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), **settings)
    assert found[0].tolist() == live(model)


def test_a_cache_made_early_for_the_source_is_refused() -> None:
    model = rewritten("llama", "mla")
    cache = StaticCache(config=build("llama").config, max_cache_len=CAPACITY)
    cache.early_initialization(1, 2, 8, torch.float32, model.device)
    with pytest.raises(UsageError, match="make it with the rewritten model's configuration"):
        model(PROMPT, **with_cache(model, cache))


def test_kept_sinks_under_a_window_of_the_source_are_refused() -> None:
    """What the source's mask hides says nothing of where a row begins, and exported programs remember no positions."""
    with pytest.raises(UsageError, match="does not keep the sink tokens"), torch.no_grad():
        exportable(rewritten("mistral", "gateswa")).export(input_ids=PROMPT, strict=False)

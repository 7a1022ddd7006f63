"""Prompts read in parts: the same tokens, and no mask of a long prompt in memory at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mixed_models import TARGETS, arguments, rewritten
from torch import nn

from attnedit.targets.runtime.eager import cache


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
@pytest.mark.parametrize("target", TARGETS)
def test_prompts_read_in_parts_give_the_same_tokens(target: str, implementation: str) -> None:
    model, options = rewritten("llama", target), {**arguments(padded=True), "disable_compile": True}
    options["cache_implementation"] = implementation
    whole = model.generate(**options)
    for part in (1, 3, 4):
        assert torch.equal(model.generate(**options, prefill_chunk_size=part), whole)


@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_masks_of_long_padded_prompts_stay_small(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = rewritten("llama", target), {**arguments(padded=True), "disable_compile": True}
    whole = model.generate(**options)
    length = options["input_ids"].shape[1]
    monkeypatch.setattr(cache, "LARGE_MASK", 3 * length)
    seen: list[int] = []

    def look(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        mask = given.get("attention_mask")
        seen.append(0 if mask is None else mask.shape[-2] * mask.shape[-1])

    handle = model.model.layers[0].self_attn.register_forward_pre_hook(look, with_kwargs=True)
    try:
        assert torch.equal(model.generate(**options), whole)
    finally:
        handle.remove()
    assert 0 < max(seen) <= 3 * length


def test_prompts_without_padding_are_read_at_once() -> None:
    assert cache._part_of_prompt(torch.ones(2, 40_000)) is None
    assert cache._part_of_prompt(None) is None
    padded = torch.ones(2, 32_768)
    padded[0, :5] = 0
    assert cache._part_of_prompt(padded) == 2048
    assert cache._part_of_prompt(padded[:, :8192]) is None

"""Continuous batching: the tokens of `generate`, from transformers' paged cache."""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import tokens
from families import build
from same_rewrite import Same
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, PreTrainedModel

import attnedit
from attnedit.compiler.compatibility.caches import known_cache
from attnedit.compiler.compatibility.paged import PagedLayers, is_paged, pages_by_index
from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.hf.remote import load_code

pytestmark = pytest.mark.skipif(not pages_by_index(), reason="this transformers makes its pages in another way")

TARGETS: dict[str, dict[str, Any]] = {
    "mla": {},
    "gateswa": {"window": 3},
    "gateswa, one full layer": {"window": 3, "full_layers": 1},
    "gateswa, no kept sinks": {"window": 3, "sinks": "logit,value", "gate": "head"},
    "gateswa+mla": {"window": 3},
}
GREEDY = GenerationConfig(max_new_tokens=9, do_sample=False, eos_token_id=-1, pad_token_id=0)
LENGTHS = (3, 17, 1, 26)
"""Of the prompts: shorter and longer than a window, than a page, and than what is read at a time."""


@pytest.fixture(autouse=True)
def _what_is_there_stays() -> Iterator[None]:
    """`generate_batch` collects garbage again and again, which takes seconds in a process that holds much."""
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def rewritten(family: str, target: str) -> PreTrainedModel:
    return attnedit.compile(
        build(family), target.partition(",")[0], calibration=tokens(4, 32), verify=False, **TARGETS[target]
    ).model


def batched(model: PreTrainedModel, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """New tokens of each prompt from continuous batching, in pages of 4 tokens."""
    config = ContinuousBatchingConfig(**{"num_blocks": 64, "page_size": 4, "max_batch_tokens": 64, **options})
    found = model.generate_batch(prompts, generation_config=GREEDY, continuous_batching_config=config)
    assert [output.error for output in found.values()] == [None] * len(prompts)
    return [output.generated_tokens for output in found.values()]


def one_by_one(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """New tokens of each prompt from `generate`."""
    return [
        model.generate(torch.tensor([prompt]), generation_config=GREEDY)[0, len(prompt) :].tolist()
        for prompt in prompts
    ]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_continuous_batching_gives_the_tokens_of_generate(family: str, target: str) -> None:
    """Requests of different lengths join and leave the batch, and prompts are read in parts of 8 tokens too."""
    model = rewritten(family, target)
    prompts = [tokens(1, length)[0].tolist() for length in LENGTHS]
    expected = one_by_one(model, prompts)
    assert len({tuple(new) for new in expected}) == len(LENGTHS)
    assert batched(model, prompts) == expected
    assert batched(model, prompts, max_batch_tokens=8) == expected


@pytest.mark.parametrize(
    ("family", "target"),
    [
        ("mistral", "mla"),
        ("mistral", "gateswa, no kept sinks"),
        ("gemma3_text", "gateswa+mla"),
        ("gpt_oss", "gateswa"),
    ],
)
def test_continuous_batching_with_windows_and_sinks_of_the_source(family: str, target: str) -> None:
    model = rewritten(family, target)
    prompts = [tokens(1, length)[0].tolist() for length in LENGTHS]
    assert batched(model, prompts, max_batch_tokens=8) == one_by_one(model, prompts)


def test_continuous_batching_with_eager_attention_in_the_other_layers() -> None:
    model = rewritten("llama", "gateswa, one full layer")
    prompts = [tokens(1, length)[0].tolist() for length in LENGTHS]
    try:
        model.set_attn_implementation("eager")
        assert batched(model, prompts) == one_by_one(model, prompts)
    finally:
        model.set_attn_implementation("sdpa")


def test_continuous_batching_shares_pages_of_a_common_prefix() -> None:
    model = rewritten("llama", "mla")
    start = tokens(1, 12)[0].tolist()
    prompts = [[*start, token] for token in (5, 6, 7)]
    config = ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=64, max_requests_per_batch=1)
    found = model.generate_batch(prompts, generation_config=GREEDY, continuous_batching_config=config)
    assert [output.generated_tokens for output in found.values()] == one_by_one(model, prompts)


def test_pages_are_as_large_as_latents() -> None:
    source, model = build("llama"), rewritten("llama", "mla")
    sizes = []
    for each in (source, model):
        options = ContinuousBatchingConfig(num_blocks=8, page_size=4, max_batch_tokens=16)
        manager = each.init_continuous_batching(GREEDY, options)
        manager.warmup()
        (group,) = manager.batch_processor.cache.cache_allocators.values()
        sizes.append(group.bytes_per_page)
        assert manager.model is each
    own = max(site["kv_lora_rank"] + 2 * len(site["rope_columns"]) for site in model.config.attnedit["sites"].values())
    assert sizes == [4 * 4 * 2 * 2 * 8, 4 * 4 * (own + own % 2)]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_a_checkpoint_with_code_of_its_own_batches_too(target: str, tmp_path: Path) -> None:
    result = attnedit.compile(build("llama"), target, calibration=tokens(4, 32), **TARGETS[target])
    result.export("hf", tmp_path / "out", profile="remote")
    model = load_code(tmp_path / "out")
    assert type(model).__module__.startswith("attnedit_remote_")
    prompts = [tokens(1, length)[0].tolist() for length in LENGTHS]
    assert batched(model, prompts, max_batch_tokens=8) == one_by_one(result.model, prompts)


def test_generate_with_a_paged_cache_is_continuous_batching() -> None:
    model = rewritten("llama", "mla")
    ids = tokens(1, 7)
    options = ContinuousBatchingConfig(num_blocks=64, page_size=4, max_batch_tokens=64)
    found = model.generate(
        ids, generation_config=GREEDY, cache_implementation="paged", continuous_batching_config=options
    )
    assert found[0, 0, 7:].tolist() == one_by_one(model, ids.tolist())[0]


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3_next", {"target": "mla"}, "layers of linear_attention"),
        ("gemma2", {"target": "gateswa", "window": 4}, "would lose its softcap"),
        ("mistral", {"target": "gateswa", "window": 3, "full_layers": 1}, "others kept sinks outside it"),
        ("falcon", {"target": "mla"}, "does not pass a paged cache on to its layers"),
        ("llama", {"rewrites": True}, "a rewrite of your own may cache anything"),
    ],
)
def test_continuous_batching_is_refused_before_a_token(family: str, options: dict[str, Any], reason: str) -> None:
    source = build(family)
    if "rewrites" in options:
        result = attnedit.rewrite(source, [Same()], verify=False)
    else:
        result = attnedit.compile(source, calibration=tokens(4, 32), verify=False, **options)
    with pytest.raises(UsageError, match=f"generate_batch.*{reason}.*use generate"):
        result.model.generate_batch([[3, 4]], generation_config=GREEDY)
    with pytest.raises(UsageError, match=reason), result.model.continuous_batching_context_manager(GREEDY):
        pass


class Group:
    """What is read of an allocator of pages: two requests, of 3 and 2 tokens, of which 1 and 2 are new."""

    index, num_key_value_heads, head_dim, cache_dtype = 0, 1, 2, torch.float32
    layer_type = "full_attention"


def pages(group: Any) -> PagedLayers:
    cache = type("Cache", (), {"layer_to_allocator": {0: group}})()
    starts = {"cu_seq_lens_q": torch.tensor([0, 1, 3]), "cu_seq_lens_k": {group.layer_type: torch.tensor([0, 3, 5])}}
    return PagedLayers(cache, {**starts, "read_index": [torch.arange(5)], "write_index": [torch.arange(3)]})


def test_each_request_sees_its_own_tokens() -> None:
    seen = pages(Group()).visible(0)[0, 0].int().tolist()
    assert seen == [[1, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 1, 1]]
    assert pages(Group()).visible(0, window=1)[0, 0].int().tolist()[0] == [0, 0, 1, 0, 0]
    assert pages(Group()).visible(0, window=1, sink_tokens=1)[0, 0].int().tolist() == [
        [1, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 1, 1],
    ]


def test_what_pages_do_not_hold_is_refused() -> None:
    class Ring(Group):
        layer_type, sliding_window = "sliding_attention", 4

    for given in ({"window": 5}, {"window": 4, "sink_tokens": 1}, {}):
        with pytest.raises(UsageError, match="layer 0 needs tokens that a paged cache of the last 4 drops"):
            pages(Ring()).visible(0, **given)
    wide = torch.zeros(1, 1, 3, 3)
    with pytest.raises(UsageError, match="layer 0 caches 6 values per token, and a page has room for 4"):
        pages(Group()).update(wide, wide, 0)


def test_pages_beside_another_cache_are_refused() -> None:
    manager = build("llama").init_continuous_batching(GREEDY, ContinuousBatchingConfig(num_blocks=8, page_size=4))
    manager.continuous_batching_config.max_batch_tokens = 16
    manager.warmup()
    paged = manager.batch_processor.cache
    assert is_paged(paged)
    with pytest.raises(UsageError, match="was given a PagedAttentionCache as its cache"):
        known_cache(paged)  # without places to read
    assert isinstance(known_cache(None, {"cache": paged, "read_index": []}), PagedLayers)
    with pytest.raises(UsageError, match="a DynamicCache as past_key_values"):
        known_cache(None, {"cache": paged, "read_index": [], "past_key_values": DynamicCache()})

"""Gated sliding-window attention in live transformers models: every family, caches, generation, files, memory."""

import copy
from itertools import pairwise

import pytest
import torch
from families import SUPPORTED, build, shared
from gateswa_models import (
    FEW,
    OPTIONS,
    WINDOW,
    assert_close,
    batch,
    eager_source,
    in_pieces,
    masked_logits,
    positions,
    rewrite,
    shared_rewrite,
    sites,
)
from transformers import DynamicCache, StaticCache, set_seed

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention import GateSWA
from attnedit.targets.attention.gateswa.cache import GateSWALayer
from attnedit.targets.attention.gateswa.graph import doubled, gateswa_config, gateswa_graph
from attnedit.targets.runtime.eager import bounded_cache, share_copy, splice, to_attnedit

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("which", ["all", "first", "last"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_cached_equals_masked(family: str, which: str, implementation: str) -> None:
    """Prefill beyond the window, chunks, single tokens; other layers of the model are as they were."""
    model = copy.deepcopy(shared_rewrite(family, which))
    if implementation == "sdpa" and not model._supports_sdpa:
        pytest.skip("the source does not support it")
    model.set_attn_implementation(implementation)
    inputs = batch()
    mask = inputs["attention_mask"]
    expected = masked_logits(model, inputs["input_ids"], mask)
    at_once = model(**inputs, position_ids=positions(mask), use_cache=False).logits
    assert_close(at_once, expected, mask)
    # Linear attention reads padding off masks only, and a single token's shows nothing.
    first = 6 if "linear_attention" in (getattr(model.config, "layer_types", None) or ()) else 1
    for sizes in ([first] + [1] * (13 - first), [9, 1, 1, 1, 1], [2, 5, 1, 4, 1]):
        cache = DynamicCache(config=model.config)
        assert_close(in_pieces(model, inputs, sizes, cache), expected, mask)
        modules = [m for m in model.modules() if isinstance(m, GateSWA)]
        assert [type(cache.layers[m.config.layer_idx]) for m in modules] == [GateSWALayer] * len(modules)
        for module in modules:
            assert cache.layers[module.config.layer_idx].keys.shape[2] == WINDOW - 1


# Linear attention and ALiBi take no mask of four dimensions.
@pytest.mark.parametrize("family", [n for n in SUPPORTED if n not in ("qwen3_next", "bloom", "falcon_alibi")])
def test_same_as_the_source_under_a_window_mask(family: str) -> None:
    """The source itself, given a mask with window and sinks, is the reference."""
    model, inputs = rewrite(family, sink_tokens=2), batch()
    real = inputs["attention_mask"].bool()
    behind = torch.arange(13)[:, None] - torch.arange(13)
    kept = real & (real.cumsum(1) <= 2)
    mask = (behind >= 0) & real[:, None] & ((behind < WINDOW) | kept[:, None])
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)[:, None]
    arguments = {"input_ids": inputs["input_ids"], "position_ids": positions(inputs["attention_mask"])}
    expected = eager_source(family)(**arguments, attention_mask=additive, use_cache=False).logits
    out = model(**arguments, attention_mask=inputs["attention_mask"], use_cache=False).logits
    assert_close(out, expected, inputs["attention_mask"])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "mistral", "phi"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_are_as_they_are_alone(family: str, implementation: str) -> None:
    """Position ids that restart, as training without padding gives them."""
    model = copy.deepcopy(rewrite(family, sink_tokens=2))
    if implementation == "sdpa" and not model._supports_sdpa:
        implementation = "eager"
    model.set_attn_implementation(implementation)
    ids = torch.arange(40).remainder(50)[None] + 3
    edges = [0, 11, 12, 27, 40]
    parts = [ids[:, a:b] for a, b in pairwise(edges)]
    packed = torch.cat([torch.arange(part.shape[1]) for part in parts])[None]
    found = model(ids, position_ids=packed, use_cache=False).logits
    expected = torch.cat([model(part, use_cache=False).logits for part in parts], 1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_masks_of_later_sliding_layers() -> None:
    """A rewritten layer in front of one that slides by itself is not what that one's mask is sized by."""
    source = build("gemma3_text", layer_types=["full_attention", "sliding_attention"])
    student, site = share_copy(source), capture(source)[0]
    config = gateswa_config(site, WINDOW, **OPTIONS)
    splice(student, {site.name: gateswa_graph(student, site, config)})
    model, inputs = to_attnedit(student, {site.name: config}), batch()
    expected = masked_logits(model, inputs["input_ids"], inputs["attention_mask"])
    out = in_pieces(model, inputs, [8, 1, 3, 1], DynamicCache(config=model.config))
    assert_close(out, expected, inputs["attention_mask"])


@pytest.mark.parametrize("family", SUPPORTED)
@pytest.mark.parametrize("gate", ["head", "element"])
def test_wide_window_and_zero_gate_equal_the_source(family: str, gate: str) -> None:
    """The gate's start changes nothing, with the output projection's weight doubled."""
    student = share_copy(shared(family))
    graphs, configs = {}, {}
    for site in sites(family):
        projection = doubled(student.get_submodule(site.name).get_submodule(site.o_proj.module))
        configs[site.name] = gateswa_config(site, site.window or 64, gate=gate)
        graphs[site.name] = gateswa_graph(student, site, configs[site.name], projection)
    before = {name: tensor.clone() for name, tensor in shared(family).state_dict().items()}
    splice(student, graphs)
    student = to_attnedit(student, configs)
    inputs = batch()
    assert_close(student(**inputs).logits, eager_source(family)(**inputs).logits, inputs["attention_mask"])
    cached = in_pieces(student, inputs, [6, 1, 5, 1], DynamicCache(config=student.config))
    expected = eager_source(family)(**inputs, position_ids=positions(inputs["attention_mask"])).logits
    assert_close(cached, expected, inputs["attention_mask"])
    after = shared(family).state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", FEW)
@pytest.mark.parametrize("which", ["all", "first", "last"])
@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"do_sample": False, "num_beams": 3}],
    ids=["greedy", "sampling", "beam"],
)
def test_generation_with_cache_equals_without(family: str, which: str, how: dict[str, object]) -> None:
    model = shared_rewrite(family, which)
    tokens = []
    for use_cache in (True, False):
        set_seed(4)
        arguments = {**batch(), "max_new_tokens": 9, "eos_token_id": None, **how}
        tokens.append(model.generate(use_cache=use_cache, **arguments).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("family", FEW)
def test_left_padding_changes_nothing(family: str) -> None:
    model, inputs = shared_rewrite(family), batch()
    arguments = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    together = model.generate(**inputs, **arguments)[:, 13:].tolist()
    alone = [model.generate(inputs["input_ids"][0:1, 5:], **arguments)[0, 8:].tolist()]
    alone.append(model.generate(inputs["input_ids"][1:2], **arguments)[0, 13:].tolist())
    assert together == alone


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mistral"])
@pytest.mark.parametrize("which", ["all", "first", "last"])
def test_assisted_generation_takes_back_tokens(family: str, which: str) -> None:
    model = shared_rewrite(family, which)
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 14, "do_sample": False, "eos_token_id": None}
    assistant = rewrite(family, which, window=2, sink_tokens=1)
    expected = model.generate(ids, **arguments).tolist()
    assert model.generate(ids, **arguments, prompt_lookup_num_tokens=3).tolist() == expected
    assert model.generate(ids, **arguments, assistant_model=assistant).tolist() == expected


def test_taking_back_tokens_by_hand() -> None:
    model, ids = shared_rewrite("llama"), batch()["input_ids"][1:]
    expected = model(ids, use_cache=False).logits[:, -4:]
    cache = bounded_cache(model)
    cache.activate_past_recording()
    model(ids[:, :9], **with_cache(model, cache))
    model(ids[:, :3], **with_cache(model, cache))
    cache.crop(-3)
    assert_close(model(ids[:, 9:], **with_cache(model, cache)).logits, expected)
    cache = DynamicCache(config=model.config)
    model(ids, **with_cache(model, cache))
    with pytest.raises(UsageError, match="activate_past_recording"):
        cache.crop(-1)


def test_recording_is_a_whole_caches() -> None:
    """The source's own sliding layer remembers that recording is on; the new one asks it."""
    model, ids = shared_rewrite("gemma3_text", "last"), batch()["input_ids"][1:]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :9], **with_cache(model, cache))
    cache.crop(-2)
    out = model(ids[:, 7:], **with_cache(model, cache)).logits
    assert_close(out, model(ids, use_cache=False).logits[:, 7:])


# Linear layers need the configuration.
@pytest.mark.parametrize("family", [name for name in FEW if name != "qwen3_next"])
def test_other_caches_are_masked(family: str) -> None:
    """Static caches get a ring or keep every token; without a configuration dynamic ones are bounded all the same."""
    model = rewrite(family, sink_tokens=0, gate="head", sink_logit=True, sink_value=True)
    inputs = batch()
    expected = masked_logits(model, inputs["input_ids"], inputs["attention_mask"])
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=15)):
        out = in_pieces(model, inputs, [7, 1, 4, 1], cache)
        assert_close(out, expected, inputs["attention_mask"])


def test_static_caches_and_kept_sinks() -> None:
    """Right in a ring, refused where the cache's own window drops the sinks."""
    inputs = batch()
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model = shared_rewrite("llama")
    expected = model.generate(**arguments).tolist()
    assert model.generate(**arguments, cache_implementation="static", disable_compile=True).tolist() == expected
    model = shared_rewrite("mistral")
    with pytest.raises(UsageError, match="use a DynamicCache"):
        model.generate(**arguments, cache_implementation="static", disable_compile=True)

"""Latent attention in live transformers models: exactness, caches, generation."""

import pytest
import torch
from eager_models import FAMILIES, SIZES, assert_close, batch, exact_config, fill_exact, rewrite, shared_rewrite, source
from transformers import (
    DynamicCache,
    StaticCache,
    set_seed,
)

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.targets.attention import MLA, MLAConfig, mla_values
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_equals_the_source(family: str) -> None:
    model, sites = source(family)
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    student, _ = rewrite(family, exact=True)
    inputs = batch()
    expected = model(**inputs).logits
    assert_close(student(**inputs).logits, expected, inputs["attention_mask"])
    assert_close(student(inputs["input_ids"]).logits, model(inputs["input_ids"]).logits)
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False}
    assert student.generate(**arguments).tolist() == model.generate(**arguments).tolist()

    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], kept) for name, (_, kept) in before.items())
    mine = student.state_dict()
    inside = tuple(f"{site.name}.mla." for site in sites)
    assert all(mine[name].data_ptr() == before[name][0] for name in mine if not name.startswith(inside))
    assert type(model).__name__ == type(student).__name__.removeprefix("Attnedit")
    assert isinstance(student, type(model))
    assert model.config.model_type != student.config.model_type == "attnedit"


@pytest.mark.parametrize("family", ["llama", "phi"])
def test_folded_reads_the_hidden_states(family: str) -> None:
    """Key and value projections disappear into the down-projection."""
    model, sites = source(family)
    student = share_copy(model)
    graphs = {}
    for site in sites:
        unfolded = MLA(exact_config(site))
        fill_exact(unfolded, model, site)
        config = MLAConfig(
            **{**exact_config(site).to_dict(), "folded": True, "kv_bias": True, "input_size": SIZES["hidden_size"]}
        )
        graphs[site.name] = mla_graph(student, site, config)
        mla = graphs[site.name].get_submodule("mla")
        attention = model.get_submodule(site.name)
        stacked = torch.cat([attention.k_proj.weight, attention.v_proj.weight])
        down = unfolded.kv_a_proj_with_mqa.weight
        mla.kv_a_proj_with_mqa.weight.copy_(down @ stacked)
        biases = [
            torch.zeros(p.out_features) if p.bias is None else p.bias for p in (attention.k_proj, attention.v_proj)
        ]
        mla.kv_a_proj_with_mqa.bias.copy_(down @ torch.cat(biases))
        mla.kv_b_proj.weight.copy_(unfolded.kv_b_proj.weight)
        mla.q_rope_proj.copy_(unfolded.q_rope_proj)
    splice(student, graphs)
    inputs = batch()
    assert_close(student(**inputs).logits, model(**inputs).logits, inputs["attention_mask"])
    names = set(student.state_dict())
    assert not any("k_proj" in name or "v_proj" in name for name in names)
    assert any("q_proj" in name for name in names)


@pytest.mark.parametrize("family", FAMILIES)
def test_cache_holds_latent_and_slots_only(family: str) -> None:
    model, configs = rewrite(family)
    inputs = batch()
    cache = DynamicCache(config=model.config)
    model(**inputs, **with_cache(model, cache))
    length = inputs["input_ids"].shape[1]
    for config in configs.values():
        layer = cache.layers[config.layer_idx]
        assert layer.keys.shape == (2, 1, length, config.kv_lora_rank)
        assert layer.values.shape == (2, 1, length, config.qk_rope_head_dim)
        assert layer.keys.numel() + layer.values.numel() == 2 * length * mla_values(config)
    rewritten = {config.layer_idx for config in configs.values()}
    for index, layer in enumerate(cache.layers):
        if index not in rewritten:
            assert layer.keys.shape[1] == SIZES["num_key_value_heads"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [[1] * 11, [4, 3, 4], [10, 1], [9, 2]])
def test_prefill_equals_decoding_in_pieces(family: str, sizes: list[int]) -> None:
    model = shared_rewrite(family)
    inputs = batch()
    cache = DynamicCache(config=model.config)
    parts, seen = [], 0
    for size in sizes:
        span = slice(seen, seen + size)
        seen += size
        mask = inputs["attention_mask"][:, :seen]
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)[:, span]
        out = model(
            inputs["input_ids"][:, span], attention_mask=mask, position_ids=positions, **with_cache(model, cache)
        )
        parts.append(out.logits)
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    expected = model(**inputs, position_ids=positions, use_cache=False).logits
    assert_close(torch.cat(parts, 1), expected, inputs["attention_mask"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": False},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "num_beams": 3},
    ],
    ids=["greedy", "sampling", "beam"],
)
def test_generation_with_cache_equals_without(family: str, how: dict[str, object]) -> None:
    model = shared_rewrite(family)
    tokens = []
    for use_cache in (True, False):
        set_seed(4)
        tokens.append(model.generate(**batch(), max_new_tokens=6, use_cache=use_cache, **how).tolist())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_left_padding_changes_nothing(family: str) -> None:
    model = shared_rewrite(family)
    inputs = batch()
    arguments = {"max_new_tokens": 6, "do_sample": False}
    together = model.generate(**inputs, **arguments)[:, 11:].tolist()
    alone = [model.generate(inputs["input_ids"][0:1, 4:], **arguments)[0, 7:].tolist()]
    alone.append(model.generate(inputs["input_ids"][1:2], **arguments)[0, 11:].tolist())
    assert together == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_static_cache(family: str) -> None:
    model = shared_rewrite(family)
    arguments = {**batch(), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(**arguments).tolist()
    assert model.generate(**arguments, cache_implementation="static", disable_compile=True).tolist() == expected
    cache = StaticCache(config=model.config, max_cache_len=20)
    ids = batch()["input_ids"]
    full = model(ids, use_cache=False).logits
    first = model(ids[:, :8], **with_cache(model, cache)).logits
    mask = torch.ones(2, 11, dtype=torch.long)
    rest = model(ids[:, 8:], attention_mask=mask, **with_cache(model, cache)).logits
    assert_close(torch.cat((first, rest), 1), full)


def test_prompt_lookup_decoding() -> None:
    model = shared_rewrite("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **arguments).tolist()
    assert model.generate(ids, **arguments, prompt_lookup_num_tokens=3).tolist() == expected

"""Latent attention in live transformers models: exactness, caches, generation, copies, training."""

import copy
import functools
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    StaticCache,
    set_seed,
)

from attnedit.compiler.capture import capture
from attnedit.compiler.errors import UsageError
from attnedit.compiler.sites import AttentionSite
from attnedit.targets.attention import MLA, MLAConfig, mla_values
from attnedit.targets.attention.mla_graph import mla_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

torch.set_num_threads(1)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, head_dim=12),
    "gemma3": lambda: Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=6,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "gpt_oss": lambda: GptOssConfig(
        **SIZES,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "phi": lambda: PhiConfig(**SIZES),
}


@functools.cache
def source(family: str) -> tuple[PreTrainedModel, tuple[AttentionSite, ...]]:
    """The source model and its full-attention sites; nobody may change it."""
    set_seed(1)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]()).eval()
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith(("bias", "sinks")):
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model, tuple(site for site in capture(model) if site.window is None)


def exact_shape(site: AttentionSite) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """Rotary pairs, their columns, and the dims that pass rope by."""
    pairs = list(site.rope.pairs) if site.rope else []
    turned = set(itertools.chain.from_iterable(pairs))
    return pairs, list(site.rope.columns) if site.rope else [], [i for i in range(site.head_dim) if i not in turned]


def exact_config(site: AttentionSite) -> MLAConfig:
    _, columns, rest = exact_shape(site)
    groups = site.num_key_value_heads
    return MLAConfig(
        layer_idx=site.layer_idx,
        num_attention_heads=site.num_attention_heads,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        kv_lora_rank=groups * (site.v_head_dim + len(rest)),
        rope_columns=tuple(columns * groups),
        qk_nope_head_dim=site.head_dim if rest else 0,
        input_size=groups * (site.head_dim + site.v_head_dim),
        scale=site.scale,
        softcap=site.softcap,
        sinks=site.sinks is not None,
    )


@torch.no_grad()
def fill_exact(mla: MLA, model: nn.Module, site: AttentionSite) -> None:
    """Every rotary component its own slot; the latent is the values and what has no rotation."""
    pairs, _, rest = exact_shape(site)
    groups, d, dv = site.num_key_value_heads, site.head_dim, site.v_head_dim
    per_group = site.num_attention_heads // groups
    config, rank, slots = mla.config, mla.config.kv_lora_rank, mla.config.num_slots
    down, up, rope = mla.kv_a_proj_with_mqa.weight.zero_(), mla.kv_b_proj.weight.zero_(), mla.q_rope_proj.zero_()
    up = up.view(site.num_attention_heads, config.qk_nope_head_dim + dv, rank)
    for g in range(groups):
        down[g * dv : (g + 1) * dv, groups * d + g * dv : groups * d + (g + 1) * dv] = torch.eye(dv)
        for h in range(g * per_group, (g + 1) * per_group):
            up[h, config.qk_nope_head_dim :, g * dv : (g + 1) * dv] = torch.eye(dv)
        for i, dim in enumerate(rest):
            row = groups * dv + g * len(rest) + i
            down[row, g * d + dim] = 1
            up[g * per_group : (g + 1) * per_group, dim, row] = 1
        for i, (real, imaginary) in enumerate(pairs):
            slot = g * len(pairs) + i
            down[rank + slot, g * d + real] = down[rank + slots + slot, g * d + imaginary] = 1
            rope[g * per_group : (g + 1) * per_group, slot, real] = 1
            rope[g * per_group : (g + 1) * per_group, slots + slot, imaginary] = 1
    if mla.sinks is not None:
        mla.sinks.copy_(model.get_parameter(f"{site.name}.{site.sinks}"))


def random_config(site: AttentionSite, folded: bool = False) -> MLAConfig:
    values = exact_config(site).to_dict()
    return MLAConfig(
        **{
            **values,
            "kv_lora_rank": 10,
            "rope_columns": site.rope.columns[::2],
            "qk_nope_head_dim": site.head_dim,
            "folded": folded,
            "kv_bias": folded,
            "input_size": SIZES["hidden_size"] if folded else values["input_size"],
        }
    )


def rewrite(family: str, exact: bool = False, folded: bool = False) -> tuple[PreTrainedModel, dict[str, MLAConfig]]:
    model, sites = source(family)
    student = share_copy(model)
    configs = {site.name: exact_config(site) if exact else random_config(site, folded) for site in sites}
    graphs = {site.name: mla_graph(student, site, configs[site.name]) for site in sites}
    torch.manual_seed(2)
    for site in sites:
        mla = graphs[site.name].get_submodule("mla")
        if exact:
            fill_exact(mla, model, site)
        else:
            for parameter in mla.parameters():
                nn.init.normal_(parameter, std=0.3)
    splice(student, graphs)
    return to_attnedit(student, configs), configs


@functools.cache
def shared_rewrite(family: str) -> PreTrainedModel:
    """A rewritten model with random latent attention for tests that only read it."""
    return rewrite(family)[0]


def batch() -> dict[str, Tensor]:
    """Two sequences, the first with left padding."""
    ids = torch.randint(3, 64, (2, 11), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :4], mask[0, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def assert_close(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Within 1e-4 of the largest logit, where ``mask`` is set."""
    if mask is not None:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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
    model(**inputs, past_key_values=cache)
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
        out = model(inputs["input_ids"][:, span], attention_mask=mask, position_ids=positions, past_key_values=cache)
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
    first = model(ids[:, :8], past_key_values=cache).logits
    mask = torch.ones(2, 11, dtype=torch.long)
    rest = model(ids[:, 8:], attention_mask=mask, past_key_values=cache).logits
    assert_close(torch.cat((first, rest), 1), full)


def test_prompt_lookup_decoding() -> None:
    model = shared_rewrite("llama")
    ids = torch.tensor([[5, 6, 7, 8, 5, 6, 7, 8, 5, 6]])
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **arguments).tolist()
    assert model.generate(ids, **arguments, prompt_lookup_num_tokens=3).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_graphs_are_clean(family: str) -> None:
    _, sites = source(family)
    model = shared_rewrite(family)
    for site in sites:
        graph = model.get_submodule(site.name)
        graph.graph.lint()
        targets = [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]
        assert targets.count("mla") == 1
        assert not any("attnedit.attention" in target for target in targets)
        call = next(node for node in graph.graph.nodes if node.target == "mla")
        assert call.meta["from_node"][0].name == site.anchor
        assert call.args[0].name == site.query
        used = {str(node.target).split(".")[0] for node in graph.graph.nodes if node.op in ("call_module", "get_attr")}
        assert {name for name, _ in graph.named_children()} <= used
        assert graph.layer_idx == site.layer_idx


@pytest.mark.parametrize("family", FAMILIES)
def test_deepcopy_and_pickle(family: str) -> None:
    model = shared_rewrite(family)
    inputs = batch()
    expected = model(**inputs).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert type(other.config) is type(model.config)
        assert torch.equal(other(**inputs).logits, expected)
        assert other.state_dict().keys() == model.state_dict().keys()


@torch.enable_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_with_and_without_checkpointing(family: str) -> None:
    model, _ = rewrite(family)
    model.train()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    fresh = {name: p for name, p in model.named_parameters() if ".mla." in name}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # renamed in transformers 5.23
                model.gradient_checkpointing_enable()
        loss = model(**inputs, labels=labels, use_cache=False).loss
        gradients.append(torch.autograd.grad(loss, list(fresh.values())))
    for name, plain, recomputed in zip(fresh, *gradients, strict=True):
        assert plain.abs().sum() > 0, name
        torch.testing.assert_close(plain, recomputed)


def test_identical_output_projection_can_be_replaced_by_a_fresh_one_only() -> None:
    model, sites = source("llama")
    student = share_copy(model)
    site = sites[0]
    fresh = nn.Linear(32, 32, bias=False)
    graph = mla_graph(student, site, random_config(site), output_projection=fresh)
    assert graph.get_submodule("o_proj") is fresh
    assert student.get_submodule(site.name).o_proj is not fresh
    with pytest.raises(UsageError, match="o_proj"):
        mla_graph(student, site, random_config(site), output_projection=nn.Linear(32, 32))


def test_configurations_that_do_not_fit_are_refused() -> None:
    model, sites = source("llama")
    values = random_config(sites[0]).to_dict()
    for change in ({"num_attention_heads": 2}, {"input_size": 7}, {"layer_idx": 1}):
        with pytest.raises(UsageError, match="configuration has"):
            mla_graph(model, sites[0], MLAConfig(**{**values, **change}))
    qwen3, normed = source("qwen3")
    with pytest.raises(UsageError, match="cannot be folded"):
        mla_graph(qwen3, normed[0], random_config(normed[0], folded=True))
    with pytest.raises(UsageError, match="no module"):
        splice(share_copy(model), {"model.layers.7.self_attn": shared_rewrite("llama").get_submodule(sites[0].name)})
    with pytest.raises(UsageError, match="no latent attention"):
        to_attnedit(share_copy(model), {sites[0].name: random_config(sites[0])})


def test_class_is_the_sources() -> None:
    model = shared_rewrite("llama")
    assert isinstance(model, LlamaForCausalLM)
    assert isinstance(model.config, LlamaConfig)
    assert type(model).__name__ == "AttneditLlamaForCausalLM"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.config.to_dict()["model_type"] == "attnedit"

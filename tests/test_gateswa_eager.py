"""Gated sliding-window attention in live transformers models: every family, caches, generation, files, memory."""

import copy
import dataclasses
import functools
import json
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import SUPPORTED, build, shared
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache, set_seed

from attnedit.compiler.capture import capture, capture_model
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluate import kv_usage
from attnedit.compiler.sites import AttentionSite
from attnedit.targets.attention import GateSWA, GateSWAConfig, MLAConfig
from attnedit.targets.attention.gateswa_cache import GateSWALayer
from attnedit.targets.attention.gateswa_graph import doubled, gateswa_config, gateswa_graph
from attnedit.targets.attention.mla_graph import mla_graph
from attnedit.targets.runtime.eager import bounded_cache, load_model, save, share_copy, splice, to_attnedit

torch.set_num_threads(1)
WINDOW = 3  # below every window of the families
OPTIONS = {"gate": "head", "gate_bias": True, "sink_logit": True, "sink_value": True, "sink_tokens": 2}
FEW = ["llama", "mistral", "gemma3_text", "gpt_oss", "phi", "qwen3_next"]


@functools.cache
def sites(family: str) -> tuple[AttentionSite, ...]:
    return tuple(capture(shared(family)))


@functools.cache
def eager_source(family: str) -> PreTrainedModel:
    """The source with the attention that leaves nothing out: SDPA may drop a softcap."""
    model = share_copy(shared(family))
    model.set_attn_implementation("eager")
    return model


def rewrite(
    family: str, which: str = "all", window: int = WINDOW, model: PreTrainedModel | None = None, **options: object
) -> PreTrainedModel:
    """Put GateSWA with random weights into all sites, the first or the last."""
    model = shared(family) if model is None else model
    chosen = {"all": sites(family), "first": sites(family)[:1], "last": sites(family)[-1:]}[which]
    student = share_copy(model)
    configs, graphs = {}, {}
    torch.manual_seed(2)
    for site in chosen:
        configs[site.name] = gateswa_config(site, window, **(options or OPTIONS))
        graphs[site.name] = gateswa_graph(student, site, configs[site.name])
        for parameter in graphs[site.name].get_submodule("gateswa").parameters():
            nn.init.normal_(parameter, std=0.5)
    splice(student, graphs)
    return to_attnedit(student, configs)


@functools.cache
def shared_rewrite(family: str, which: str = "all") -> PreTrainedModel:
    """One rewritten model for tests that only read it."""
    return rewrite(family, which)


class Masked(nn.Module):
    """The same function over whole sequences, masked from the definition; knows the padding, looks at no mask."""

    def __init__(self, source: GateSWA, real: Tensor) -> None:
        super().__init__()
        self.source, self.real = source, real

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        cache: object,
        sinks: Tensor | None,
    ) -> Tensor:
        assert cache is None
        config, real = self.source.config, self.real
        length, heads = query.shape[2], config.num_attention_heads
        behind = torch.arange(length)[:, None] - torch.arange(length)
        kept = real & (real.cumsum(1) <= config.sink_tokens)
        visible = (behind >= 0) & real[:, None] & ((behind < config.sliding_window) | kept[:, None])
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        logits = (query @ key.transpose(-1, -2)) * config.scale
        if config.softcap:
            logits = config.softcap * (logits / config.softcap).tanh()
        weights = logits.exp() * visible[:, None]
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
        out = weights @ value
        if config.sink_logit:
            sink = self.source.sink_logit.exp()[:, None, None]
            out = out + sink * self.source.sink_value.repeat_interleave(heads // config.num_key_value_heads, 0)[:, None]
            total = total + sink
        gate = torch.sigmoid(self.source.g_proj(hidden)).view(*hidden.shape[:2], heads, -1)
        return (out / total).transpose(1, 2) * gate


def masked_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, GateSWA):
            other.set_submodule(name, Masked(module, mask.bool()))
    return other(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def batch(length: int = 13) -> dict[str, Tensor]:
    """Two sequences, the first with left padding."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def in_pieces(model: PreTrainedModel, inputs: dict[str, Tensor], sizes: list[int], cache: object) -> Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    parts, stop = [], 0
    for size in sizes:
        start, stop = stop, stop + size
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions(mask)[:, start:stop],
            past_key_values=cache,
        )
        parts.append(out.logits)
    return torch.cat(parts, 1)


def assert_close(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Within 1e-4 of the largest logit, where ``mask`` is set."""
    if mask is not None:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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


# Linear attention takes no mask of four dimensions.
@pytest.mark.parametrize("family", [name for name in SUPPORTED if name != "qwen3_next"])
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
    model(ids[:, :9], past_key_values=cache)
    model(ids[:, :3], past_key_values=cache)
    cache.crop(-3)
    assert_close(model(ids[:, 9:], past_key_values=cache).logits, expected)
    cache = DynamicCache(config=model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(UsageError, match="activate_past_recording"):
        cache.crop(-1)


def test_recording_is_a_whole_caches() -> None:
    """The source's own sliding layer remembers that recording is on; the new one asks it."""
    model, ids = shared_rewrite("gemma3_text", "last"), batch()["input_ids"][1:]
    cache = DynamicCache(config=model.config)
    cache.activate_past_recording()
    model(ids[:, :9], past_key_values=cache)
    cache.crop(-2)
    out = model(ids[:, 7:], past_key_values=cache).logits
    assert_close(out, model(ids, use_cache=False).logits[:, 7:])


# Linear layers need the configuration.
@pytest.mark.parametrize("family", [name for name in FEW if name != "qwen3_next"])
def test_other_caches_are_masked(family: str) -> None:
    """A static cache keeps every token; without a configuration dynamic caches are bounded all the same."""
    model = rewrite(family, sink_tokens=0, gate="head", sink_logit=True, sink_value=True)
    inputs = batch()
    expected = masked_logits(model, inputs["input_ids"], inputs["attention_mask"])
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=15)):
        out = in_pieces(model, inputs, [7, 1, 4, 1], cache)
        assert_close(out, expected, inputs["attention_mask"])


def test_static_caches_and_kept_sinks() -> None:
    """Right where the cache keeps every token, refused where its own window drops the sinks."""
    inputs = batch()
    arguments = {**inputs, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    model = shared_rewrite("llama")
    expected = model.generate(**arguments).tolist()
    assert model.generate(**arguments, cache_implementation="static", disable_compile=True).tolist() == expected
    model = shared_rewrite("mistral")
    with pytest.raises(UsageError, match="use a DynamicCache"):
        model.generate(**arguments, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("family", SUPPORTED)
def test_graphs_are_clean(family: str) -> None:
    model = shared_rewrite(family)
    for site in sites(family):
        graph = model.get_submodule(site.name)
        graph.graph.lint()
        targets = [str(node.target) for node in graph.graph.nodes if node.op.startswith("call")]
        assert targets.count("gateswa") == 1
        assert not any("attnedit.attention" in target for target in targets)
        call = next(node for node in graph.graph.nodes if node.target == "gateswa")
        assert call.meta["from_node"][0].name == site.anchor
        assert graph.layer_idx == site.layer_idx
        source = set(shared(family).get_submodule(site.name).state_dict())
        assert {name for name in graph.state_dict() if not name.startswith("gateswa.")} == source


@pytest.mark.parametrize("family", FEW)
def test_round_trip_is_bit_identical(family: str, tmp_path: Path) -> None:
    model = shared_rewrite(family)
    inputs = batch()
    expected = model(**inputs).logits
    save(model, tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {values["kind"] for values in saved["attnedit"]["sites"].values()} == {"gateswa"}
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    for other in (loaded, load_model(tmp_path / "out"), copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(other(**inputs).logits, expected)
        assert other.config.attnedit == model.config.attnedit
        assert kv_usage(other, length=16) == kv_usage(model, length=16)
    save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == saved


def test_both_kinds_in_one_model(tmp_path: Path) -> None:
    model = rewrite("llama", "first")
    site = sites("llama")[1]
    config = MLAConfig(
        layer_idx=1,
        num_attention_heads=4,
        head_dim=8,
        v_head_dim=8,
        kv_lora_rank=10,
        rope_columns=(0, 2),
        qk_nope_head_dim=8,
        input_size=32,
        scale=site.scale,
    )
    graph = mla_graph(model, site, config)
    splice(model, {site.name: graph})
    model = to_attnedit(model, {site.name: config})
    save(model, tmp_path / "out")
    loaded = load_model(tmp_path / "out")
    assert [values["kind"] for values in loaded.config.attnedit["sites"].values()] == ["gateswa", "mla"]
    inputs = batch()
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    at_once = model(**inputs, position_ids=positions(inputs["attention_mask"]), use_cache=False).logits
    assert_close(
        in_pieces(loaded, inputs, [8, 1, 4], DynamicCache(config=loaded.config)), at_once, inputs["attention_mask"]
    )
    assert kv_usage(loaded, length=100).per_layer == (32 * (WINDOW + 2) / 100, 10 + 4)


def test_files_this_version_does_not_know(tmp_path: Path) -> None:
    out = save(shared_rewrite("llama"), tmp_path / "out")
    path = out / "config.json"
    config = json.loads(path.read_text())
    for values in config["attnedit"]["sites"].values():
        values["kind"] = "mamba"
    path.write_text(json.dumps(config))
    with pytest.raises(UsageError, match="'mamba' is not known") as caught:
        load_model(out)
    assert "\n" not in str(caught.value)


def test_usage_counts_windows_and_sinks() -> None:
    full = kv_usage(shared("llama"), length=100)
    assert full.per_layer == (32, 32)
    usage = kv_usage(shared_rewrite("llama", "first"), length=100)
    assert usage.per_layer == (32 * (WINDOW + 2) / 100, 32)
    assert usage.bytes_per_token == 4 * sum(usage.per_layer)
    assert kv_usage(shared_rewrite("llama"), length=4).per_layer == (32, 32)
    assert kv_usage(rewrite("llama", window=1, sink_tokens=0), length=64).per_layer == (0.5, 0.5)


def values_alive(cache: DynamicCache) -> list[int]:
    """Elements per layer in the storages that the cache keeps alive, whatever the shapes of views on them."""
    result = []
    for layer in cache.layers:
        tensors = [layer.keys, layer.values]
        if isinstance(layer, GateSWALayer):
            tensors += [layer.sinks.keys, layer.sinks.values]
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() // t.element_size() for t in tensors}
        result.append(sum(storages.values()))
    return result


def check_memory(length: int, chunk: int) -> None:
    source = build("llama", max_position_embeddings=length + 8)
    model = rewrite("llama", "first", window=16, model=source, sink_tokens=4)
    ids = torch.randint(3, 64, (1, length), generator=torch.Generator().manual_seed(3))
    cache = DynamicCache(config=model.config)
    for part in ids.split(chunk, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    width = 32
    for step in range(3):
        bounded, full = values_alive(cache)
        assert bounded <= width * (16 + 4)
        assert full == width * (length + step)
        assert cache.get_seq_length(0) == cache.get_seq_length(1) == length + step
        model(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("chunk", [2000, 300])
def test_memory_is_bounded(chunk: int) -> None:
    check_memory(2000, chunk)


@pytest.mark.long
def test_memory_is_bounded_at_32k() -> None:
    check_memory(32768, 4096)


@pytest.mark.parametrize("family", FEW[:-1])
def test_whole_model_as_a_graph(family: str) -> None:
    model, inputs = shared_rewrite(family), batch(17)
    expected = model(**inputs, use_cache=False).logits
    out = capture_model(model)(inputs["input_ids"], inputs["attention_mask"])
    assert_close(out, expected, inputs["attention_mask"])


@torch.enable_grad()
@pytest.mark.parametrize("family", FEW)
def test_gradients_with_and_without_checkpointing(family: str) -> None:
    model = rewrite(family)
    model.train()
    inputs = batch()
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    fresh = {name: p for name, p in model.named_parameters() if ".gateswa." in name}
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


def test_doubling_leaves_biases_alone() -> None:
    linear = nn.Linear(3, 2)
    other = doubled(linear)
    assert torch.equal(other.weight, 2 * linear.weight)
    assert torch.equal(other.bias, linear.bias)
    assert other.weight.data_ptr() != linear.weight.data_ptr()


def test_factors_applied_with_rope_are_not_applied_again() -> None:
    site = sites("llama")[0]
    assert gateswa_config(dataclasses.replace(site, scale=2 * site.scale), WINDOW).scale == site.scale


def test_configurations_that_do_not_fit_are_refused() -> None:
    site = sites("llama")[0]
    values = gateswa_config(site, WINDOW, **OPTIONS).to_dict()
    for change in ({"num_attention_heads": 8}, {"hidden_size": 7}, {"layer_idx": 1}, {"scale": 1.0}, {"sinks": True}):
        with pytest.raises(UsageError, match="configuration has"):
            gateswa_graph(shared("llama"), site, GateSWAConfig(**{**values, **change}))
    with pytest.raises(UsageError, match="source's own window"):
        gateswa_config(sites("mistral")[0], 5)
    with pytest.raises(UsageError, match="no gated sliding-window attention"):
        to_attnedit(share_copy(shared("llama")), {site.name: gateswa_config(site, WINDOW)})

"""What becomes of a model with windowed attention: graphs, files, memory, gradients."""

import copy
import dataclasses
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from families import SUPPORTED, build, shared
from gateswa_models import (
    FEW,
    OPTIONS,
    WINDOW,
    assert_close,
    batch,
    in_pieces,
    positions,
    rewrite,
    shared_rewrite,
    sites,
)
from torch import nn
from transformers import AutoModelForCausalLM, DynamicCache

from attnedit.compiler.capture.capture import capture_model
from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.evaluate import kv_usage
from attnedit.targets.attention import GateSWAConfig, MLAConfig
from attnedit.targets.attention.gateswa.cache import GateSWALayer
from attnedit.targets.attention.gateswa.graph import doubled, gateswa_config, gateswa_graph
from attnedit.targets.attention.mla.graph import mla_graph
from attnedit.targets.runtime.eager import load_model, save, share_copy, splice, to_attnedit

pytestmark = pytest.mark.usefixtures("no_grad")


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
        assert getattr(graph, "layer_idx", site.layer_idx) == site.layer_idx
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
        model(part, **with_cache(model, cache), logits_to_keep=1)
    width = 32
    for step in range(3):
        bounded, full = values_alive(cache)
        assert bounded <= width * (16 + 4)
        assert full == width * (length + step)
        assert cache.get_seq_length(0) == cache.get_seq_length(1) == length + step
        model(ids[:, :1], **with_cache(model, cache))


@pytest.mark.parametrize("chunk", [2000, 300])
def test_memory_is_bounded(chunk: int) -> None:
    check_memory(2000, chunk)


@pytest.mark.long
def test_memory_is_bounded_at_32k() -> None:
    check_memory(32768, 4096)


@pytest.mark.long
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

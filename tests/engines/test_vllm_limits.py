"""The vLLM plugin without vLLM: what it refuses, and the graphs that it puts an engine's attention into."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel
from vllm_models import save_random

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.runtime.eager import load_model
from attnedit.targets.runtime.vllm import Settings, check
from attnedit.targets.runtime.vllm.decoder import (
    OrdinaryConfig,
    attention_of,
    decoder_class,
    inputs_of,
    without_mask_and_cache,
)
from attnedit.targets.runtime.vllm.limits import NOT_SERVED
from attnedit.targets.runtime.vllm.plugin import check_engine


def record(**changes: Any) -> Any:
    values = {
        "kind": "gateswa",
        "layer_idx": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "v_head_dim": 32,
        "hidden_size": 64,
        "sliding_window": 16,
        "scale": 1.0,
    }
    return SimpleNamespace(attnedit={"sites": {"model.layers.3.self_attn": {**values, **changes}}})


def latent(**changes: Any) -> Any:
    values = {
        "kind": "mla",
        "layer_idx": 3,
        "num_attention_heads": 4,
        "head_dim": 32,
        "v_head_dim": 32,
        "kv_lora_rank": 24,
        "rope_columns": [0, 2],
        "qk_nope_head_dim": 32,
        "input_size": 64,
        "scale": 1.0,
    }
    return SimpleNamespace(attnedit={"sites": {"model.layers.3.self_attn": {**values, **changes}}})


REFUSED = {
    "kept tokens": (record(sink_tokens=4), Settings(), "4 kept first tokens", "--sinks none or --sinks logit"),
    "two virtual keys": (
        record(sinks=True, sink_logit=True, sink_value=True),
        Settings(),
        "sink value",
        "--sinks none",
    ),
    "long values": (record(v_head_dim=64), Settings(), "values of 64 numbers", "attnedit.load"),
    "key heads": (record(), Settings(tensor_parallel=4), "2 key/value heads for 4 ranks", "--tensor-parallel-size"),
    "heads": (latent(), Settings(tensor_parallel=3), "4 heads for 3 ranks", "--tensor-parallel-size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_layer_feature_and_remedy(name: str) -> None:
    asked, settings, feature, remedy = REFUSED[name]
    with pytest.raises(UsageError, match=r"^layer 3 has ") as caught:
        check(asked, settings)
    assert feature in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize("feature", NOT_SERVED)
def test_settings_that_nobody_tested_are_refused(feature: str) -> None:
    check(record(), Settings(others={feature: False}))
    with pytest.raises(UsageError, match=f"^{feature} is not served"):
        check(record(), Settings(others={feature: True}))


def test_what_can_be_served_is() -> None:
    gated = record(gate="head", gate_bias=True, sink_logit=True, sink_value=True)
    for settings in (Settings(), Settings(tensor_parallel=2)):
        check(gated, settings)
    check(latent(), Settings(tensor_parallel=2))
    for changes in ({"window": 8}, {"softcap": 8.0}, {"sinks": True}, {"rope_columns": []}, {"qk_nope_head_dim": 0}):
        check(latent(**changes), Settings())


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_angles_that_follow_the_longest_request_are_refused(kind: str) -> None:
    config = record()
    for parameters in ({"rope_type": kind}, {"sliding": {"rope_type": "default"}, "full": {"rope_type": kind}}):
        config.rope_parameters = parameters
        with pytest.raises(UsageError, match=f"rotary embedding of type '{kind}'"):
            check(config, Settings())
    config.rope_parameters = {"rope_type": "yarn", "factor": 4.0}
    check(config, Settings())


def said_by(version: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a vLLM of that version will have warned of, which is not there."""
    said: list[str] = []
    logger = SimpleNamespace(warning_once=lambda text, *values: said.append(text % values))
    fakes: dict[str, Any] = {"vllm": ModuleType("vllm"), "vllm.logger": ModuleType("vllm.logger")}
    fakes["vllm"].__version__ = version
    fakes["vllm.logger"].init_logger = lambda name: logger
    for name, fake in fakes.items():
        monkeypatch.setitem(sys.modules, name, fake)
    return said


def engine(config: Any, device: str, **cache: Any) -> dict[str, Any]:
    """The configuration of an engine, as far as the plugin reads it."""
    parallel = {"tensor_parallel_size": 1, "pipeline_parallel_size": 1, "enable_expert_parallel": False}
    parallel |= {"decode_context_parallel_size": 1, "prefill_context_parallel_size": 1}
    config.get_text_config = lambda decoder: config
    return {
        "device_config": SimpleNamespace(device_type=device),
        "parallel_config": SimpleNamespace(**parallel),
        "cache_config": SimpleNamespace(
            **{"cache_dtype": "auto", "block_size": 16, "user_specified_block_size": False, **cache}
        ),
        "model_config": SimpleNamespace(hf_config=config, quantization=None),
        "speculative_config": None,
        "lora_config": None,
    }


@pytest.mark.parametrize(
    ("version", "device", "warnings"),
    [
        ("0.32.1", "cpu", []),
        ("0.26.0", "cuda", []),
        ("0.40.0", "cpu", ["0.26 and 0.32 on cpu; 0.26 on cuda; this is 0.40.0 on cpu"]),
        ("0.32.0", "cuda", ["this is 0.32.0 on cuda"]),
        ("0.26.0", "xpu", ["this is 0.26.0 on xpu"]),
    ],
)
def test_an_unknown_vllm_or_device_is_warned_of(
    version: str, device: str, warnings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = said_by(version, monkeypatch)
    config = record()
    given = engine(config, device)
    check_engine(SimpleNamespace(**given))
    assert len(said) == len(warnings)
    assert all(part in text for part, text in zip(warnings, said, strict=True))
    with pytest.raises(UsageError, match=r"^LoRA is not served"):
        check_engine(SimpleNamespace(**{**given, "lora_config": object()}))
    config.get_text_config = lambda decoder: object()  # another configuration, of its text tower
    with pytest.raises(UsageError, match="more than a language model, and attnedit's plugin of vLLM holds one alone"):
        check_engine(SimpleNamespace(**given))


class Attending(nn.Module):
    """Attends as an engine would that has no other request: causal, from the graph's own query, key and value."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *given: Any) -> Any:
        config: Any = self.module.config
        if isinstance(config, OrdinaryConfig):
            query, key, value, _ = given
            groups = config.num_attention_heads // config.num_key_value_heads
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
            out = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=config.scale)
            return out.transpose(1, 2)
        return self.module(*given)


@pytest.mark.parametrize("family", ["qwen3", "gpt_neox"])
def test_graphs_need_neither_mask_nor_cache(family: str, tmp_path: Path) -> None:
    """As an engine has both: what is left computes what eager does."""
    kinds = ("mla", "gateswa", "full")
    sizes = {"num_hidden_layers": 3, "tie_word_embeddings": False}
    if family == "gpt_neox":  # names of its own, one module for query, key and value
        sizes["hidden_size"] = 128
    directory = save_random(family, tmp_path / "saved", kinds, sizes=sizes)
    source = load_model(directory)
    state = {name.partition(".")[2]: x for name, x in source.state_dict().items() if "." in name}
    config = AutoConfig.from_pretrained(directory)
    decoder_class(config)
    found = AutoModel.from_config(config)
    assert not found.load_state_dict(state, strict=False).missing_keys
    placed = attention_of(found)
    assert [type(x.config) for x in placed] == [MLAConfig, GateSWAConfig, OrdinaryConfig]
    for each in placed:
        without_mask_and_cache(each.graph, each.child)
        each.graph.set_submodule(each.child, Attending(each.graph.get_submodule(each.child)))
    ids = torch.randint(4, 260, (1, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = source.base_model(ids).last_hidden_state
        given = found.eval()(ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)


def test_modules_are_told_apart_by_what_they_compute(tmp_path: Path) -> None:
    directory = save_random("qwen3", tmp_path / "saved", ("mla", "gateswa"))
    config = AutoConfig.from_pretrained(directory)
    decoder_class(config)
    latent, window = attention_of(AutoModel.from_config(config))
    assert inputs_of(latent.graph, "mla", 0) == {"q_proj", "q_norm"}
    assert inputs_of(latent.graph, "mla", 1) == {"k_proj", "k_norm", "v_proj"}
    assert inputs_of(window.graph, "gateswa", 2) == {"v_proj"}


def test_sink_logits_of_the_source_are_found(tmp_path: Path) -> None:
    directory = save_random("gpt_oss", tmp_path / "saved", ("gateswa", "full"), gate="head")
    config = AutoConfig.from_pretrained(directory)
    decoder_class(config)
    assert [placed.sinks for placed in attention_of(AutoModel.from_config(config))] == ["sinks", "sinks"]


def test_layers_without_softmax_attention_are_refused(tmp_path: Path) -> None:
    directory = save_random("qwen3_next", tmp_path / "saved", ("gateswa",), sizes={"head_dim": 8}, gate="head")
    with pytest.raises(UsageError, match="layer 0 of Qwen3NextForCausalLM has no softmax attention"):
        decoder_class(AutoConfig.from_pretrained(directory))


def test_biases_on_the_logits_are_refused(tmp_path: Path) -> None:
    directory = save_random("bloom", tmp_path / "saved", ("gateswa",), sizes={"head_dim": 16}, gate="head")
    with pytest.raises(UsageError, match="layer 0 of BloomForCausalLM adds biases"):
        decoder_class(AutoConfig.from_pretrained(directory))


@pytest.mark.parametrize(
    ("config", "device", "cache", "expected"),
    [
        (latent(), "cuda", {}, 64),
        (latent(), "cpu", {}, 16),
        (record(), "cuda", {}, 16),
        (latent(), "cuda", {"block_size": 32, "user_specified_block_size": True}, 32),
    ],
)
def test_blocks_on_a_gpu_are_what_the_kernel_of_latents_wants(
    config: Any, device: str, cache: dict[str, Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    said_by("0.26.0", monkeypatch)
    given = engine(config, device, **cache)
    check_engine(SimpleNamespace(**given))
    assert given["cache_config"].block_size == expected

"""What people lose no work to: sources that cannot be finished, adapters, directories that would not load."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, logits, tokens
from families import build
from tiny_llama import make_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import attnedit
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.model_io.models import load_source

NO_FIT = {"calibration": tokens(4, 32)}


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        attnedit.compile(model, **{**NO_FIT, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_attention_weights_in_the_configuration_are_refused() -> None:
    model = build("llama")
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    assert "has output_attentions" in refusal(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_models_are_refused() -> None:
    assert "compiled by torch.compile" in refusal(torch.compile(build("llama")))
    model = build("llama")
    model.model.layers[1] = torch.compile(model.model.layers[1])
    assert "model.layers.1 is compiled" in refusal(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_quantised_models_are_refused() -> None:
    model = torch.ao.quantization.quantize_dynamic(build("llama"), {nn.Linear}, dtype=torch.qint8)
    assert "quantised by torch's dynamic quantisation" in refusal(model)
    model = build("llama")
    weight = model.model.layers[0].mlp.up_proj.weight
    model.model.layers[0].mlp.up_proj.weight = nn.Parameter(weight.detach().to(torch.int8), requires_grad=False)
    assert "model.layers.0.mlp.up_proj.weight is of torch.int8" in refusal(model)


class OfQuanto(nn.Linear):
    """Stands for a module of quanto, which is known by the package that its class is of."""

    __module__ = "optimum.quanto.nn.qlinear"


def test_models_of_quanto_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.up_proj = OfQuanto(32, 48, bias=False)
    assert "model.layers.1.mlp.up_proj is quantised by quanto" in refusal(model)
    result = compile_tiny(build("llama"), 0.5)
    result.model.model.layers[1].mlp.up_proj = OfQuanto(32, 48, bias=False)
    with pytest.raises(UsageError, match="is quantised by quanto; save the result before that"):
        result.save("never made")


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_models_of_torchao_are_refused(tmp_path: Path) -> None:
    """The library warns of its own imports."""
    quantization: Any = importlib.import_module("torchao.quantization")
    model = build("llama", torch.bfloat16)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    assert "model.layers.0.self_attn.q_proj.weight is quantised by torchao" in refusal(model)
    result = compile_tiny(build("llama", torch.bfloat16), 0.5)
    quantization.quantize_(result.model, quantization.Int8WeightOnlyConfig())
    with pytest.raises(UsageError, match="is quantised by torchao; save the result before that"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def offloaded(model: Any, directory: Path) -> Any:
    """The model read again, its second layer left on disk."""
    model.save_pretrained(directory)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    auto: Any = AutoModelForCausalLM
    return auto.from_pretrained(directory, device_map=places, offload_folder=str(directory / "offload"))


@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_offloaded_models_are_refused(target: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"window": 8} if target == "gateswa" else {}
    message = refusal(offloaded(build("llama"), tmp_path / "model"), target=target, **options)
    assert "model.layers.1.self_attn.q_proj.weight is not in memory" in message
    assert "--low-memory" in message


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning")
def test_offloaded_results_compute_and_are_saved(tmp_path: Path) -> None:
    result = compile_tiny(build("llama"), 0.5)
    expected = logits(result.model, tokens(2, 9))
    result.save(tmp_path / "whole")
    live = offloaded(result.model, tmp_path / "model")
    torch.testing.assert_close(logits(live, tokens(2, 9)), expected)
    live.save_pretrained(tmp_path / "again")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), tokens(2, 9)), expected)
    result.model.model.layers[1].mlp.to("meta")
    with pytest.raises(UsageError, match=r"model\.layers\.1\.mlp\..* is not in memory .*save the result before that"):
        result.save(tmp_path / "out")


def test_weights_that_are_elsewhere_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    message = refusal(model)
    assert "model.layers.1.mlp" in message
    assert "--low-memory" in message


@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_training_mode_with_gradient_checkpointing(target: str) -> None:
    model = build("llama").train()
    # its name before transformers 5.18
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    options: dict[str, Any] = {"window": 8} if target == "gateswa" else {}
    result = attnedit.compile(model, target, **options, **NO_FIT)
    assert result.model.training
    new = hasattr(type(result.model), "is_activation_checkpointing")
    assert result.model.is_activation_checkpointing if new else result.model.is_gradient_checkpointing
    loss = result.model(tokens(1, 12), labels=tokens(1, 12)).loss
    loss.backward()


def test_a_directory_is_put_in_place_only_after_it_was_read_back(tmp_path: Path) -> None:
    result = compile_tiny(build("llama"), 0.5)
    result.save(tmp_path / "out")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()}
    result.model.model.layers[0].mlp.up_proj = nn.Linear(64, 3, bias=False)
    with pytest.raises(AttneditError, match="does not load, so it was not put there"):
        result.save(tmp_path / "out", overwrite=True)
    with pytest.raises(AttneditError, match="does not load, so it was not put there"):
        result.save(tmp_path / "new" / "out")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir() if file.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    attnedit.load(tmp_path / "out")


def with_adapter(model: PreTrainedModel, **options: Any) -> Any:
    import peft

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(model, config)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_on_the_source_are_refused() -> None:
    wrapped = with_adapter(build("llama"), target_modules=["q_proj"])
    assert "merge_and_unload" in refusal(wrapped)
    assert "has an adapter" in refusal(wrapped.base_model.model)
    assert compile_tiny(wrapped.merge_and_unload(), 0.5).report.sites_rewritten == 2


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_an_adapter_on_the_output_projection(target: str, tmp_path: Path) -> None:
    """Refused on a source; on a result it computes, is saved, and can be merged."""
    assert "self_attn.o_proj has an adapter" in refusal(with_adapter(build("llama"), target_modules=["o_proj"]).model)
    options: dict[str, Any] = {"window": 8} if target == "gateswa" else {}
    result = attnedit.compile(build("llama"), target, **NO_FIT, **options)
    plain = logits(result.model, tokens(2, 9))
    wrapped = with_adapter(result.model, target_modules=["o_proj"])
    expected = logits(wrapped, tokens(2, 9))
    assert float((expected - plain).abs().max()) > 1e-2
    result.save(tmp_path / "out")
    torch.testing.assert_close(logits(attnedit.load(tmp_path / "out").model, tokens(2, 9)), expected)
    torch.testing.assert_close(logits(wrapped.merge_and_unload(), tokens(2, 9)), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_adapters_on_a_result_are_saved_in_both_forms(tmp_path: Path) -> None:
    import peft

    result = compile_tiny(build("llama"), 0.5)
    plain = logits(result.model, tokens(2, 9))
    result.save(tmp_path / "out")
    wrapped = with_adapter(result.model, target_modules=["kv_a_proj_with_mqa", "kv_b_proj", "up_proj"])
    expected = logits(wrapped, tokens(2, 9))
    assert float((expected - plain).abs().max()) > 1e-2
    result.save(tmp_path / "out", overwrite=True)
    torch.testing.assert_close(logits(attnedit.load(tmp_path / "out").model, tokens(2, 9)), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(base, tokens(2, 9)), plain)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "out" / "adapters" / "default")
    torch.testing.assert_close(logits(again, tokens(2, 9)), expected)
    # and PEFT's own directory
    wrapped.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(again, tokens(2, 9)), expected)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [3, 4]},
        {"bias": "lora_only"},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_with_more_than_two_matrices_are_saved(
    options: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    import peft

    result = compile_tiny(build("qwen2", dtype), 0.5)
    plain = logits(result.model, tokens(2, 9))
    wrapped = with_adapter(result.model, target_modules=["kv_b_proj", "o_proj"], **options)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.2).add_(0.01)
    expected = logits(wrapped, tokens(2, 9))
    result.save(tmp_path / "out")
    torch.testing.assert_close(logits(attnedit.load(tmp_path / "out").model, tokens(2, 9)), expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(base, tokens(2, 9)), plain)
    again = peft.PeftModel.from_pretrained(base, tmp_path / "out" / "adapters" / "default")
    torch.testing.assert_close(logits(again, tokens(2, 9)), expected)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("live", [False, True], ids=["loaded", "dequantised live"])
def test_a_bitsandbytes_source_is_saved_plain(bits: int, live: bool, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    make_llama().save_pretrained(tmp_path / "plain")
    settings: Any = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    auto: Any = AutoModelForCausalLM
    model = auto.from_pretrained(tmp_path / "plain", quantization_config=settings, device_map="cpu")
    assert "bitsandbytes" in refusal(model)
    if live:
        model = model.dequantize()
    else:
        model.save_pretrained(tmp_path / "quantised")
        with pytest.raises(UsageError, match="already quantised"):
            load_source(str(tmp_path / "quantised"))
        model = load_source(str(tmp_path / "quantised"), dequantize=True, dtype="float32").model
    result = attnedit.compile(model.float(), kv_budget=1.0)
    result.save(tmp_path / "out")
    again = attnedit.load(tmp_path / "out").model
    torch.testing.assert_close(logits(again, tokens(2, 9)), logits(result.model, tokens(2, 9)))

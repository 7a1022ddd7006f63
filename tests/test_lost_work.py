"""What people lose no work to: sources that cannot be finished, adapters, directories that would not load."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, logits, tokens
from conftest import make_llama
from families import build
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import attnedit
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.models import load_source

NO_FIT = {"calibration": tokens(4, 32)}


def refusal(model: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as caught:
        attnedit.compile(model, **{**NO_FIT, **options})
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_model_without_a_head_is_refused() -> None:
    assert "has no language-model head" in refusal(build("llama").model)
    assert "has no language-model head" in refusal(AutoModel.from_config(build("gpt2").config))


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


def test_weights_that_are_elsewhere_are_refused() -> None:
    model = build("llama")
    model.model.layers[1].mlp.to("meta")
    message = refusal(model)
    assert "model.layers.1.mlp" in message
    assert "--low-memory" in message


@pytest.mark.parametrize("target", ["mla", "gateswa"])
def test_training_mode_with_gradient_checkpointing(target: str) -> None:
    model = build("llama").train()
    model.activation_checkpointing_enable()
    options: dict[str, Any] = {"window": 8} if target == "gateswa" else {}
    result = attnedit.compile(model, target, **options, **NO_FIT)
    assert result.model.training
    assert result.model.is_activation_checkpointing
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

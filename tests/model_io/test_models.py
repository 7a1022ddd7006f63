"""Loading a source: what is accepted, and one clear line for everything that is not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    CLIPConfig,
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    PreTrainedTokenizerFast,
    T5Config,
)

import attnedit
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.devices import parse_dtype, resolve_device
from attnedit.compiler.model_io.gguf_reading import shared_gguf_reader
from attnedit.compiler.model_io.models import load_config_only, load_source


@pytest.fixture
def copied(saved_llama: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage."""
    return Path(shutil.copytree(saved_llama, tmp_path / "model"))


def refusal(model: Path | str, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        load_source(str(model), **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


def edit_config(directory: Path, **changes: object) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def test_a_directory_loads_as_it_was_saved(saved_llama: Path) -> None:
    source = load_source(str(saved_llama))
    assert isinstance(source.model, LlamaForCausalLM)
    assert not source.model.training
    expected = make_llama().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in source.model.state_dict().items())
    assert source.tokenizer is not None
    assert source.tokenizer.decode(source.tokenizer("héllo")["input_ids"]) == "héllo"


def test_the_dtype_is_as_asked(saved_llama: Path) -> None:
    assert load_source(str(saved_llama), dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_source(str(saved_llama), dtype="auto").model.dtype == torch.float32


def test_a_directory_without_a_tokenizer_gives_none(copied: Path) -> None:
    for file in copied.glob("tokenizer*"):
        file.unlink()
    assert load_source(str(copied)).tokenizer is None


def test_the_configuration_alone_is_enough_for_a_meta_model(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    for given in (copied, copied / "config.json"):
        model = load_config_only(str(given))
        assert all(parameter.is_meta for parameter in model.parameters())
        assert not any(buffer.is_meta for buffer in model.buffers())


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "gone")
    assert "does not exist" in refusal("./gone.gguf")


def test_a_hub_name_that_cannot_be_fetched_is_named() -> None:
    assert "Hugging Face hub" in refusal("nobody/no-such-model")


def test_an_empty_directory_is_no_model(tmp_path: Path) -> None:
    assert "no config.json" in refusal(tmp_path)


def test_another_file_is_no_model(text_file: Path) -> None:
    assert "neither a model directory nor a .gguf file" in refusal(text_file)


def test_an_unfinished_run_is_no_model(copied: Path) -> None:
    (copied / "attnedit-run.json").write_text("{}")
    assert "unfinished" in refusal(copied)


def test_a_revision_of_a_directory_makes_no_sense(saved_llama: Path) -> None:
    assert "hub names only" in refusal(saved_llama, revision="main")


@pytest.mark.parametrize("text", ["{", '{"model_type": "nonesuch"}', '{"model_type": "llama", "hidden_size": "many"}'])
def test_a_configuration_that_cannot_be_read(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    assert "cannot read the configuration of" in refusal(copied)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\x01" * 40, b"something else"])
def test_a_damaged_gguf(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    assert "truncated or damaged" in refusal(file)


def test_the_embedded_model_cut_off(tmp_path: Path) -> None:
    from attnedit.compiler.model_io.demo_model import embedded_gguf

    file = tmp_path / "model.gguf"
    with embedded_gguf().open("rb") as whole:
        file.write_bytes(whole.read(4_000_000))
    assert "truncated or damaged" in refusal(file)


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinite")])
def test_broken_weights_are_named(copied: Path, value: float, word: str) -> None:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.self_attn.k_proj.weight"][3, 5] = value

    edit_weights(copied, damage)
    message = refusal(copied)
    assert word in message
    assert "model.layers.1.self_attn.k_proj.weight" in message


def test_missing_weights_are_named(copied: Path) -> None:
    edit_weights(copied, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lm_head.weight" in refusal(copied)


def test_truncated_weights(copied: Path) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "cannot read the weights of" in refusal(copied)


def test_no_weights(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    assert "cannot read the weights of" in refusal(copied)


def test_weights_of_another_shape(copied: Path) -> None:
    edit_config(copied, hidden_size=32)
    assert "cannot read the weights of" in refusal(copied)


def test_a_tokenizer_beyond_the_embeddings(copied: Path) -> None:
    make_llama(vocab_size=200).save_pretrained(copied)
    message = refusal(copied)
    assert "does not fit" in message
    assert "200 rows" in message


def test_a_broken_tokenizer(copied: Path) -> None:
    (copied / "tokenizer.json").write_text("{")
    assert "cannot read the tokenizer of" in refusal(copied)


def test_special_tokens_that_text_cannot_contain_do_not_matter(
    copied: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    larger = PreTrainedTokenizerFast.from_pretrained(copied)
    larger.add_special_tokens({"additional_special_tokens": ["<image>"]})
    larger.save_pretrained(copied)
    assert load_source(str(copied)).tokenizer is not None


def test_an_encoder_decoder(tmp_path: Path) -> None:
    T5Config(num_layers=1).save_pretrained(tmp_path)
    assert "encoder-decoder" in refusal(tmp_path)


def test_a_model_of_images_without_a_language_model(tmp_path: Path) -> None:
    CLIPConfig().save_pretrained(tmp_path)
    assert "(clip) is not a causal language model" in refusal(tmp_path)


def test_a_model_of_another_head(tmp_path: Path) -> None:
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=64)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert "BertForMaskedLM" in refusal(tmp_path / "bert")
    LlamaForQuestionAnswering(make_llama().config).save_pretrained(tmp_path / "answers")
    assert "LlamaForQuestionAnswering" in refusal(tmp_path / "answers")


def test_a_model_with_code_of_its_own(copied: Path) -> None:
    edit_config(copied, model_type="own", auto_map={"AutoConfig": "own.Config"})
    assert "trust_remote_code" in refusal(copied)


def test_a_quantised_source_is_refused_unless_dequantised(copied: Path, tmp_path: Path) -> None:
    weight = "model.layers.0.self_attn.k_proj.weight"

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            scale = tensors[name].abs().max() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)

    original = load_file(copied / "model.safetensors")[weight]
    edit_weights(copied, quantise)
    edit_config(copied, quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert "already quantised (fp8)" in refusal(copied)
    source = load_source(str(copied), dequantize=True)
    loaded = source.model.state_dict()[weight]
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, original, rtol=0.07, atol=1e-3)
    assert getattr(source.model.config, "quantization_config", None) is None
    assert load_config_only(str(copied)).num_parameters() == source.model.num_parameters()
    # Nothing of the quantiser is left that would quantise what is saved.
    result = attnedit.compile(source.model, kv_budget=1.0, in_place=True)
    saved = load_file(result.save(tmp_path / "result") / "model.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in saved.values())
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        expected = result.model(ids).logits
        torch.testing.assert_close(attnedit.load(tmp_path / "result").model(ids).logits, expected)
        result.export("hf", tmp_path / "remote", profile="remote")
        auto: Any = AutoModelForCausalLM
        exported = auto.from_pretrained(tmp_path / "remote", trust_remote_code=True)
        torch.testing.assert_close(exported(ids).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_a_dequantised_source_is_in_the_dtype_asked_for(dtype: str, copied: Path) -> None:
    """Real FP8 checkpoints keep the rest, and their scales, in bfloat16 and float32."""

    def quantise(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            if "_proj.weight" in name:
                scale = tensors[name].abs().max() / 448
                tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
                tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            else:
                tensors[name] = tensors[name].to(torch.bfloat16)

    original = load_source(str(copied)).model
    edit_weights(copied, quantise)
    edit_config(copied, dtype="bfloat16", quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    model = load_source(str(copied), dequantize=True, dtype=dtype).model
    expected = torch.bfloat16 if dtype == "auto" else getattr(torch, dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    assert model.config.dtype == expected
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        wanted = original(ids).logits
        difference = model(ids).logits.float() - wanted
    assert float(difference.norm() / wanted.norm()) < 0.1


def test_unknown_dtypes_and_devices() -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int4'"):
        parse_dtype("int4")
    with pytest.raises(UsageError, match="not usable here"):
        resolve_device("nonsense")
    assert resolve_device("cpu") == torch.device("cpu")


@pytest.mark.long
def test_the_embedded_model_loads_and_saves(tmp_path: Path) -> None:
    source = load_source("smollm2")
    assert source.model.config.num_hidden_layers == 30
    assert getattr(source.model.config, "quantization_config", None) is None
    source.model.save_pretrained(tmp_path)
    assert source.tokenizer is not None
    source.tokenizer.save_pretrained(tmp_path)
    again = load_source(str(tmp_path))
    assert torch.equal(again.model.lm_head.weight, source.model.lm_head.weight)
    assert again.tokenizer is not None
    assert again.tokenizer.chat_template == source.tokenizer.chat_template


def test_a_gguf_is_parsed_once_and_as_a_plain_array(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_token_list(["a", "bc", "d"])
    writer.add_tensor("x", numpy.arange(64, dtype=numpy.float32).reshape(2, 32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    plain = gguf.GGUFReader(file)
    with shared_gguf_reader():
        shared = gguf.GGUFReader(file)
        assert gguf.GGUFReader(file) is shared
    assert type(shared.data) is numpy.ndarray  # slices of a memory map take three times as long
    assert {name: field.contents() for name, field in shared.fields.items()} == {
        name: field.contents() for name, field in plain.fields.items()
    }
    assert [(tensor.name, tensor.data.tolist()) for tensor in shared.tensors] == [
        (tensor.name, tensor.data.tolist()) for tensor in plain.tensors
    ]

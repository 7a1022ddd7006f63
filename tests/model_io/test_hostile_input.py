"""Checkpoints made to do harm, or damaged: refused in one line, no pickle loaded, no code run, nothing written."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compiled import compile_tiny, tokens
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama

import attnedit
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.model_io.models import load_config_only, load_source

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


class Trap:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@pytest.fixture(scope="session")
def saved_result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rewritten model that `attnedit.load` reads; tests must not write there."""
    directory = tmp_path_factory.mktemp("results") / "result"
    result = compile_tiny(make_llama(), 0.5, calibration=tokens(4, 32), alternations=0)
    result.save(directory)
    return directory


@pytest.fixture(params=["source", "result"])
def checkpoint(request: pytest.FixtureRequest, saved_llama: Path, saved_result: Path, tmp_path: Path) -> Path:
    """A copy of either that a test may damage."""
    original = saved_llama if request.param == "source" else saved_result
    return Path(shutil.copytree(original, tmp_path / request.param))


def refusal(directory: Path) -> str:
    """The one line with which loading refuses; the directory is left as it was."""
    before = {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    load: Callable[[str], Any] = attnedit.load if directory.name == "result" else load_source
    with pytest.raises(AttneditError) as caught:
        load(str(directory))
    assert {file: file.read_bytes() for file in directory.rglob("*") if file.is_file()} == before
    message = str(caught.value)
    assert "\n" not in message
    assert caught.value.exit_code == 2
    return message


def edit_json(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    value = json.loads(file.read_text(encoding="utf-8"))
    change(value)
    file.write_text(json.dumps(value), encoding="utf-8")


def shard(directory: Path, name: str) -> None:
    """Make the checkpoint one shard, which its index calls `name`."""
    keys = list(load_file(directory / WEIGHTS))
    (directory / WEIGHTS).rename(directory / "model-00001-of-00001.safetensors")
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(keys, name)}))


def test_one_shard_in_order_is_read(checkpoint: Path) -> None:
    shard(checkpoint, "model-00001-of-00001.safetensors")
    load: Callable[[str], Any] = attnedit.load if checkpoint.name == "result" else load_source
    assert load(str(checkpoint)).model is not None


@pytest.mark.parametrize(
    "name",
    [
        "../elsewhere.safetensors",
        "/elsewhere.safetensors",
        "a/b.safetensors",
        "..\\elsewhere.safetensors",
        "..",
        "x.bin",
    ],
)
def test_shards_outside_the_directory(name: str, checkpoint: Path) -> None:
    shutil.copy(checkpoint / WEIGHTS, checkpoint.parent / "elsewhere.safetensors")
    shard(checkpoint, name)
    assert "which is no .safetensors file beside it" in refusal(checkpoint)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 1}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_an_index_that_cannot_be_read(text: str, checkpoint: Path) -> None:
    shard(checkpoint, "model-00001-of-00001.safetensors")
    (checkpoint / INDEX).write_text(text)
    assert f"{INDEX} of " in refusal(checkpoint)


def test_a_shard_that_is_not_there(checkpoint: Path) -> None:
    shard(checkpoint, "model-00002-of-00002.safetensors")
    assert "names model-00002-of-00002.safetensors, which is not there" in refusal(checkpoint)


@pytest.mark.parametrize("length", [0, 1, 2**20, 2**40, 2**63, 2**64 - 1])
def test_header_lengths_beyond_the_file(length: int, checkpoint: Path) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", length) + content[8:])
    assert "cannot read the" in refusal(checkpoint)


@pytest.mark.parametrize("kept", [0, 7, 100, -1])
def test_truncated_weights(kept: int, checkpoint: Path) -> None:
    content = (checkpoint / WEIGHTS).read_bytes()
    (checkpoint / WEIGHTS).write_bytes(content[:kept])
    assert "cannot read the" in refusal(checkpoint)


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 2**40]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 16]},
        {"dtype": "nothing", "shape": [4], "data_offsets": [0, 16]},
    ],
)
def test_headers_that_contradict_the_file(entry: dict[str, Any], checkpoint: Path) -> None:
    header = json.dumps({"model.embed_tokens.weight": entry}).encode()
    (checkpoint / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "cannot read the" in refusal(checkpoint)


def test_weights_of_another_shape(checkpoint: Path) -> None:
    tensors = load_file(checkpoint / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(3)
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    assert "norm.weight" in refusal(checkpoint) or "size" in refusal(checkpoint)


def test_pickles_are_not_loaded_unasked(checkpoint: Path) -> None:
    torch.save(load_file(checkpoint / WEIGHTS), checkpoint / "pytorch_model.bin")
    (checkpoint / WEIGHTS).unlink()
    message = refusal(checkpoint)
    assert "pickles (pytorch_model.bin)" in message
    assert "--allow-pickle" in message


def test_pickles_are_loaded_when_asked(saved_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    expected = load_source(str(directory)).model.state_dict()
    torch.save(load_file(directory / WEIGHTS), directory / "pytorch_model.bin")
    (directory / WEIGHTS).unlink()
    found = load_source(str(directory), allow_pickle=True).model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_a_pickle_that_holds_code_is_refused_even_then(saved_llama: Path, tmp_path: Path) -> None:
    directory, mark = Path(shutil.copytree(saved_llama, tmp_path / "model")), tmp_path / "mark"
    (directory / WEIGHTS).unlink()
    for save in (torch.save, lambda value, file: file.write_bytes(pickle.dumps(value, protocol=2))):
        save({"model.norm.weight": Trap(mark)}, directory / "pytorch_model.bin")
        with pytest.raises(UsageError, match="cannot read the weights of"):
            load_source(str(directory), allow_pickle=True)
        assert not mark.exists()


def test_a_pickle_called_safetensors_is_no_safetensors(checkpoint: Path) -> None:
    mark = checkpoint.parent / "mark"
    torch.save({"model.norm.weight": Trap(mark)}, checkpoint / WEIGHTS)
    assert "cannot read the" in refusal(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize("field", ["auto_map", "tokenizer"])
def test_code_in_the_directory_does_not_run(field: str, checkpoint: Path) -> None:
    """Not even where an architecture that transformers has would be replaced by it."""
    mark = checkpoint.parent / "mark"
    (checkpoint / "own.py").write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n")
    classes = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model", "AutoTokenizer": ["own.Tok", None]}
    if field == "tokenizer":
        make = {"auto_map": {"AutoTokenizer": ["own.Tok", None]}, "tokenizer_class": "Tok"}
        file = checkpoint / "tokenizer_config.json"
        file.write_text(json.dumps({**(json.loads(file.read_text()) if file.exists() else {}), **make}))
    else:
        edit_json(checkpoint / "config.json", lambda config: config.update(auto_map=classes))
    load: Callable[[str], Any] = attnedit.load if checkpoint.name == "result" else load_source
    with contextlib.suppress(AttneditError):
        load(str(checkpoint))
    assert not mark.exists()


SIZES = ["hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"]


@pytest.mark.parametrize("value", [0, -1, 10**12])
@pytest.mark.parametrize("field", SIZES)
def test_sizes_out_of_range(field: str, value: int, saved_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    edit_json(directory / "config.json", lambda config: config.update({field: value}))
    reason = f"{field}|cannot read the configuration of"  # transformers refuses some itself
    assert re.search(reason, refusal(directory))
    with pytest.raises(UsageError, match=reason):
        load_config_only(str(directory))


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "64"},
        {"num_hidden_layers": 1.5},
        {"num_attention_heads": None},
        {"num_key_value_heads": 3},
        {"intermediate_size": -1},
        {"rope_parameters": {"rope_type": "none such", "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": "x"}},
        {"rope_parameters": []},
        {"hidden_act": "none such"},
        {"rms_norm_eps": "small"},
        {"layer_types": ["none such"] * 2},
        {"model_type": "none such"},
        {"model_type": 3},
        {"architectures": 3},
        {"dtype": "none such"},
    ],
)
def test_fields_that_make_no_sense(change: dict[str, Any], saved_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_llama, tmp_path / "model"))
    edit_json(directory / "config.json", lambda config: config.update(change))
    refusal(directory)


@pytest.mark.parametrize(
    "change",
    [
        {"kv_lora_rank": -1},
        {"kv_lora_rank": 10**12},
        {"kv_lora_rank": "4"},
        {"rope_columns": [-1]},
        {"rope_columns": [10**6]},
        {"rope_columns": 3},
        {"num_attention_heads": 3},
        {"head_dim": 0},
        {"layer_idx": 10**6},
        {"kind": "none such"},
        {"none such": 1},
        None,
    ],
)
def test_records_that_make_no_sense(change: dict[str, Any] | None, saved_result: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_result, tmp_path / "result"))

    def edit(config: dict[str, Any]) -> None:
        sites = config["attnedit"]["sites"]
        name = next(iter(sites))
        sites[name] = None if change is None else {**sites[name], **change}

    edit_json(directory / "config.json", edit)
    refusal(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sites", {"model.layers.0.nowhere": {}}),
        ("sites", []),
        ("sites", {"../../x": {}}),
        ("architecture", "LlamaForQuestionAnswering"),
        ("architecture", "__class__"),
        ("architecture", 3),
        ("format_version", 10**6),
    ],
)
def test_a_record_of_other_things(field: str, value: Any, saved_result: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_result, tmp_path / "result"))
    edit_json(directory / "config.json", lambda config: config["attnedit"].update({field: value}))
    refusal(directory)

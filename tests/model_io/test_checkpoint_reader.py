"""Checkpoints of safetensors read into a model on meta in parts, and what is wrong with some."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from compiled import deviation, logits, tokens
from in_parts import TARGETS, in_parts
from safetensors.torch import load_file, save_file
from tiny_llama import make_llama

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.checkpoint_reader import INDEX_FILE, CheckpointReader
from attnedit.compiler.model_io.models import load_config_only, load_source


def _truncate(source: Path) -> None:
    shard = sorted(source.glob("*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])


def _lose(source: Path) -> None:
    sorted(source.glob("*.safetensors"))[-1].unlink()


def _escape(source: Path) -> None:
    """A shard named outside the directory, where a file of that name really is."""
    shard = sorted(source.glob("*.safetensors"))[-1]
    shutil.move(shard, source.parent / shard.name)
    text = (source / INDEX_FILE).read_text()
    (source / INDEX_FILE).write_text(text.replace(shard.name, f"../{shard.name}"))


def _no_index(source: Path) -> None:
    (source / INDEX_FILE).write_text("{]")


def _forget(source: Path) -> None:
    """A tensor less, in shard and index."""
    index = json.loads((source / INDEX_FILE).read_text())
    name = "model.layers.1.mlp.up_proj.weight"
    shard = source / index["weight_map"].pop(name)
    (source / INDEX_FILE).write_text(json.dumps(index))
    save_file({key: value for key, value in load_file(shard).items() if key != name}, shard, {"format": "pt"})


def _disagree(source: Path) -> None:
    """In the index, but not where it says."""
    index = json.loads((source / INDEX_FILE).read_text())
    names = sorted(set(index["weight_map"].values()))
    name = next(key for key, shard in index["weight_map"].items() if shard == names[0])
    index["weight_map"][name] = names[1]
    (source / INDEX_FILE).write_text(json.dumps(index))


def _change(source: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    index = json.loads((source / INDEX_FILE).read_text())["weight_map"]
    name = "model.layers.1.mlp.up_proj.weight"
    shard = source / index[name]
    save_file({k: change(v) if k == name else v for k, v in load_file(shard).items()}, shard, {"format": "pt"})


def _break(source: Path) -> None:
    _change(source, lambda value: value.index_fill(0, torch.tensor([1]), torch.nan))


def _cut(source: Path) -> None:
    _change(source, lambda value: value[:-1].clone())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "missing, truncated or damaged"),
        (_lose, "which is not there; fetch it again"),
        (_escape, r"which is no \.safetensors file beside it"),
        (_no_index, "cannot be read"),
        (_forget, r"lacks 1 of the model's tensors \(first: model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (_disagree, "which its index says it has"),
        (_break, "NaN in model.layers.1.mlp.up_proj.weight"),
        (_cut, "as its configuration as|has model.layers.1.mlp.up_proj.weight as"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_damaged_checkpoints_are_refused(
    damage: Callable[[Path], None], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint("qwen3"), source)
    damage(source)
    with pytest.raises(UsageError, match=message):
        in_parts(source, tmp_path / "out", **TARGETS["mla"])


def test_only_safetensors_are_read(tmp_path: Path) -> None:
    make_llama().config.save_pretrained(tmp_path / "model")
    torch.save(make_llama().state_dict(), tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UsageError, match="only safetensors"):
        in_parts(tmp_path / "model", tmp_path / "out", **TARGETS["mla"])


def test_a_reader_leaves_nothing_behind(checkpoint: Callable[..., Path]) -> None:
    source = checkpoint("qwen3_moe", tie_word_embeddings=True)
    meta = load_config_only(str(source))
    expected = load_source(str(source)).model.state_dict()
    reader = CheckpointReader(source, meta, device=torch.device("cpu"), name="it")
    with reader.resident(["lm_head.weight", "model.layers.1.mlp.experts.gate_up_proj"]):
        there = {name: value for name, value in meta.state_dict().items() if not value.is_meta}
        assert meta.lm_head.weight is meta.get_input_embeddings().weight
    assert set(there) == {"lm_head.weight", "model.embed_tokens.weight", "model.layers.1.mlp.experts.gate_up_proj"}
    for name, value in there.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0)
    assert all(value.is_meta for value in meta.state_dict().values())
    assert meta.lm_head.weight is meta.get_input_embeddings().weight
    ids = tokens(1, 9)
    with reader.streaming(meta.model.layers):
        found = logits(meta, ids)
    assert deviation(found, logits(load_source(str(source)).model, ids)) <= 1e-6
    assert all(value.is_meta for value in meta.state_dict().values())

"""Checkpoints compiled layer by layer: the same result as for the loaded model, in pieces, and after being killed."""

from __future__ import annotations

import gc
import itertools
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Captured, answer, refusal
from compiled import MODULE, _remembered, deviation, logits, tokens
from families import build
from in_parts import TARGETS, TOLERANCE, assert_same, in_parts, whole
from safetensors import safe_open
from tiny_llama import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM

import attnedit
from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.model_io.checkpoint_reader import INDEX_FILE, CheckpointReader
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE


@pytest.fixture(autouse=True)
def captured_once() -> Iterator[None]:
    part = sys.modules["attnedit._checkpoint"]
    with mock.patch.object(MODULE, "capture", _remembered), mock.patch.object(part, "capture", _remembered):
        yield


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but those that tell the time."""
    timed = {"attnedit-report.json", "README.md", "report.html"}
    return {file.name: file.read_bytes() for file in directory.glob("*.*") if file.name not in timed}


@pytest.mark.parametrize(
    ("family", "target"),
    [*itertools.product(["qwen3", "llama"], TARGETS), ("qwen3_moe", "mla"), ("qwen3_moe", "gateswa")],
)
def test_the_result_is_that_of_the_loaded_model(
    family: str, target: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    options = TARGETS[target]
    source = checkpoint(family)
    assert (source / INDEX_FILE).exists()
    expected = whole(source, **options)
    report = in_parts(source, tmp_path / "out", **options)
    found = attnedit.load(tmp_path / "out")
    assert_same(found.model, expected.model)
    ids = tokens(2, 17)
    assert deviation(logits(found.model, ids), logits(expected.model, ids)) <= TOLERANCE
    # all the rest of the directory is the same, but for the file that the weights are in
    expected.save(tmp_path / "whole")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text()) == json.loads((tmp_path / "whole" / name).read_text())
    for name in ("layers", "kv_budget_achieved", "kv_bytes_after", "full_layers", "calibration_tokens"):
        ours, theirs = (getattr(each, name) for each in (report, expected.report))
        if name != "layers":
            assert ours == theirs, name
    for row, other in zip(report.layers, expected.report.layers, strict=True):
        assert (row.kind, row.kv_lora_rank, row.values_after) == (other.kind, other.kv_lora_rank, other.values_after)
        assert (row.output_error is None) == (other.output_error is None)
        assert row.output_error is None or row.output_error == pytest.approx(other.output_error, rel=1e-3, abs=1e-7)
    names = [check.what for check in report.verification]
    assert len(names) == (2 if target == "exact" else 1)
    assert report == found.report


def test_the_output_is_sharded_by_layer_and_loads_with_transformers(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    in_parts(checkpoint("qwen3"), out, **TARGETS["mla"])
    places = json.loads((out / INDEX_FILE).read_text())["weight_map"]
    assert sorted(set(places.values())) == sorted(file.name for file in out.glob("*.safetensors"))
    by_layer = {name.split(".")[2]: shard for name, shard in places.items() if ".layers." in name}
    assert len(set(by_layer.values())) == 2
    assert not (out / RUN_FILE).exists()
    assert not (out / "run").exists()
    model = AutoModelForCausalLM.from_pretrained(out)
    assert_same(model, attnedit.load(out).model, 0.0)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"shard": "50GB"}),  # one file
        ("qwen3", {"tie_word_embeddings": True}),
        ("gpt2", {}),  # transposed weights, tied embeddings, learned positions
        ("cohere2", {}),  # layers that slide stay as they are
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_other_forms_of_checkpoint(
    family: str, options: dict[str, Any], checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = checkpoint(family, **options)
    expected = whole(source, **TARGETS["mla"])
    in_parts(source, tmp_path / "out", **TARGETS["mla"])
    assert_same(attnedit.load(tmp_path / "out").model, expected.model)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_bfloat16_sources(dtype: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """The same numbers, whether they are kept or widened on the way in."""
    source = checkpoint("qwen3", dtype=torch.bfloat16)
    expected = whole(source, dtype, **TARGETS["mla"])
    in_parts(source, tmp_path / "out", dtype=dtype, **TARGETS["mla"])
    found = attnedit.load(tmp_path / "out").model
    assert found.dtype == (torch.bfloat16 if dtype == "auto" else torch.float32)
    assert_same(found, expected.model, 2e-2 if dtype == "auto" else TOLERANCE)


def test_a_base_model_is_found_under_other_names(tmp_path: Path) -> None:
    """Saved without its head, which is tied: no name begins with 'model.'."""
    model = make_llama(tie_word_embeddings=True)
    model.model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    expected = whole(tmp_path / "base", **TARGETS["mla"])
    in_parts(tmp_path / "base", tmp_path / "out", **TARGETS["mla"])
    assert_same(attnedit.load(tmp_path / "out").model, expected.model)


def test_tied_weights_that_differ_are_not_tied(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = build("qwen3")
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    model.save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    in_parts(source, tmp_path / "out", **TARGETS["mla"])
    found = attnedit.load(tmp_path / "out").model
    torch.testing.assert_close(found.lm_head.weight, model.lm_head.weight)
    torch.testing.assert_close(found.get_input_embeddings().weight, model.get_input_embeddings().weight)


@pytest.mark.long
def test_no_more_than_one_layer_is_alive(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Counted in tensors: of the weights of eight layers only one's are there while the next is worked on."""
    source = checkpoint("qwen3", num_hidden_layers=8, intermediate_size=4096)
    config = json.loads((source / "config.json").read_text())
    matrix, held = config["hidden_size"] * config["intermediate_size"], []
    fill = CheckpointReader._fill

    def filled(self: CheckpointReader, holders: set[str]) -> None:
        fill(self, holders)
        if any(f".layers.{index}.mlp" in name for index in (3, 7) for name in holders):
            gc.collect()
            tensors = [t for t in gc.get_objects() if issubclass(type(t), torch.Tensor) and not t.is_meta]
            held.append(sum(t.numel() for t in tensors if config["intermediate_size"] in t.shape) // matrix)

    with mock.patch.object(CheckpointReader, "_fill", filled):
        in_parts(source, tmp_path / "out", **TARGETS["mla"], verify=False)
    assert held == [3, 3]  # the three matrices of one layer's MLP


KILLED = """
import os, signal, sys
import torch
import attnedit
from attnedit.layerwise import Rewritten

save = Rewritten.save

def dies(self, directory):
    if self.done > {layers}:
        {death}
    save(self, directory)

Rewritten.save = dies
torch.set_num_threads(1)
ids = torch.randint(3, 64, (4, 32), generator=torch.Generator().manual_seed(1))
attnedit.compile_checkpoint(sys.argv[1], sys.argv[2], kv_budget=0.5, alternations=1, calibration=ids)
"""


def test_killed_it_goes_on_to_the_same_bytes(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Killed after a shard is written and before it is noted; the first shard is what is outside the layers."""
    source, layers = checkpoint("qwen3", num_hidden_layers=4), 2
    code = KILLED.format(layers=layers, death="os.kill(os.getpid(), signal.SIGKILL)")
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "killed"], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "killed" / RUN_FILE).exists()
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == layers + 1
    with pytest.raises(UsageError, match=r"no readable config\.json"):
        attnedit.load(tmp_path / "killed")
    done_layers: list[int] = []
    in_parts(
        source,
        tmp_path / "killed",
        **TARGETS["mla"],
        progress=lambda stage, done, total: done_layers.append(done) if stage == "rewrite layers" else None,
    )
    assert done_layers == list(range(layers, 6))
    in_parts(source, tmp_path / "whole", **TARGETS["mla"])
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_a_result_that_does_not_load_is_left_unfinished(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    part: Any = sys.modules["attnedit._checkpoint"]
    written = part.write_beside

    def damaged(output: Path, *rest: Any) -> None:
        written(output, *rest)
        config = json.loads((output / "config.json").read_text())
        del config["attnedit"]["sites"]
        (output / "config.json").write_text(json.dumps(config))

    source = checkpoint("qwen3")
    with (
        mock.patch.object(part, "write_beside", damaged),
        pytest.raises(AttneditError, match="does not load, so the run is left unfinished"),
    ):
        in_parts(source, tmp_path / "out", **TARGETS["mla"])
    assert (tmp_path / "out" / RUN_FILE).exists()
    in_parts(source, tmp_path / "out", **TARGETS["mla"])
    assert not (tmp_path / "out" / RUN_FILE).exists()
    attnedit.load(tmp_path / "out")


@pytest.fixture
def unfinished(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A run that an error ended in the middle."""
    source = checkpoint("qwen3")

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "rewrite layers" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        in_parts(source, tmp_path / "out", **TARGETS["mla"], progress=stop)
    return tmp_path / "out"


def test_another_recipe_does_not_go_on(unfinished: Path, checkpoint: Callable[..., Path]) -> None:
    source, before = checkpoint("qwen3"), contents(unfinished)
    for changed, name in (
        ({**TARGETS["mla"], "kv_budget": 0.25}, "kv_budget"),
        ({**TARGETS["mla"], "seed": 7}, "seed"),
        ({**TARGETS["mla"], "dtype": "float32"}, "dtype"),
        (TARGETS["gateswa"], "target"),
    ):
        with pytest.raises(UsageError, match=rf"unfinished run of another recipe \({name} "):
            in_parts(source, unfinished, **changed)
    with pytest.raises(UsageError, match="calibration data is not what the run"):
        in_parts(source, unfinished, **TARGETS["mla"], calibration=tokens(4, 32, seed=5))
    assert contents(unfinished) == before
    in_parts(source, unfinished, **TARGETS["gateswa"], overwrite=True)
    assert attnedit.load(unfinished).report.target == "gateswa"


def test_a_directory_of_someone_else_is_left_alone(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"not empty|did not write"):
            in_parts(checkpoint("qwen3"), tmp_path, **TARGETS["mla"], overwrite=overwrite)
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "gateswa", "window": 4}, "measured loss takes passes through the whole model"),
        ({"target": "gateswa", "window": 4, "kv_budget": 0.6}, "measured loss"),
        ({"calibration": None}, "own samples take passes"),
        ({"target": "gateswa", "window": 124, "full_layers": "1,"}, "lose nothing to it"),
        ({"kv_budget": 0.01}, "cannot be met"),
    ],
    ids=["count", "budget", "samples", "window", "small"],
)
def test_what_needs_the_whole_model_is_refused(
    options: dict[str, Any], message: str, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        in_parts(checkpoint("qwen3"), tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, saved_llama: Path, text_file: Path, capsys: Captured) -> None:
    common = [saved_llama, "--calibration", text_file, "--calibration-tokens", 512, "--alternations", 0]
    out = tmp_path / "parts"
    found = answer(capsys, "compile", *common, "--low-memory", "-o", out)
    expected = answer(capsys, "compile", *common, "-o", tmp_path / "whole")
    assert found["kv_budget_achieved"] == expected["kv_budget_achieved"]
    assert found["recipe"] == expected["recipe"]
    assert_same(attnedit.load(out).model, attnedit.load(tmp_path / "whole").model)
    assert attnedit.load(out).tokenizer is not None
    assert {file.name for file in out.iterdir()} >= {"README.md", "attnedit-recipe.yaml", "tokenizer.json"}
    assert answer(capsys, "generate", out, "--prompt", "a", "--max-new-tokens", 3)["new_tokens"] == 3
    low = ["compile", *common, "--low-memory", "-o"]
    assert "not empty" in refusal(capsys, *low, out)
    assert "fit_steps needs the whole model" in refusal(capsys, *low, tmp_path / "x", "--fit-steps", 3)
    assert "dequantize needs the whole model" in refusal(capsys, *low, tmp_path / "x", "--dequantize")
    assert "allocation loss needs the whole" in refusal(capsys, *low, tmp_path / "x", "--allocation", "loss")
    nothing = [saved_llama, "--low-memory", "-o", tmp_path / "x"]
    assert "own samples" in refusal(capsys, "compile", *nothing)
    assert "safetensors" in refusal(capsys, "compile", "smollm2", *low[2:], tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_the_command_goes_on(tmp_path: Path, saved_llama: Path, text_file: Path, capsys: Captured) -> None:
    out = tmp_path / "parts"
    command = [
        "compile",
        saved_llama,
        "--calibration",
        text_file,
        "--calibration-tokens",
        512,
        "--low-memory",
        "-o",
        out,
    ]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with mock.patch("attnedit._checkpoint.write_index", stop):
        assert "interrupted" in refusal(capsys, *command, code=130)
    assert "unfinished attnedit run" in refusal(capsys, "eval", out, "--text", text_file)
    assert "another recipe (seed 0 there, 3 here)" in refusal(capsys, *command, "--seed", 3)
    assert answer(capsys, *command)["sites_rewritten"] == 2
    with safe_open(next(out.glob("*.safetensors")), framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tokenizers_come_along(tmp_path: Path) -> None:
    make_llama().save_pretrained(tmp_path / "model")
    in_parts(tmp_path / "model", tmp_path / "out", **TARGETS["exact"], calibration=None, tokenizer=make_tokenizer())
    assert attnedit.load(tmp_path / "out").tokenizer is not None

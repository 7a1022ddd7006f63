"""Checkpoints that bring modelling code: it runs for who trusts it, and for nobody else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_llama import make_llama
from transformers import PreTrainedTokenizerFast

import attnedit
from attnedit.cli import main
from attnedit.compiler.compatibility.caches import cache_parameter
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import load_config_only, load_source

CODE = """
import pathlib

from transformers import LlamaConfig, LlamaForCausalLM

from .own_parts import FACTOR

pathlib.Path({mark!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = {config}

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, {cache}=None, **kwargs):
        kwargs |= {{"position_ids": position_ids, "{cache}": {cache}}}
        result = super().forward(input_ids, attention_mask, **kwargs)
        result.logits = result.logits * FACTOR
        return result
"""
OWN = {"AutoConfig": "own_model.OwnConfig", "AutoModelForCausalLM": "own_model.OwnForCausalLM"}
MODEL_ONLY = {"AutoModelForCausalLM": "own_model.OwnForCausalLM"}
IDS = torch.arange(3, 24).view(1, -1)


@pytest.fixture(autouse=True)
def own_modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the copies that transformers imports out of the user's cache; one place for all, as Python imports once."""
    place = tmp_path_factory.getbasetemp() / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(place))


@pytest.fixture(params=["own configuration", "configuration of llama"])
def directory(request: pytest.FixtureRequest, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A tiny checkpoint whose code writes a file when it is imported, and whose model is no Llama."""
    directory = tmp_path / "source"
    llama = make_llama()
    llama.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    own = request.param == "own configuration"
    names = {"config": "OwnConfig" if own else "LlamaConfig", "cache": cache_parameter(llama)}
    code = CODE.format(mark=str(tmp_path / "mark"), **names)
    (directory / "own_model.py").write_text(code)
    (directory / "own_parts.py").write_text("FACTOR = 2.0\n")
    config = json.loads((directory / "config.json").read_text())
    config |= {"auto_map": OWN if own else MODEL_ONLY, "architectures": ["OwnForCausalLM"]}
    config |= {"model_type": "own"} if own else {}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


COMMANDS: dict[str, Callable[[str, str], list[str]]] = {
    "inspect": lambda model, out: ["inspect", model],
    "compile": lambda model, out: ["compile", model, "-o", out],
    "low memory": lambda model, out: ["compile", model, "--low-memory", "--kv-budget", "1", "-o", out],
    "export": lambda model, out: ["export", model, "--to", "onnx", "-o", out],
    "generate": lambda model, out: ["generate", model, "--prompt", "a"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_without_trust_nothing_of_it_runs(
    command: str, directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(COMMANDS[command](str(directory), str(tmp_path / "out"))) == 2
    line = capsys.readouterr().err
    assert "--trust-remote-code (trust_remote_code=True)" in line
    assert line.count("\n") == 1
    assert not (tmp_path / "mark").exists()


def test_a_result_keeps_the_code_and_asks_again(directory: Path, tmp_path: Path) -> None:
    source = load_source(str(directory), trust_remote_code=True)
    assert (tmp_path / "mark").exists()
    plain = make_llama()(IDS).logits
    expected = source.model(IDS).logits
    torch.testing.assert_close(expected, 2 * plain)
    result = attnedit.compile(source.model, "mla", kv_budget=1.0, tokenizer=source.tokenizer)
    torch.testing.assert_close(result.model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    saved = result.save(tmp_path / "result")
    assert {"own_model.py", "own_parts.py"} <= {file.name for file in saved.iterdir()}
    assert "auto_map" not in json.loads((saved / "config.json").read_text())
    shutil.rmtree(directory)
    (tmp_path / "mark").unlink()
    for load in (attnedit.load, load_source, load_config_only):
        with pytest.raises(UsageError, match="--trust-remote-code"):
            load(str(saved))  # type: ignore[operator]
    assert not (tmp_path / "mark").exists()
    again = attnedit.load(saved, trust_remote_code=True).model
    assert torch.equal(again(IDS).logits, result.model(IDS).logits)
    assert type(again).__name__ == "AttneditOwnForCausalLM"
    assert again.generate(IDS, max_new_tokens=3, do_sample=False).shape == (1, 24)
    copy = attnedit.load(saved, trust_remote_code=True).save(tmp_path / "copy")
    assert torch.equal(attnedit.load(copy, trust_remote_code=True).model(IDS).logits, result.model(IDS).logits)
    plain_result = attnedit.compile(make_llama(), "mla", kv_budget=1.0).save(tmp_path / "plain")
    assert type(attnedit.load(plain_result).model).__name__ == "AttneditLlamaForCausalLM"
    with pytest.raises(UsageError, match="not one of transformers' own"):
        result.export("hf", tmp_path / "remote", profile="remote")


def test_layer_by_layer(directory: Path, tmp_path: Path) -> None:
    attnedit.compile_checkpoint(directory, tmp_path / "result", kv_budget=1.0, trust_remote_code=True)
    loaded = attnedit.load(tmp_path / "result", trust_remote_code=True).model
    torch.testing.assert_close(loaded(IDS).logits, 2 * make_llama()(IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.long
def test_training_and_the_command_line(directory: Path, tmp_path: Path, text_file: Path) -> None:
    trust, out, trained = "--trust-remote-code", str(tmp_path / "out"), str(tmp_path / "trained")
    data = ["--calibration", str(text_file), "--calibration-tokens", "512", "--seq-len", "64", "--alternations", "0"]
    assert main(["compile", str(directory), trust, *data, "--fit-steps", "1", "-o", out]) == 0
    assert main(["generate", out, trust, "--prompt", "a", "--max-new-tokens", "2"]) == 0
    calibrate = ["calibrate", out, "--teacher", str(directory), trust, *data[:2], "--seq-len", "64", "--fit-steps", "1"]
    assert main([*calibrate, "-o", trained]) == 0
    assert main(["export", trained, trust, "--to", "onnx", "-o", str(tmp_path / "onnx")]) == 0


def test_classes_that_transformers_has_adopted_need_no_code(saved_llama: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(saved_llama, tmp_path / "adopted"))
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "hub/old--code.LlamaConfig", "AutoModelForCausalLM": "code.LlamaForCausalLM"}
    (directory / "config.json").write_text(json.dumps(config))
    assert type(load_source(str(directory)).model).__module__.startswith("transformers.models.llama")


def test_code_that_fails_is_bad_input(directory: Path) -> None:
    (directory / "own_model.py").write_text("this is no Python\n")
    with pytest.raises(UsageError, match="cannot read the"):
        load_source(str(directory), trust_remote_code=True)

"""The command line: output, exit codes, and one line on stderr for whatever goes wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MambaConfig, MambaForCausalLM, T5Config

import attnedit
from attnedit.cli import inspect, main
from attnedit.cli.demo import run as run_demo
from attnedit.compiler.models import Source

Captured = pytest.CaptureFixture[str]


def answer(capsys: Captured, *arguments: object) -> dict[str, Any]:
    """Run a command that must succeed with ``--json`` and nothing on stderr."""
    code = main([*map(str, arguments), "--json"])
    captured = capsys.readouterr()
    assert (code, captured.err) == (0, "")
    value = json.loads(captured.out)
    assert isinstance(value, dict)
    return value


def refusal(capsys: Captured, *arguments: object, code: int = 2) -> str:
    """Run a command that must fail with one line on stderr and nothing on stdout."""
    assert main([*map(str, arguments)]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("attnedit: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_inspect_needs_no_weights(saved_llama: Path, tmp_path: Path, capsys: Captured) -> None:
    (tmp_path / "config.json").write_bytes((saved_llama / "config.json").read_bytes())
    facts = answer(capsys, "inspect", tmp_path)
    assert facts["sites"] == 2
    assert facts["kv_values_per_token_layer"] == 64
    assert facts["kv_bytes_per_token"] == 2 * 64 * 4
    assert facts["parameters"] == make_llama().num_parameters()
    (kind,) = facts["kinds"]
    assert kind["layers"] == [0, 1]
    assert (kind["num_attention_heads"], kind["num_key_value_heads"], kind["head_dim"]) == (4, 2, 16)
    assert kind["rope"] == {"style": "half", "frequencies": 8}


def test_inspect_prints_a_table(saved_llama: Path, capsys: Captured) -> None:
    assert main(["inspect", str(saved_llama)]) == 0
    out = capsys.readouterr().out
    assert "0-1" in out
    assert "64 values per token and layer" in out


def test_eval(saved_llama: Path, text_file: Path, capsys: Captured) -> None:
    figures = answer(capsys, "eval", saved_llama, "--text", text_file, "--seq-len", 64, "--windows", 3)
    assert 200 < figures["perplexity"] < 320
    assert figures["tokens"] == 3 * 63
    assert figures["kv_values_per_token_layer"] == 64
    assert figures["kv_bytes_per_token"] == 512
    assert main(["eval", str(saved_llama), "--text", str(text_file), "--seq-len", "64", "--windows", "3"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_generate_is_greedy_by_default(saved_llama: Path, capsys: Captured) -> None:
    first = answer(capsys, "generate", saved_llama, "--prompt", "Hello", "--max-new-tokens", 5)
    assert first["new_tokens"] <= 5
    assert first == answer(capsys, "generate", saved_llama, "--prompt", "Hello", "--max-new-tokens", 5)
    assert main(["generate", str(saved_llama), "--prompt", "Hello", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("Hello")


def test_sampling_follows_the_seed(saved_llama: Path, capsys: Captured) -> None:
    command = ("generate", saved_llama, "--prompt", "Hello", "--temperature", 1, "--seed")
    assert answer(capsys, *command, 1) == answer(capsys, *command, 1)
    assert answer(capsys, *command, 1)["text"] != answer(capsys, *command, 2)["text"]


@pytest.fixture(scope="module")
def compiled(saved_llama: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("compiled") / "out"
    command = ["compile", saved_llama, "--kv-budget", "0.5", "--calibration", text_file, "-o", directory]
    assert main([*map(str, command), "--calibration-tokens", "2048"]) == 0
    return directory


def test_compile_saves_a_model_that_transformers_loads(compiled: Path, capsys: Captured, text_file: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(compiled)
    assert model.config.model_type == "attnedit"
    figures = answer(capsys, "eval", compiled, "--text", text_file, "--seq-len", 64, "--windows", 3)
    assert figures["kv_values_per_token_layer"] == 32
    result = attnedit.load(compiled)
    assert result.report.kv_budget_achieved == pytest.approx(0.5)
    assert answer(capsys, "generate", compiled, "--prompt", "Hello")["new_tokens"] <= 20


def test_compile_reports(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    command = ("compile", saved_llama, "--kv-budget", 0.25, "--calibration", text_file, "--calibration-tokens", 1024)
    report = answer(capsys, *command, "-o", tmp_path / "out")
    assert (report["sites_matched"], report["sites_rewritten"]) == (2, 2)
    assert report["kv_budget_asked"] == 0.25
    assert report["kv_budget_achieved"] <= 0.25
    assert report["kv_bytes_before"] == 512
    assert len(report["layers"]) == 2
    assert main([*map(str, command), "-o", str(tmp_path / "table")]) == 0
    assert "KV cache" in capsys.readouterr().out


def test_compile_refuses_a_directory_in_use(
    compiled: Path, saved_llama: Path, tmp_path: Path, capsys: Captured
) -> None:
    directory = tmp_path / "kept"
    directory.mkdir()
    (directory / "thesis.tex").write_text("years of work")
    assert "is not empty" in refusal(capsys, "compile", saved_llama, "-o", directory)
    assert [file.name for file in directory.iterdir()] == ["thesis.tex"]
    assert "is not empty" in refusal(capsys, "compile", saved_llama, "-o", compiled)


def test_sweep_writes_table_and_plot(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    output = tmp_path / "sweep"
    command = ("sweep", saved_llama, "--kv-budgets", "0.5,0.25", "--text", text_file, "--calibration", text_file)
    options = ("--calibration-tokens", 1024, "--seq-len", 64, "--windows", 3, "-o", output)
    summary = answer(capsys, *command, *options)
    assert [row["kv_budget"] for row in summary["rows"]] == [None, 0.5, 0.25]
    assert [row["kv_values_per_token_layer"] for row in summary["rows"]] == [64, 32, 16]
    assert json.loads((output / "sweep.json").read_text()) == summary
    assert (output / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert main([*map(str, command), *map(str, options), "--overwrite"]) == 0
    assert "perplexity" in capsys.readouterr().out


def test_the_demo_in_small() -> None:
    source = Source(make_llama(), make_tokenizer(), "tiny")
    outcome, result = run_demo(source, calibration_tokens=1024, windows=2, seq_len=64)
    assert outcome["result"]["kv_values_per_token_layer"] == outcome["source"]["kv_values_per_token_layer"] / 2
    assert result.report.sites_rewritten == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command"),
        (["transmogrify"], "No such command"),
        (["inspect"], "Missing argument 'MODEL'"),
        (["inspect", "x", "--wrong"], "No such option"),
        (["compile", "x"], "Missing option '--output'"),
        (["compile", "x", "-o", "y", "--kv-budget", "2"], "kv budget 2"),
        (["compile", "x", "-o", "y", "--kv-budget", "half"], "--kv-budget"),
        (["compile", "./x", "-o", "y", "--calibration", "gone.txt"], "calibration text gone.txt does not exist"),
        (["compile", "./x", "-o", "y"], "./x does not exist"),
        (["eval", "./x", "--text", "gone.txt"], "evaluation text gone.txt does not exist"),
        (["generate", "./x", "--prompt", "a", "--dtype", "int3"], "unknown dtype"),
        (["sweep", "./x", "--text", __file__, "-o", "y", "--kv-budgets", "0.5;0.2"], "separated by commas"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: list[str], message: str, capsys: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in refusal(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


def save(model: Any, directory: Path) -> Path:
    model.save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)
    return directory


def test_a_model_without_attention(tmp_path: Path, capsys: Captured) -> None:
    config = MambaConfig(vocab_size=260, hidden_size=16, num_hidden_layers=1, state_size=4)
    source = save(MambaForCausalLM(config), tmp_path / "mamba")
    refusal(capsys, "inspect", source)
    refusal(capsys, "compile", source, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder(tmp_path: Path, capsys: Captured) -> None:
    T5Config(num_layers=1).save_pretrained(tmp_path / "t5")
    assert "encoder-decoder" in refusal(capsys, "inspect", tmp_path / "t5")


def test_broken_weights_leave_nothing_behind(tmp_path: Path, capsys: Captured) -> None:
    model = make_llama()
    model.model.layers[0].self_attn.k_proj.weight.data[0, 0] = float("nan")
    source = save(model, tmp_path / "nan")
    assert "NaN" in refusal(capsys, "compile", source, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("text", "message"), [("", "holds no text"), ("Too short.", "is too short: 10 tokens")])
def test_short_calibration_leaves_nothing_behind(
    text: str, message: str, saved_llama: Path, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "notes.txt").write_text(text)
    calibration = ("--calibration", tmp_path / "notes.txt")
    assert message in refusal(capsys, "compile", saved_llama, *calibration, "-o", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_budget_that_cannot_be_met_names_the_smallest(
    saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    command = ("compile", saved_llama, "--kv-budget", 0.0001, "--calibration", text_file, "-o", tmp_path / "out")
    assert "ask for at least that" in refusal(capsys, *command)
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_is_named(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    command = ("compile", saved_llama, "--target", "magic", "--calibration", text_file, "-o", tmp_path / "out")
    assert "magic" in refusal(capsys, *command)


def test_the_output_may_not_be_a_file(saved_llama: Path, text_file: Path, capsys: Captured) -> None:
    assert "is a file" in refusal(capsys, "compile", saved_llama, "-o", text_file)


def test_an_evaluation_text_that_is_too_short(saved_llama: Path, text_file: Path, capsys: Captured) -> None:
    command = ("eval", saved_llama, "--text", text_file, "--seq-len", 128, "--windows", 5000)
    assert "ask for at most 78" in refusal(capsys, *command)


def test_errors_are_one_object_with_json(capsys: Captured) -> None:
    assert main(["inspect", "./gone", "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exit_code"] == 2
    assert captured.err.count("\n") == 1


def fail_inside(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(inspect, "load_config_only", raise_it)


def test_what_was_not_foreseen_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    fail_inside(monkeypatch, ZeroDivisionError("odd\nthing"))
    message = refusal(capsys, "inspect", "x", code=1)
    assert "unexpected ZeroDivisionError: odd thing" in message
    assert "ATTNEDIT_DEBUG=1" in message
    monkeypatch.setenv("ATTNEDIT_DEBUG", "1")
    assert main(["inspect", "x"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    fail_inside(monkeypatch, KeyboardInterrupt())
    assert refusal(capsys, "inspect", "x", code=130) == "attnedit: interrupted\n"


def test_a_failed_job_is_1(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    fail_inside(monkeypatch, attnedit.VerificationError("layer 3 differs"))
    assert "layer 3 differs" in refusal(capsys, "inspect", "x", code=1)


def test_the_installed_command_keeps_stderr_clean(saved_llama: Path) -> None:
    command = [str(Path(sys.executable).with_name("attnedit")), "inspect", str(saved_llama), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, "COLUMNS": "80"})
    assert done.stderr == ""
    assert json.loads(done.stdout)["sites"] == 2
    done = subprocess.run([*command[:2], "./gone"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_commands_leave_the_source_as_it_is(saved_llama: Path, compiled: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved_llama)
    expected = make_llama().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())

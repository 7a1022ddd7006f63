"""The command line: output and exit codes; test_bad_input.py has what each command refuses."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import Captured, answer, refusal
from tiny_llama import make_llama, make_tokenizer
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import attnedit
from attnedit.cli import inspect, main
from attnedit.cli.demo import run as run_demo
from attnedit.cli.terminal import ProgressBars
from attnedit.compiler.model_io.models import Source


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


def test_more_alternations_fit_better(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    errors = []
    for rounds in (0, 2):
        options = ("--calibration", text_file, "--calibration-tokens", 1024, "--kv-budget", 0.25, "-o")
        command = ("compile", saved_llama, "--alternations", rounds, *options, tmp_path / str(rounds))
        errors.append(sum(layer["output_error"] for layer in answer(capsys, *command)["layers"]))
    assert errors[1] < errors[0]


def test_every_stage_tells_progress(
    saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: dict[str, list[tuple[int, int]]] = {}
    monkeypatch.setattr(
        ProgressBars, "__call__", lambda _, stage, done, total: steps.setdefault(stage, []).append((done, total))
    )

    def stages(*command: object) -> set[str]:
        steps.clear()
        answer(capsys, *command)
        for told in steps.values():
            assert told[0][0] == 0
            assert told[-1][0] == told[-1][1]
        return set(steps)

    fit = ("--calibration-tokens", 64, "--alternations", 0, "-o")
    measure = ("--text", text_file, "--seq-len", 32, "--windows", 2)
    fitting = {"load model", "sample calibration text", "capture", "fit layers", "verify"}
    assert stages("compile", saved_llama, *fit, tmp_path / "a") == {*fitting, "save"}
    assert steps["fit layers"] == [(0, 2), (1, 2), (2, 2)]
    exact = {"load model", "capture", "build layers", "verify", "save"}
    given = ("--calibration", text_file, "--kv-budget", 1)
    assert stages("compile", saved_llama, *given, *fit, tmp_path / "b") == exact
    assert stages("sweep", saved_llama, *measure, *fit, tmp_path / "c", "--kv-budgets", 0.5) == {
        *fitting,
        "tokenise",
        "evaluate",
    }
    assert stages("eval", saved_llama, *measure) == {"load model", "tokenise", "evaluate"}
    assert stages("inspect", saved_llama) == {"capture"}


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
        (["compile", "x", "-o", "y", "--kv-budget", "2"], "kv_budget must be above 0 and at most 1, got 2"),
        (["compile", "x", "-o", "y", "--kv-budget", "half"], "--kv-budget"),
        (["compile", "x", "-o", "y", "--allocation", "best"], "allocation must be one of auto, even, loss"),
        (["compile", "x", "-o", "y", "--repeats", "2"], "repeats must be from 0 to 1"),
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
    quiet = importlib.util.find_spec("torchao") is None  # it writes there itself when transformers imports it
    assert done.stderr == "" or not quiet
    assert json.loads(done.stdout)["sites"] == 2
    done = subprocess.run([*command[:2], "./gone"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1].startswith("attnedit: ")
    assert done.stderr.count("\n") == 1 or not quiet


def test_the_package_runs_as_the_command(monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
    monkeypatch.setattr(sys, "argv", ["attnedit", "inspect", "./gone"])
    monkeypatch.delitem(sys.modules, "attnedit.cli.__main__", raising=False)  # where all modules were imported before
    with pytest.raises(SystemExit, match="2"):
        runpy.run_module("attnedit.cli", run_name="__main__")
    assert capsys.readouterr().err.startswith("attnedit: ./gone does not exist")


def test_commands_leave_the_source_as_it_is(saved_llama: Path, compiled: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(saved_llama)
    expected = make_llama().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


INTERRUPTED = """
import os, signal, sys

class Finder:  # asked first for every module
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1]:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
from attnedit.cli import main
sys.exit(main(["generate", "smollm2", "--prompt", "a"]))
"""


@pytest.mark.parametrize("module", ["torch", "torch.nn.functional", "transformers", "typer"])
def test_an_interrupt_while_a_library_is_imported(module: str) -> None:
    command = [sys.executable, "-c", INTERRUPTED, module, "attnedit.cli"]  # the name that says whose command it is
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.splitlines()[-1] == "attnedit: interrupted"
    assert "Traceback" not in done.stderr

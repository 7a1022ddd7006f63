"""Calibration from end to end: `attnedit.compile` and `attnedit calibrate` with training, stopped and gone on with."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import Captured, answer, refusal
from compiled import MODULE, _remembered, deviation, in_pieces, logits, source, tokens
from safetensors.torch import load_file
from tiny_llama import make_llama

import attnedit
from attnedit._calibrate import training_batches
from attnedit.compiler.data.sampling import own_windows
from attnedit.options import CalibrateOptions
from attnedit.passes.calibration.batches import Batches
from attnedit.passes.calibration.journal import LOG_FILE, PLOT_FILE, STATE_FILE
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE

FORMS: dict[str, dict[str, Any]] = {
    "mla": {"kv_budget": 0.5},
    "gateswa": {"window": 4, "full_layers": 0, "gate": "head", "sinks": "logit"},
    "gateswa+mla": {"window": 4, "full_layers": 1},
}
TRAINING = {"fit_steps": 12, "distill_steps": 12, "batch_size": 8, "seq_len": 32, "fit_learning_rate": 0.002}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]


def compiled(family: str, target: str, **options: Any) -> attnedit.CompileResult:
    settings = {"calibration": tokens(64, 32), **FORMS[target], **TRAINING, **options}
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(source(family), target, **settings)


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_training_lowers_the_losses_and_keeps_the_contracts(family: str, target: str) -> None:
    if (family, target) == ("gemma2", "gateswa+mla"):
        pytest.skip("its one layer without window cannot be both")
    model = source(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    result = compiled(family, target)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert not result.model.training
    fit, distill = result.report.stages
    assert fit.best <= fit.before
    assert distill.best < distill.before or (distill.best == distill.before and family == "gpt2")  # 2e-5 at first
    assert set(result.report.perplexity) == {"source", "start", "fit", "distill"}
    assert [check.error is not None for check in result.report.verification] == [True, True]
    ids = tokens(2, 20, seed=5)
    pieces, _ = in_pieces(result.model, ids, torch.ones_like(ids), [9, 1, 10])
    assert deviation(pieces, logits(result.model, ids)) < 1e-4
    assert type(result.report).from_json(result.report.to_json()) == result.report
    assert "held-out loss" in str(result.report)


@pytest.mark.long
def test_same_seed_same_result_another_seed_another() -> None:
    ids = tokens(2, 20, seed=5)
    one, same, other = (logits(compiled("llama", "mla", seed=seed).model, ids) for seed in (3, 3, 4))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_noise_is_for_distillation_alone() -> None:
    """Fitting may take hidden states from disk, and the best state is chosen on text as it is."""
    seen: list[tuple[int, float]] = []
    noisy = Batches.noisy

    def watched(self: Batches, step: int, fraction: float) -> torch.Tensor:
        seen.append((step, fraction))
        return noisy(self, step, fraction)

    with mock.patch.object(Batches, "noisy", watched):
        spoilt = compiled("llama", "mla", fit_steps=2, token_noise=0.3)
    assert seen == [(step, 0.3) for step in range(2, 14)]
    plain = compiled("llama", "mla", fit_steps=2)
    (fit, distill), (same_fit, other) = spoilt.report.stages, plain.report.stages
    assert (fit.before, fit.best, distill.before) == (same_fit.before, same_fit.best, other.before)
    ids = tokens(2, 20, seed=5)
    assert not torch.equal(logits(spoilt.model, ids), logits(plain.model, ids))


def test_a_text_learned_by_heart_is_told_of() -> None:
    """Sixteen windows, gone through again and again, with all weights: what is left of the loss is memory."""
    few: dict[str, Any] = {"calibration": tokens(16, 32), "train": "all", "distill_learning_rate": 0.02, "fit_steps": 0}
    result = compiled("llama", "mla", distill_steps=80, evaluate_every=20, **few)
    (stage,) = result.report.stages
    assert stage.trained_on is not None
    assert stage.best > 1.8 * stage.trained_on
    assert [note for note in result.report.notes if "learned by heart" in note and "self_generated" in note]
    (stage,) = compiled("llama", "mla", **few, distill_steps=80, token_noise=0.3).report.stages
    assert stage.trained_on is not None
    assert stage.best < 1.8 * stage.trained_on


def test_own_samples_are_kept_for_the_next_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATTNEDIT_CACHE", str(tmp_path))
    options = {"fit_steps": 0, "distill_steps": 4, "self_generated": 0.5}
    first = compiled("llama", "mla", **options)
    (file,) = tmp_path.rglob("*.safetensors")
    written = file.stat().st_mtime_ns
    with mock.patch("attnedit.compiler.data.sampling.sample_windows", side_effect=AssertionError("sampled again")):
        again = compiled("llama", "mla", **options)
    assert file.stat().st_mtime_ns == written
    ids = tokens(2, 20, seed=5)
    assert torch.equal(logits(first.model, ids), logits(again.model, ids))
    compiled("llama", "mla", **{**options, "seed": 1})
    assert len(list(tmp_path.rglob("*.safetensors"))) == 2


def test_more_samples_begin_with_those_there_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr("attnedit.compiler.data.sampling.CHUNK", 4)
    steps: list[tuple[int, int]] = []
    few = own_windows(source("llama"), None, count=4, length=9)
    more = own_windows(source("llama"), None, count=10, length=9, progress=lambda _, *step: steps.append(step))
    assert torch.equal(more[:4], few)
    assert len({tuple(row) for row in more.tolist()}) == 10
    assert len(list(tmp_path.rglob("*.safetensors"))) == 3
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1]


@pytest.mark.parametrize("prefixed", [False, True])
def test_samples_go_on_from_the_text(prefixed: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Half of them; where every window of the text begins with the first token, these do too."""
    monkeypatch.setenv("ATTNEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr("attnedit.compiler.data.sampling.PROMPT", 5)
    first = int(own_windows(source("llama"), None, count=1, length=2)[0, 0])
    text = torch.arange(3, 51).view(3, 16)  # ascending, which samples of random weights are not
    if prefixed:
        text[:, 0] = first
    windows = own_windows(source("llama"), None, count=64, length=12, text=text)
    alone, prompted = windows[torch.arange(64) % 4 < 2], windows[torch.arange(64) % 4 >= 2]
    assert (alone[:, 0] == first).all()
    assert len(set(alone[1::2, 1].tolist())) > 8  # random tokens
    skipped = int(prefixed)
    assert (prompted[:, 0] == first).all() == prefixed
    assert (prompted[:, 1 + skipped : 5].diff() == 1).all()
    inside = prompted[:, skipped:5].flatten()
    assert all(int(token) in text for token in inside)
    assert len(set(prompted[:, 4].tolist())) > 8  # from many places
    assert not (prompted[:, 4:].diff() == 1).all(1).any()
    other = own_windows(source("llama"), None, count=64, length=12, text=text + 1)
    assert not torch.equal(other, windows)


def test_samples_do_not_go_on_from_what_is_held_out() -> None:
    """Else training would see pieces of the windows that its best state is chosen by."""
    data = torch.stack([torch.full((16,), row) for row in range(60)])
    options = CalibrateOptions(calibration=data, distill_steps=20, batch_size=8, seq_len=16, self_generated=0.5)
    with mock.patch.object(
        sys.modules["attnedit._calibrate"], "own_windows", return_value=torch.full((4, 16), 63)
    ) as sampled:
        batches = training_batches(source("llama"), options, None)
    held = set(batches.held_out[:, 0].tolist()) - {63}
    text = set(sampled.call_args.kwargs["text"][:, 0].tolist())
    assert held
    assert text == set(range(60)) - held


def test_long_windows_are_packed_from_samples(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ATTNEDIT_CACHE", str(tmp_path))
    monkeypatch.setattr("attnedit.compiler.data.sampling.SAMPLE_LENGTH", 8)
    windows = own_windows(source("llama"), None, count=5, length=21)
    assert windows.shape == (5, 21)
    first = int(windows[0, 0])
    assert (windows[:, ::7] == first).all()  # three samples of 7, each from the first token
    assert len({tuple(row) for row in windows.view(15, 7).tolist()}) == 15


def test_a_saved_result_is_trained_further(tmp_path: Path) -> None:
    few = {"calibration_tokens": 128, "alternations": 0}  # which leaves something to learn
    compiled("qwen3", "mla", fit_steps=0, distill_steps=0, **few).save(tmp_path / "one-shot")
    teacher, result = source("qwen3"), attnedit.load(tmp_path / "one-shot")
    training = {"distill_steps": 10, "batch_size": 8, "seq_len": 32, "distill_learning_rate": 0.002}
    trained = attnedit.calibrate(result, teacher, calibration=tokens(64, 32), **training)
    (stage,) = trained.report.stages
    assert stage.best < stage.before
    theirs = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert all(p.data_ptr() in theirs for name, p in trained.model.named_parameters() if ".self_attn." not in name)
    with pytest.raises(attnedit.UsageError, match="does not fit"):
        attnedit.calibrate(trained, make_llama(), calibration=tokens(64, 32), **training)
    with pytest.raises(attnedit.UsageError, match="rewritten model itself"):
        attnedit.calibrate(trained, trained.model, calibration=tokens(64, 32), **training)
    with pytest.raises(attnedit.UsageError, match="nothing to train"):
        attnedit.calibrate(trained, teacher, calibration=tokens(64, 32))


def test_in_place_leaves_no_teacher() -> None:
    with pytest.raises(attnedit.UsageError, match="in_place"):
        compiled("llama", "mla", in_place=True)


def test_commands(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    data = ["--calibration", text_file, "--calibration-tokens", 4096, "--alternations", 0]
    found = answer(capsys, "compile", saved_llama, "-o", tmp_path / "trained", *data, *OPTIONS)
    assert [stage["name"] for stage in found["stages"]] == ["fit", "distill"]
    assert sorted(found["perplexity"]) == ["distill", "fit", "source", "start"]
    made = {file.name for file in (tmp_path / "trained").iterdir()}
    assert {LOG_FILE, PLOT_FILE} <= made
    assert not {RUN_FILE, STATE_FILE, "start"} & made
    lines = (tmp_path / "trained" / LOG_FILE).read_text().splitlines()
    steps = [stage["steps"] for stage in found["stages"]]
    assert [json.loads(line)["stage"] for line in lines] == ["fit"] * steps[0] + ["distill"] * steps[1]
    more = ["--teacher", saved_llama, "--calibration", text_file, "--distill-steps", 4, "--batch-size=8"]
    again = answer(capsys, "calibrate", tmp_path / "trained", *more, "--seq-len=32", "-o", tmp_path / "more")
    assert [stage["name"] for stage in again["stages"]] == ["fit", "distill", "distill"]
    assert "not empty" in refusal(capsys, "calibrate", tmp_path / "trained", *more, "-o", tmp_path / "more")
    assert "itself" in refusal(capsys, "calibrate", tmp_path / "trained", *more, "-o", tmp_path / "trained")
    assert "nothing to train" in refusal(
        capsys, "calibrate", tmp_path / "trained", "--teacher", saved_llama, "-o", tmp_path / "x"
    )
    assert "no directory" in refusal(capsys, "calibrate", tmp_path / "none", *more, "-o", tmp_path / "x")
    assert "attention, norms, all" in refusal(capsys, "compile", saved_llama, "-o", tmp_path / "x", "--train", "heads")
    assert not (tmp_path / "x").exists()


@pytest.mark.long
def test_an_unfinished_run_is_gone_on_with_by_its_recipe_alone(
    saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    arguments = ["compile", saved_llama, "--calibration", text_file, "--calibration-tokens", 4096, *OPTIONS]
    arguments += ["--alternations", 0, "--checkpoint-every", 5]
    whole = answer(capsys, *arguments, "-o", tmp_path / "whole")
    stop = KeyboardInterrupt()
    with mock.patch("attnedit.passes.calibration.run._distill", side_effect=stop):
        assert attnedit_main(*arguments, "-o", tmp_path / "stopped") == 130
    capsys.readouterr()
    assert (tmp_path / "stopped" / RUN_FILE).exists()
    other = refusal(capsys, *arguments, "--seed", 1, "-o", tmp_path / "stopped")
    assert "another recipe (seed 0 there, 1 here)" in other
    with mock.patch("attnedit._live.capture", side_effect=AssertionError("compiled again")):
        found = answer(capsys, *arguments, "-o", tmp_path / "stopped")
    for stage, expected in zip(found["stages"], whole["stages"], strict=True):
        assert {**stage, "seconds": 0} == {**expected, "seconds": 0}
    assert found["perplexity"] == whole["perplexity"]
    assert not (tmp_path / "stopped" / RUN_FILE).exists()


def attnedit_main(*arguments: object) -> int:
    from attnedit.cli import main

    return main([str(argument) for argument in arguments])


@pytest.mark.long
def test_a_mixture_on_the_command_line(saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured) -> None:
    other = tmp_path / "other=1.txt"
    other.write_text("The cache decides what a long context costs. " * 400, encoding="utf-8")
    data = [
        "--calibration",
        f"{text_file}=3",
        "--calibration",
        other,
        "--calibration-tokens",
        4096,
        "--alternations",
        0,
    ]
    found = answer(
        capsys, "compile", saved_llama, "-o", tmp_path / "mixed", *data, "--distill-steps=2", "--batch-size=4"
    )
    assert found["calibration"] == f"{text_file} (75%), {other} (25%)"
    refused = {
        "no weight": [f"{text_file}=much"],
        "given twice": [text_file, f"{text_file}=2"],
        "not negative": [f"{text_file}=-1", other],
        "above 0": [f"{text_file}=0"],
        "does not exist": ["none.txt=1"],
    }
    for words, sources in refused.items():
        options = [word for source in sources for word in ("--calibration", source)]
        assert words in refusal(capsys, "compile", saved_llama, "-o", tmp_path / "x", *options)


@pytest.mark.long
@pytest.mark.parametrize("moment", ["fit", "distill"])
def test_killed_and_started_again(moment: str, saved_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """SIGKILL in a stage, then the same command: the same losses as a run that nobody killed."""
    command = [sys.executable, "-c", "import sys; from attnedit.cli import main; sys.exit(main(sys.argv[1:]))"]
    command += ["compile", str(saved_llama), "--calibration", str(text_file), "--calibration-tokens", "4096", "--json"]
    command += ["--alternations", "0", "--fit-steps", "60", "--distill-steps", "60", "--batch-size", "8"]
    command += ["--seq-len", "64", "--checkpoint-every", "7", "--allocation", "loss"]
    more = {"feature_layers": 1, "feature_weight": 0.1, "repeats": 0.5, "token_noise": 0.1}
    command += [word for name, value in more.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole = subprocess.run([*command, "-o", str(tmp_path / "whole")], env=environment, capture_output=True, check=True)
    target = tmp_path / "killed"
    process = subprocess.Popen([*command, "-o", str(target)], env=environment, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        log = target / LOG_FILE
        if log.exists() and log.read_text().count(f'"stage": "{moment}"') >= 20:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (target / RUN_FILE).exists(), "it was killed too late"
    again = subprocess.run([*command, "-o", str(target)], env=environment, capture_output=True, check=True)
    logs = []
    for name in ("whole", "killed"):
        entries = [json.loads(line) for line in (tmp_path / name / LOG_FILE).read_text().splitlines()]
        logs.append([{**entry, "tokens_per_second": 0} for entry in entries])
    assert logs[0] == logs[1]
    reports = [json.loads(run.stdout) for run in (again, whole)]
    assert reports[0]["perplexity"] == reports[1]["perplexity"]
    for report in reports:
        assert report["recipe"]["allocation"] == "loss"
        assert report["recipe"]["training"].items() >= more.items()


@pytest.mark.long
def test_two_processes_learn_what_one_does(saved_llama: Path, text_file: Path, tmp_path: Path) -> None:
    """Over gloo; each takes half of every batch, and holds the whole model or, with FSDP2, half of every weight."""
    command = [str(Path(sys.executable).parent / "attnedit"), "compile", str(saved_llama), "--json"]
    command += ["--calibration", str(text_file), "--calibration-tokens", "4096", "--alternations", "0"]
    command += ["--fit-steps", "8", "--distill-steps", "12", "--train", "norms", "--batch-size", "8", "--seq-len", "64"]
    command += ["--self-generated", "0.25"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ATTNEDIT_CACHE": str(tmp_path)}
    # accelerate launch --use_fsdp --fsdp_version 2 sets these for the processes that it starts.
    in_parts = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    runs: dict[str, tuple[list[str], dict[str, str], list[str]]] = {
        "one": ([], {}, []),
        "two": (two, {}, []),
        "parts": (two, in_parts, []),
    }
    if shutil.which("g++"):  # which torch.compile needs on a processor
        runs["compiled"] = (two, in_parts, ["--torch-compile"])
    logs = {}
    weights = {}
    for name, (launcher, more, flags) in runs.items():
        directory = tmp_path / name
        whole = [*launcher, *command, *flags, "-o", str(directory)]
        done = subprocess.run(whole, env={**environment, **more}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        logs[name] = [json.loads(line) for line in (directory / LOG_FILE).read_text().splitlines()]
        weights[name] = load_file(directory / "model.safetensors")
    for name in runs.keys() - {"one"}:
        assert [entry["step"] for entry in logs[name]] == [entry["step"] for entry in logs["one"]]
        for mine, theirs in zip(logs["one"], logs[name], strict=True):
            assert theirs["loss"] == pytest.approx(mine["loss"], rel=0.02)  # products may be in bfloat16
            assert theirs["norm"] == pytest.approx(mine["norm"], rel=0.05)
            assert theirs["held_out"] == pytest.approx(mine["held_out"], rel=0.02)  # all windows, also an odd number
    for run in runs.keys() - {"one", "two"}:
        assert weights[run].keys() == weights["two"].keys()
        for name, weight in weights["two"].items():
            assert deviation(weights[run][name], weight) < 0.02, name

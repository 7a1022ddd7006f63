"""Benchmarks run through, on tiny shapes."""

import gzip
import json
from pathlib import Path

import pytest
from project import run


@pytest.mark.long
def test_tiny_generation() -> None:
    lines = run("gpu_generate.py", "--tiny", "--tokens", "6").splitlines()
    assert sum("'same': True" in line for line in lines) == 4
    assert sum("tokens/s plain" in line for line in lines) == 4


@pytest.mark.long
def test_tiny_run_and_plot(tmp_path: Path) -> None:
    results, image = tmp_path / "tiny.json", tmp_path / "plot.svg"
    run("gpu_decode.py", "--tiny", "--out", results)
    run("gpu_decode.py", "--plot", results, image)
    values = json.loads(results.read_text())
    assert {case["name"] for case in values["model"]} == {"source", "MLA", "GateSWA", "GateSWA + MLA"}
    names = {case["name"] for case in values["layer"]}
    assert names >= {"source default", "MLA 512+64", "MLA 1/4", "GateSWA 8", "GateSWA 8, compiled"}
    assert all(case["us"] > 0 and case["bytes"] > 0 for case in values["layer"])
    assert image.stat().st_size > 1000
    run("gpu_decode.py", "--tiny", "--steps", "--out", results)
    assert {case["name"] for case in json.loads(results.read_text())["layer"]} >= {"MLA 1/2", "GateSWA 8, compiled"}


@pytest.mark.long
def test_tiny_prompts(tmp_path: Path) -> None:
    run("gpu_prefill.py", "--tiny", "--out", tmp_path / "tiny.json")
    cases = json.loads((tmp_path / "tiny.json").read_text())["prefill"]
    names = {"source", "MLA 512+64", "MLA 1/4", "MLA 1/2", "GateSWA", "GateSWA + MLA"}
    assert {(case["name"], case["length"], case["batch"]) for case in cases} == {
        (name, length, batch) for name in names for length in (20, 40, 64, 80) for batch in (1, 2)
    }
    assert all(case["ms"] > 0 for case in cases)


@pytest.mark.long
def test_tiny_training(saved_llama: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples, closed form, training and the table; what is there is not made again."""
    monkeypatch.setenv("ATTNEDIT_CACHE", str(tmp_path / "samples"))
    arguments = [saved_llama, "--calibration", text_file, "--text", text_file, "--cases", "MLA 1/2"]
    arguments += ["--device", "cpu", "--steps", "3", "--batch-size", "2", "--seq-len", "32", "--windows", "3"]
    arguments += ["-o", tmp_path / "runs"]
    table = run("training.py", *arguments)
    rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| ")]
    assert [row[0].strip() for row in rows] == ["", "source", "MLA 1/2 one-shot", "MLA 1/2 trained"]
    assert all(float(row[1].split()[0]) > 1 for row in rows[1:])
    assert len(list((tmp_path / "samples").rglob("*.safetensors"))) == 1
    again = run("training.py", *arguments)
    assert "trained: done" not in again
    assert "start: done" not in again
    assert again[again.index("| |") :] == table[table.index("| |") :]
    arguments += ["-o", tmp_path / "failed", "--calibration", tmp_path / "missing.txt"]
    failed = run("training.py", *arguments)
    assert "MLA1_2-start: failed, see MLA1_2-start.log" in failed


@pytest.mark.long
def test_fit_rounds(saved_llama: Path, text_file: Path) -> None:
    arguments = ["--calibration", text_file, "--layers", "1", "--budgets", "0.5", "--iterations", "2"]
    lines = run("fit_rounds.py", saved_llama, *arguments, "--calibration-tokens", "4096").splitlines()
    steps = [json.loads(line) for line in lines if line.startswith("{")]
    assert [step["step"] for step in steps] == ["start", *["refit_query", "refit_latent"] * 2]
    assert steps[-1]["fit"] < steps[0]["fit"]


@pytest.mark.long
def test_growth(tmp_path: Path) -> None:
    results, image = tmp_path / "growth.json", tmp_path / "growth.svg"
    table = run("growth.py", "decode", "--axis", "length", "--points", "2", "--json", results, "--plot", image)
    rows = json.loads(results.read_text())
    assert [row["axis"] for row in rows] == ["length"] * 3
    sizes = {row["target"]: row["MiB exponent"] for row in rows}
    # From 512 to 2,048 tokens: a window of 512 in half of the layers.
    assert sizes["source"] == pytest.approx(1, abs=0.05)
    assert sizes["mla"] == pytest.approx(1, abs=0.05)
    assert sizes["gateswa"] == pytest.approx(0.66, abs=0.1)
    assert len([line for line in table.splitlines() if line.startswith("| decode")]) == 3
    assert image.stat().st_size > 1000


def test_paragraphs_of_documents(tmp_path: Path) -> None:
    long = "Words that are many, and on\n  several lines. " * 4
    (tmp_path / "one.txt").write_text(f"Heading\n\n{long}\n \nshort\n\n{long}", encoding="utf-8")
    (tmp_path / "two.txt.gz").write_bytes(gzip.compress(f"{long}\n\n{long.upper()}".encode()))
    run("paragraphs.py", tmp_path / "one.txt", tmp_path / "two.txt.gz", "-o", tmp_path / "out.txt")
    joined = " ".join(long.split())
    assert (tmp_path / "out.txt").read_text(encoding="utf-8") == f"{joined}\n\n{joined.upper()}\n"


@pytest.mark.long
def test_a_source_beside_itself_loses_nothing(saved_llama: Path, text_file: Path) -> None:
    table = run("copying.py", saved_llama, saved_llama, "--text", text_file, "--windows", "2", "--seq-len", "64")
    (row,) = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith(f"| {text_file}")]
    assert 0 < float(row[1].strip(" %")) < 100
    assert [float(value) for value in row[2:]] == [0, 0]

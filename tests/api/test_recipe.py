"""Recipes: round trips, messages that name the line, and the command line beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Captured, answer, refusal
from compiled import logits, tokens
from hypothesis import example, given, settings
from hypothesis import strategies as st
from project import ROOT

import attnedit
from attnedit.options import CompileOptions
from attnedit.recipe import RECIPE_FILE, Recipe


@settings(max_examples=50, deadline=None)
@example(values={"calibration": "\x85", "model": "naïve \u2028 'x': #\n"})
@given(
    values=st.fixed_dictionaries(
        {},
        optional={
            "model": st.text(min_size=1),
            "target": st.sampled_from(["mla", "gateswa", "gateswa+mla"]),
            "kv_budget": st.floats(0.01, 1),
            "window": st.integers(1, 10**6),
            "full_layers": st.one_of(st.integers(0, 99), st.just("every:4"), st.lists(st.integers(0, 99))),
            "calibration": st.one_of(st.text(), st.dictionaries(st.text(), st.floats(0, 9))),
            "seed": st.integers(0, 2**63 - 1),
            "training": st.fixed_dictionaries(
                {}, optional={"fit_steps": st.integers(0, 9), "train": st.sampled_from(["norms", "all"])}
            ),
        },
    )
)
def test_round_trip(values: dict[str, Any]) -> None:
    recipe = Recipe(**values)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("format: 1\nwindow: many\n", "line 2: window must be a whole number, got 'many'"),
        ("target: mla\n\nwindo: 8\n", "line 3: no key 'windo'; there is calibration, seed, target"),
        ("training:\n  fit_steps: 3\n  batch_sise: 4\n", "line 3: training: no calibration option 'batch_sise'"),
        ("training:\n  fit_steps: 3\n  batch_size: 0\n", "line 3: training: batch_size must be at least 1"),
        ("training:\n  train: [1]\n", "line 2: training"),
        ("format: 2\n", "line 1: format"),
        ("target: [mla\nwindow: 3", "line 2"),
        ("- mla\n", "a mapping"),
        ("", "a mapping"),
    ],
)
def test_messages_name_the_line(text: str, words: str) -> None:
    with pytest.raises(attnedit.UsageError) as caught:
        Recipe.from_yaml(text, "my.yaml")
    assert words in str(caught.value)
    assert str(caught.value).startswith("my.yaml")
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00\x80")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary"):
        with pytest.raises(attnedit.UsageError, match="cannot be read"):
            Recipe.load(path)


@pytest.mark.parametrize("file", sorted((ROOT / "docs" / "recipes").glob("*.yaml")), ids=lambda file: file.stem)
def test_the_recipes_in_the_docs_make_sense(file: Path) -> None:
    recipe = Recipe.load(file)
    assert recipe.model
    CompileOptions.of(**recipe.arguments())


def test_the_saved_recipe_gives_the_same_result(
    saved_llama: Path, text_file: Path, tmp_path: Path, capsys: Captured
) -> None:
    form = ["--target", "gateswa", "--window", 8, "--full-layers", 1, "--sinks", "logit"]
    data = ["--calibration", text_file, "--calibration-tokens", 2048]
    first = answer(capsys, "compile", saved_llama, *form, *data, "-o", tmp_path / "one")
    saved = yaml.safe_load((tmp_path / "one" / RECIPE_FILE).read_text())
    assert saved == {"format": 1, **first["recipe"]}
    assert saved["full_layers"] == first["full_layers"]
    again = answer(capsys, "compile", "--recipe", tmp_path / "one" / RECIPE_FILE, "-o", tmp_path / "two")
    assert again["recipe"] == first["recipe"]
    assert not again["notes"]  # nothing was measured
    ids = tokens(2, 30)
    one, two = (logits(attnedit.load(tmp_path / name).model, ids) for name in ("one", "two"))
    assert torch.equal(one, two)
    other = answer(
        capsys, "compile", "--recipe", tmp_path / "one" / RECIPE_FILE, "--window", 4, "-o", tmp_path / "other"
    )
    assert other["recipe"] == {**first["recipe"], "window": 4}


def test_a_recipe_in_python(saved_llama: Path, llama: Any) -> None:
    recipe = Recipe(kv_budget=0.5, alternations=0, training={"distill_steps": 2, "batch_size": 4, "seq_len": 16})
    data = {"calibration": tokens(16, 32)}
    result = attnedit.compile(llama, **{**recipe.arguments(), **data})
    assert Recipe.model_validate(result.report.recipe) == recipe.model_copy(update={"calibration_length": 32})


def test_commands_refuse_what_makes_no_sense(tmp_path: Path, capsys: Captured) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("target: mla\nwindo: 3\n")
    assert "line 2" in refusal(capsys, "compile", "x", "--recipe", file, "-o", tmp_path / "out")
    assert "no model is named" in refusal(capsys, "compile", "-o", tmp_path / "out")
    assert "cannot be read" in refusal(capsys, "compile", "x", "--recipe", tmp_path / "none", "-o", tmp_path / "out")

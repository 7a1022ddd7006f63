"""One object of options: keyword arguments, flags and recipes follow its fields; what a function lacks it refuses."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import pytest
import torch
import typer
from pydantic import Field
from typer.testing import CliRunner

import attnedit
from attnedit import arguments
from attnedit.cli import app
from attnedit.cli.flags import takes
from attnedit.compiler.options import Flag, Whole, help_of
from attnedit.options import CalibrateOptions, CompileOptions, SourceOptions
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.recipe import Recipe
from attnedit.run_directory import check_run
from attnedit.targets.runtime.eager.checkpoint import RUN_FILE
from attnedit.testing import refused, tiny_model, tokens

FUNCTIONS = {
    attnedit.compile: arguments.CompileArguments,
    attnedit.rewrite: arguments.CompileArguments,
    attnedit.calibrate: arguments.CalibrateArguments,
    attnedit.compile_checkpoint: arguments.CheckpointArguments,
}
WIDER = {  # a field holds less than the argument takes: it is turned into that
    "dtype": torch.dtype | str,
    "full_layers": int | str | Sequence[int] | None,
    "memory_limit": int | str | None,
}
FIELDS = CompileOptions.model_fields


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_keyword_arguments_are_fields(function: Any) -> None:
    kind = FUNCTIONS[function]
    named, fields = get_type_hints(kind), get_type_hints(CompileOptions)
    for name, annotation in named.items():
        assert WIDER.get(name, fields[name]) == annotation, name
    assert function.__annotations__["options"] == f"Unpack[{kind.__name__}]"
    shown = inspect.signature(function).parameters
    assert set(named) <= set(shown)
    for name in named:
        if (function, name) != (attnedit.compile_checkpoint, "dtype"):
            assert shown[name].default == FIELDS[name].default


def test_every_field_is_an_argument_of_some_function() -> None:
    everywhere = {name for kind in FUNCTIONS.values() for name in get_type_hints(kind)}
    assert set(FIELDS) - everywhere == {"target", "dequantize", "allow_pickle"}  # positional; of the command line
    assert set(CalibrateOptions.model_fields) == set(get_type_hints(arguments.CalibrateArguments))


def test_every_field_says_what_it_is_for_and_is_a_flag() -> None:
    command = typer.main.get_command(app).commands["compile"]  # type: ignore[attr-defined]
    flags = {parameter.name: parameter for parameter in command.params}
    for name, field in FIELDS.items():
        assert help_of(field), name
        if any(isinstance(one, Flag) and one.type is None for one in field.metadata):
            assert name not in flags
        else:
            assert f"--{name.replace('_', '-')}" in flags[name].opts
            assert flags[name].help == help_of(field)


def test_a_new_field_is_a_flag_and_an_option() -> None:
    class Longer(SourceOptions):
        depth: Annotated[Whole, Field(ge=1)] = 3
        """How deep."""

    seen: list[dict[str, Any]] = []
    other = typer.Typer()

    @other.command()
    @takes(Longer)
    def command(model: str, **given: Any) -> None:
        seen.append(given)

    runner = CliRunner()
    assert runner.invoke(other, ["m"]).exit_code == 0
    assert runner.invoke(other, ["m", "--depth", "4", "--dequantize"]).exit_code == 0
    assert seen == [{}, {"depth": 4, "dequantize": True}]
    assert "--depth" in runner.invoke(other, ["m", "--depth", "0"]).output
    assert "How deep." in runner.invoke(other, ["--help"]).output
    with refused("depth must be at least 1, got 0"):
        Longer.of(depth=0)


def test_what_decides_a_result_is_in_recipes() -> None:
    options = CompileOptions.of(
        target="gateswa", window=9, full_layers=(1, 2), seed=4, fit_steps=3, memory_limit="1KiB"
    )
    recipe = Recipe.from_options(options, model="m")
    again = CompileOptions.of(**Recipe.from_yaml(recipe.to_yaml()).arguments())
    assert recipe.training == {"fit_steps": 3, "memory_limit": 1024}
    for name in FIELDS:
        assert getattr(again, name) == getattr(options, name), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": "float32"}, "dtype is for reading a checkpoint"),
        ({"trust_remote_code": True}, "trust_remote_code is for reading a checkpoint"),
        ({"partial": True}, "partial is for the targets of rewrites, not for mla"),
        ({"windo": 3}, "no option 'windo'; there is calibration"),
        ({"kernel_dims": 1}, "kernel_dims must be true or false, got 1"),
        ({"target": 3}, "target"),
        ({"target": "gateswa", "full_layers": 2.5}, "full_layers cannot be 2.5: GateSWA: how many layers stay full"),
        ({"train": "heads"}, "train must be one of attention, norms, all, got 'heads'"),
    ],
)
def test_a_live_model(options: dict[str, Any], words: str) -> None:
    model = tiny_model()
    with refused(words, model):
        attnedit.compile(model, **{"calibration": tokens(4, 32), **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"window": 3}, "window is for the targets gateswa and gateswa+mla, not for Same"),
        ({"calibration_length": 30}, "calibration_length is for the targets mla"),
        ({"distill_steps": 3}, "distill_steps is for training: give the rewrites to attnedit.compile"),
        ({"revision": "x"}, "revision is for reading a checkpoint"),
    ],
)
def test_rewrites(options: dict[str, Any], words: str) -> None:
    class Same(attnedit.Rewrite):
        def pattern(self, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
            return attnedit.attention(query_BHTd, key_BGTd, value_BGTv)

        replacement = pattern

    with refused(words):
        attnedit.rewrite(tiny_model(), Same(), **options)


WHOLE: dict[str, Any] = {
    **{name: 2 for name, field in CalibrationOptions.model_fields.items() if isinstance(field.default, int)},
    **dict.fromkeys(("fit_learning_rate", "distill_learning_rate", "feature_weight", "self_generated", "repeats"), 0.5),
    **{"token_noise": 0.5, "short_seq_len": 9, "short_share": 0.5, "engine": "vllm"},
    **{"distill_optimizer": "muon", "train": "all", "memory_limit": 9, "run_directory": "x"},
    **dict.fromkeys(
        ("activation_checkpointing", "torch_compile", "cuda_graphs", "in_place", "dequantize", "allow_pickle"), True
    ),
    **{"profile": "youtu", "allocation": "loss", "kernel_dims": True, "partial": True, "fuel": 1, "dump_graphs": "x"},
}


def test_what_needs_the_whole_model_is_refused_by_name_layer_by_layer(tmp_path: Path) -> None:
    assert {"target", *WHOLE, *get_type_hints(arguments.CheckpointArguments)} == set(FIELDS)
    for name, value in WHOLE.items():
        beside = {"profile": "youtu"} if name == "kernel_dims" else {}
        said = "is for the targets" if name == "partial" else "needs the whole model in memory"
        with refused(said):
            attnedit.compile_checkpoint("nowhere", tmp_path / "out", calibration="x", **beside, **{name: value})


def test_a_run_of_before_an_option_was_there_goes_on(tmp_path: Path) -> None:
    recipe = {"command": "compile", **Recipe.from_options(CompileOptions.of(seed=3), model="m").model_dump(mode="json")}
    older = {name: value for name, value in recipe.items() if name not in ("allocation", "kernel_dims", "profile")}
    (tmp_path / RUN_FILE).write_text(json.dumps({"recipe": older}))
    assert check_run(tmp_path, recipe, overwrite=False)
    with refused("another recipe (allocation 'auto' there, 'loss' here)"):
        check_run(tmp_path, {**recipe, "allocation": "loss"}, overwrite=False)


def test_training_alone_refuses_what_is_for_compiling() -> None:
    with refused("window is for compiling"):
        attnedit.calibrate(object(), object(), window=3)  # type: ignore[arg-type, call-arg]
    with pytest.raises(attnedit.UsageError, match="no calibration option 'steps'"):
        CalibrationOptions.of(steps=3)

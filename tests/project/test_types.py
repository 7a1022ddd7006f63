"""What a type checker makes of the public names: right uses pass, and each wrong one is found."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from mypy import api
from project import ROOT
from public_names import described

from attnedit import arguments
from attnedit.targets.runtime.gguf.export import export as to_gguf
from attnedit.targets.runtime.hf.export import export as to_hf
from attnedit.targets.runtime.npu.export import export as to_npu
from attnedit.targets.runtime.onnx.export import export as to_onnx

RIGHT = """
from collections.abc import Iterable, Mapping
from typing import assert_type
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
import attnedit
from attnedit.compiler.rewriting.rewrite import Batch
from attnedit.result import Runtime
from attnedit.testing import tiny_model

def use(model: PreTrainedModel, name: str) -> None:
    result = attnedit.compile(model, kv_budget=0.25, calibration="notes.txt", fit_steps=10, train="attention")
    assert_type(result, attnedit.CompileResult)
    attnedit.compile(model, "gateswa", calibration=[torch.zeros(1, 4)], full_layers=[1, 2])
    attnedit.compile(model, calibration={"notes.txt": 0.5, "allenai/c4": 0.5})
    attnedit.calibrate(result, model, distill_steps=3)
    attnedit.compile_checkpoint("here", "there", dtype="bfloat16").to_json()
    print(result.export("onnx", "there", cache="static", dtype="float16").layers)
    print(result.export("hf", "there", profile="remote").architecture)
    print(result.export("gguf", "there", quantize="q8_0").notes, result.export("npu", "there", soc="310p").caches)
    result.export(name, "there")
    result.export(Runtime("mine"), "there", level=3)
    tiny_model(num_hidden_layers=3)

class Shared(attnedit.Rewrite):
    contract = attnedit.close(1e-3, 0.0)

    def pattern(self, query_BHTd: Tensor, key_BGTd: Tensor, value_BGTv: Tensor) -> Tensor:
        return attnedit.attention(query_BHTd, key_BGTd, value_BGTv)

    def replacement(self, match: attnedit.Match, query_BHTd: Tensor, key_BGTd: Tensor, value_BGTv: Tensor) -> Tensor:
        return attnedit.attention(query_BHTd, *attnedit.cache(key_BGTd, value_BGTv), scale=0.5)

    def check(self, match: attnedit.Match) -> attnedit.Reject | None:
        return None

    def parts(self, match: attnedit.Match) -> Mapping[str, nn.Module]:
        return {"mix": nn.Linear(match.hidden_size, 1)}

    def fit(self, match: attnedit.Match, batches: Iterable[Batch]) -> None:
        match.new.mix.weight.copy_(attnedit.least_squares(batches))

attnedit.rewrite(tiny_model(), [Shared(), "registered"])
attnedit.Target("shared", (Shared(),))
"""
WRONG = """
import attnedit
from attnedit import Match, Rewrite
from torch import Tensor
from transformers import PreTrainedModel

class Wrong(Rewrite):
    contract = "exact"  # assignment
    def pattern(self, query_BHTd: Tensor) -> str:  # override
        return "no tensor"
    def replacement(self, match: Match, query_BHTd: Tensor) -> Tensor:
        return attnedit.attention(query_BHTd, query_BHTd, query_BHTd, scale="two")  # arg-type
    def check(self, match: Match) -> bool:  # override
        return True
    def fit(self, match: Match) -> None:  # override
        pass

def use(model: PreTrainedModel, result: attnedit.CompileResult) -> None:
    attnedit.compile(model, windw=3)  # call-arg
    attnedit.compile(model, kv_budget="half")  # arg-type
    attnedit.compile(model, calibration=3)  # arg-type
    attnedit.compile(model, train="heads")  # arg-type
    attnedit.calibrate(result, model, kv_budget=0.5)  # call-arg
    attnedit.compile_checkpoint("here", "there", fit_steps=3)  # call-arg
    attnedit.rewrite(model, Wrong)  # arg-type
    attnedit.Target("wrong", ("mla",))  # arg-type
    result.export("onnx", "there", profile="remote")  # call-overload
    result.export("onnx", "there", cache="fixed")  # call-overload
    result.export("hf", "there", cache="static")  # call-overload
    result.save()  # call-arg
"""


def test_right_uses_pass_and_wrong_ones_are_found(tmp_path: Path) -> None:
    for name, text in (("right.py", RIGHT), ("wrong.py", WRONG)):
        (tmp_path / name).write_text(text)
    files = [str(tmp_path / name) for name in ("right.py", "wrong.py")]
    # The configuration and cache of `make types`, after which this takes seconds.
    places = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    said, failure, _ = api.run([*places, "--no-pretty", *files])
    assert failure == ""
    found = re.findall(r"(right|wrong)\.py:(\d+): error: .*\[([\w-]+)\]", said)
    expected = [
        ("wrong", str(number), line.partition("  # ")[2])
        for number, line in enumerate(WRONG.splitlines(), 1)
        if "  # " in line
    ]
    assert sorted(found) == sorted(expected), said


@pytest.mark.parametrize(
    ("export", "kind"),
    [
        (to_onnx, arguments.OnnxArguments),
        (to_hf, arguments.HFArguments),
        (to_gguf, arguments.GGUFArguments),
        (to_npu, arguments.NPUArguments),
    ],
)
def test_options_of_exports_are_those_of_their_functions(export: Callable[..., Any], kind: type) -> None:
    hints = get_type_hints(export)
    own = [name for name, one in inspect.signature(export).parameters.items() if one.kind is one.KEYWORD_ONLY]
    assert get_type_hints(kind) == {name: hints[name] for name in own}


def test_no_public_parameter_may_be_anything() -> None:
    for name, function in described():
        for parameter in inspect.signature(function).parameters.values():
            text = str(parameter.annotation)
            assert parameter.name in ("self", "cls") or not re.fullmatch(r"(typing\.)?Any", text), (name, parameter)
            assert parameter.annotation is not parameter.empty or parameter.name in ("self", "cls"), (name, parameter)

"""Checkpoints with code of their own: any family, in any dtype, and attnedit reads them too."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import deviation, half, logits, source
from families import FAMILIES, SUPPORTED
from hf_exports import IDS, alone, greedy, windowed, written
from torch import fx
from transformers import AutoModelForCausalLM, PreTrainedModel

import attnedit
from attnedit.compiler.compatibility.caches import cache_parameter
from attnedit.targets.runtime.eager.checkpoint import load_model
from attnedit.targets.runtime.hf.check import check_same
from attnedit.targets.runtime.hf.remote import copied_modules, load_code


def test_a_remote_checkpoint_is_ours_too(tmp_path: Path) -> None:
    result = half("llama")
    result.export("hf", tmp_path / "out", profile="remote")
    again = attnedit.load(tmp_path / "out")
    assert torch.equal(logits(again.model, IDS), logits(result.model, IDS))
    assert again.report.kv_budget_achieved == result.report.kv_budget_achieved


def test_remote_code_needs_nothing_of_ours() -> None:
    modules = copied_modules(["attnedit.targets.attention.mla.module", "attnedit.targets.attention.gateswa.module"])
    assert {"attnedit_targets_attention_mla_module", "attnedit_targets_runtime_hf_parts"} <= set(modules)
    for text in modules.values():
        assert "from attnedit." not in text.replace("from attnedit.targets.runtime.hf import", "")
        assert "import attnedit" not in text


@pytest.mark.parametrize(("family", "kind"), [("llama", "mla"), ("gpt_neo", "gateswa+mla")])
def test_a_transformers_that_calls_the_cache_otherwise_runs_it(family: str, kind: str, tmp_path: Path) -> None:
    model = made(family, kind)
    written(model, tmp_path / "out", "remote")
    file = tmp_path / "out" / "modeling_attnedit.py"
    layer = next(module for module in model.modules() if isinstance(module, fx.GraphModule))
    name = str(cache_parameter(layer))
    other = "past_key_values" if name == "cache" else "cache"
    file.write_text(re.sub(rf"\b{name}\b", other, file.read_text()))
    loaded = load_code(tmp_path / "out")
    assert {cache_parameter(module) for module in loaded.modules() if hasattr(module, "parts")} == {other}
    check_same(model, loaded)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    assert torch.equal(loaded.generate(IDS, **options), model.generate(IDS, **options))


FORMS: dict[str, dict[str, Any]] = {
    "gateswa": {"full_layers": 0, "window": 4, "gate": "head", "sinks": "logit,value,keep:2"},
    "gateswa+mla": {"full_layers": 1, "window": 4, "kv_budget": 0.4},
}


def made(family: str, kind: str) -> PreTrainedModel:
    return half(family).model if kind == "mla" else windowed(source(family), kind, **FORMS[kind])


def cases() -> Iterator[tuple[str, str]]:
    """Families and targets; a composition wants a layer to window and one to keep full."""
    for name in SUPPORTED:
        family = FAMILIES[name]
        for kind in () if family.mla else ("mla", *FORMS):
            if kind != "gateswa+mla" or family.windows == (None, None):
                yield name, kind


@pytest.mark.long
@pytest.mark.parametrize(("family", "kind"), list(cases()))
def test_remote_families(family: str, kind: str, tmp_path: Path) -> None:
    model = made(family, kind)
    manifest = written(model, tmp_path / "out", "remote")
    assert max(check["deviation"] for check in manifest.checks) < 1e-6
    check_same(model, load_code(tmp_path / "out"))
    assert torch.equal(logits(load_model(tmp_path / "out"), IDS), logits(model, IDS))


TABLES = [("gptj", "mla"), ("gpt_neo", "gateswa+mla"), ("falcon", "gateswa")]
"""Graphs that read tables of positions, masks and constants, which are no weights."""


@pytest.mark.long
@pytest.mark.parametrize(("family", "kind"), TABLES)
def test_tables_are_in_the_checkpoint(family: str, kind: str, tmp_path: Path) -> None:
    model = made(family, kind)
    written(model, tmp_path / "out", "remote")
    found, told = alone(tmp_path / "out", tmp_path, "remote")
    assert torch.equal(found, logits(model, IDS))
    assert told["text"] == greedy(model)
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    auto: Any = AutoModelForCausalLM
    with mock.patch("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")):
        for options, tolerance in (({"device_map": "cpu"}, 0.0), ({"dtype": torch.bfloat16}, 5e-2)):
            loaded = auto.from_pretrained(tmp_path / "out", trust_remote_code=True, **options).eval()
            assert deviation(logits(loaded, IDS, mask), logits(model, IDS, mask), mask) <= tolerance
            loaded.save_pretrained(tmp_path / "again")
            again = auto.from_pretrained(tmp_path / "again", trust_remote_code=True, **options).eval()
            assert torch.equal(logits(again, IDS, mask), logits(loaded, IDS, mask))

"""Captures that trace nothing anew: the same sites, and never what belongs to another module."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, shared
from transformers import PreTrainedModel
from transformers.models.llama import modeling_llama

import attnedit
from attnedit.compiler.capture import capture as capturing
from attnedit.compiler.capture import kept_exports, stored_traces
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.capture.kept_exports import Key, key_of
from attnedit.compiler.capture.probe import discover
from attnedit.compiler.graph.dataflow import anchors
from attnedit.compiler.graph.graph_text import as_text


@pytest.fixture(autouse=True)
def nothing_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ATTNEDIT_CACHE", str(tmp_path))
    kept_exports.forget()
    yield
    kept_exports.forget()


def keys(model: PreTrainedModel) -> list[Key | None]:
    return [key_of(call) for call in discover(model)[0]]


def described(model: PreTrainedModel, **options: Any) -> list[Any]:
    """Facts and graphs."""
    found = []
    for site in capture(model, **options):
        facts = {name: value for name, value in vars(site).items() if name not in ("graph", "constants", "rotary")}
        found.append((facts, as_text(graph_module(model, site))))
    return found


def no_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise AssertionError("it is traced anew")

    monkeypatch.setattr(capturing, "trace_attention", refuse)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gptj"])
def test_a_second_capture_is_the_same_and_traces_nothing(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = described(shared(family))
    other = build(family, seed=5)
    other.name_or_path = "elsewhere"
    other.train()
    no_tracing(monkeypatch)
    assert described(shared(family)) == first
    assert described(other) == first
    assert other.training
    with pytest.raises(AssertionError, match="traced anew"):
        capture(other, fresh=True)


@pytest.mark.parametrize("family", ["gemma3_text", "gptj", "gpt_neo"])
def test_another_process_traces_nothing(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = described(shared(family))
    assert list(tmp_path.rglob("*.pt2"))
    kept_exports.forget()
    no_tracing(monkeypatch)
    assert described(shared(family)) == first


def test_keys_are_the_same_in_another_process(tmp_path: Path) -> None:
    capture(build("llama"))
    code = (
        "from families import build; from attnedit.compiler.capture import capture as c; "
        "c.trace_attention = None; print(len(c.capture(build('llama'))))"
    )
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "support"), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "2", done.stderr


def test_what_is_on_disk_and_does_not_fit_is_traced_anew(tmp_path: Path) -> None:
    expected = described(shared("llama"))
    described(shared("qwen3"))
    llama, qwen = sorted(tmp_path.rglob("*.pt2"), key=lambda file: file.stat().st_mtime_ns)
    good = llama.read_bytes()
    for content in (qwen.read_bytes(), good[: len(good) // 2], b""):
        llama.write_bytes(content)
        kept_exports.forget()
        assert described(shared("llama")) == expected
        assert llama.stat().st_size > len(good) // 2 + 1


@pytest.mark.parametrize("wanted", [True, False])
def test_nothing_is_kept_where_that_is_not_wanted(wanted: bool, tmp_path: Path) -> None:
    attnedit.compile(build("llama"), kv_budget=1.0, verify=False, capture_cache=wanted)
    assert bool(kept_exports._EXPORTS) == bool(list(tmp_path.rglob("*.pt2"))) == wanted


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no users here")
def test_files_that_others_could_have_written_are_not_read(tmp_path: Path) -> None:
    key = keys(shared("llama"))[0]
    capture(shared("llama"))
    assert stored_traces.read(key) is not None
    next(tmp_path.rglob("*.pt2")).parent.chmod(0o777)
    assert stored_traces.read(key) is None


def with_attribute(model: PreTrainedModel) -> None:
    attention(model).scaling *= 2


def with_hook(model: PreTrainedModel) -> None:
    attention(model).k_proj.register_forward_hook(lambda module, args, output: 2 * output)


def with_own_forward(model: PreTrainedModel) -> None:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    attention(model).forward = types.MethodType(forward, attention(model))


def with_child_of_another_class(model: PreTrainedModel) -> None:
    class Other(torch.nn.Linear):
        pass

    attention(model).v_proj.__class__ = Other


def with_buffer(model: PreTrainedModel) -> None:
    attention(model).register_buffer("table", torch.ones(3))


def with_setting(model: PreTrainedModel) -> None:
    model.config.my_setting = 3


def attention(model: PreTrainedModel) -> Any:
    return model.get_submodule("model.layers.0.self_attn")


@pytest.mark.parametrize(
    "change",
    [with_attribute, with_hook, with_own_forward, with_child_of_another_class, with_buffer, with_setting],
    ids=lambda change: change.__name__,
)
def test_a_change_of_the_module_changes_the_key(change: Callable[[PreTrainedModel], None]) -> None:
    changed = build("llama")
    change(changed)
    assert keys(changed)[0] != keys(shared("llama"))[0]


def test_settings_and_classes_change_the_key() -> None:
    models = [
        shared("llama"),
        build("llama", dtype=torch.bfloat16),
        build("llama", rms_norm_eps=1e-3),
        build("llama", rope_theta=5.0),
        build("llama", attention_bias=True),
        build("llama", attn_implementation="eager"),
        build("llama", max_position_embeddings=64),
        shared("mistral"),
        shared("qwen3"),
    ]
    found = [keys(model)[0] for model in models]
    assert None not in found
    assert len(set(found)) == len(models)


def test_values_of_tables_change_the_key() -> None:
    model = build("gpt_neo")
    before = keys(model)
    dict(model.named_buffers())["transformer.h.0.attn.attention.bias"].logical_not_()
    assert keys(model)[0] != before[0]


def test_code_that_was_replaced_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    model = shared("llama")
    found = [keys(model)[0]]

    def turned(q: Any, k: Any, cos: Any, sin: Any, **_: Any) -> Any:
        return -q, -k

    def forward(self: Any, hidden_states: Any, **kwargs: Any) -> Any:
        return before(self, hidden_states, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", turned)
    found.append(keys(model)[0])
    before = modeling_llama.LlamaAttention.forward
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    found.append(keys(model)[0])
    assert None not in found
    assert len(set(found)) == 3


def test_facts_are_measured_anew() -> None:
    plain, still = build("qwen3"), build("qwen3")
    with torch.no_grad():
        for layer in range(2):
            still.get_submodule(f"model.layers.{layer}.self_attn.k_norm").weight.zero_()
    assert keys(plain) == keys(still)
    assert {site.key_norm for site in capture(plain)} == {"per_head"}
    assert described(still) == described(still, fresh=True)
    assert {site.key_norm for site in capture(still)} == {"elementwise"}


def test_what_no_longer_fits_is_traced_anew() -> None:
    model = shared("llama")
    expected = described(model)
    ((key, kept),) = kept_exports._EXPORTS.items()
    scale: Any = anchors(kept.graph)[0].args[4]
    anchors(kept.graph)[0].update_arg(4, 2 * scale)
    assert described(model) == expected
    assert kept_exports.recall(key) is not None
    assert described(model) == expected


def test_sites_can_be_edited() -> None:
    model = shared("llama")
    expected = described(model)
    for site in capture(model):
        for node in site.graph.nodes:
            node.meta.clear()
        site.node(site.anchor).update_arg(4, 0.0)
    assert described(model) == expected


def test_what_cannot_be_read_is_not_kept() -> None:
    model = build("llama")
    for layer in range(2):
        model.get_submodule(f"model.layers.{layer}.self_attn").odd = torch.Generator()
    assert keys(model)[0] is None
    capture(model)
    assert not kept_exports._EXPORTS


def test_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_exports, "KEPT", 1)
    capture(shared("llama"))
    capture(shared("qwen3"))
    assert list(kept_exports._EXPORTS) == keys(shared("qwen3"))[:1]

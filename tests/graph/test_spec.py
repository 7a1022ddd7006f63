"""The verifier of captured and pure graphs: every kind of breakage is seen, and the pass that broke it named."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import shared
from torch import fx, nn

import attnedit
from attnedit.compiler.capture import export
from attnedit.compiler.capture.capture import capture, graph_module
from attnedit.compiler.errors import CaptureError, RewriteError
from attnedit.compiler.graph.dataflow import anchors, aten
from attnedit.compiler.graph.spec import verify
from attnedit.compiler.rewriting import graft
from attnedit.targets.attention import site_graph
from attnedit.targets.runtime.npu import fuse

Break = Callable[[fx.Graph], None]
WINDOWED: dict[str, Any] = {"window": 8, "full_layers": "every:2", "calibration": [torch.arange(48) % 60] * 4}


@functools.cache
def captured() -> fx.GraphModule:
    model = shared("llama")
    return graph_module(model, capture(model)[0])


def first(graph: fx.Graph, target: Any) -> fx.Node:
    return next(node for node in graph.nodes if node.target == target)


def after(graph: fx.Graph, node: fx.Node, call: str, *made: Any) -> None:
    """Put a new node between a node and what uses it."""
    users = list(node.users)
    with graph.inserting_after(node):
        new = getattr(graph, call)(*made)
    new.meta["val"] = node.meta["val"]
    for user in users:
        user.replace_input_with(node, new)


def a_method(graph: fx.Graph) -> None:
    node = next(
        n for n in graph.nodes if n.op == "call_function" and n.target in (aten.mul.Tensor, aten.matmul.default)
    )
    after(graph, node, "call_method", "contiguous", (node,))


def a_function(graph: fx.Graph) -> None:
    node = anchors(graph)[0]
    after(graph, node, "call_function", torch.cat, ([node],))


def an_op_in_place(graph: fx.Graph) -> None:
    first(graph, aten.neg.default).target = aten.neg_.default


def a_tensor(graph: fx.Graph) -> None:
    first(graph, aten.mul.Tensor).update_arg(1, torch.ones(1))


def a_device(graph: fx.Graph) -> None:
    first(graph, aten.unsqueeze.default).update_kwarg("device", torch.device("meta"))


def a_cast(graph: fx.Graph) -> None:
    node = anchors(graph)[0]
    after(graph, node, "call_function", aten.to.dtype, (node, torch.bfloat16))


def a_size(graph: fx.Graph) -> None:
    first(graph, aten.reshape.default).update_arg(1, [2, 11, -1, 8])


def a_length(graph: fx.Graph) -> None:
    """That the probe's length divides nothing: the op still runs."""
    after(graph, (node := anchors(graph)[0]), "call_function", aten.slice.Tensor, (node, 1, 0, 11))


def a_note(graph: fx.Graph) -> None:
    node = first(graph, aten.neg.default)
    node.meta["val"] = node.meta["val"].float()


def no_note(graph: fx.Graph) -> None:
    del first(graph, aten.neg.default).meta["val"]


def no_anchor(graph: fx.Graph) -> None:
    node: Any = anchors(graph)[0]
    node.replace_all_uses_with(first(graph, aten.transpose.int))
    graph.erase_node(node)


def two_anchors(graph: fx.Graph) -> None:
    node: Any = anchors(graph)[0]
    after(graph, node, "node_copy", node)


def no_layer(graph: fx.Graph) -> None:
    anchors(graph)[0].update_arg(8, None)


def keys_in_another_layout(graph: fx.Graph) -> None:
    node: Any = anchors(graph)[0]
    source = node.args[1]
    with graph.inserting_before(node):
        turned = graph.call_function(aten.transpose.int, (source, 1, 3))
    turned.meta["val"] = source.meta["val"].transpose(1, 3)
    node.update_arg(1, turned)


def a_module(graph: fx.Graph) -> None:
    first(graph, "k_proj").target = "w_proj"


def an_order(graph: fx.Graph) -> None:
    anchors(graph)[0].append(first(graph, "q_proj"))


BREAKS: dict[Break, str] = {
    a_method: "calls the method contiguous; only ops and modules can be called",
    a_function: "calls cat, which is no op",
    an_op_in_place: r"changes its arguments \(aten.neg_.default\)",
    a_tensor: "has a constant Tensor among its arguments; make it a buffer",
    a_device: "has the probe's meta baked in",
    a_cast: "has the probe's torch.bfloat16 baked in",
    a_size: "works at the probe's sizes only|gives .*, but is noted as",
    a_length: r"gives \[B, 11, 4, 8\] of bfloat16, but is noted as \[B, T, 4, 8\] of bfloat16",
    a_note: "of bfloat16, but is noted as .* of float32",
    no_note: "nothing is noted of its shape",
    no_anchor: "there are 0 of attention",
    two_anchors: "there are 2 of attention.*; expected one",
    no_layer: "names no layer",
    keys_in_another_layout: r"expected \[B, H, T, d\], \[B, G, S, d\]",
    a_module: "takes w_proj, which its module does not have",
    an_order: "used before it has been defined",
}


def test_what_capture_makes_is_sound() -> None:
    root = captured()
    verify(root.graph, "capture", root=root)


@pytest.mark.parametrize("breakage", BREAKS, ids=lambda breakage: breakage.__name__)
def test_a_breakage_is_seen(breakage: Break) -> None:
    root = captured()
    graph = copy.deepcopy(root.graph)
    breakage(graph)
    with pytest.raises(CaptureError, match=f"^after a pass: .*({BREAKS[breakage]})") as error:
        verify(graph, "a pass", root=root)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("family", "name", "breakage", "words"),
    [
        ("llama", "clean", a_method, "calls the method"),
        ("llama", "retarget_sizes", a_length, r"gives \[B, 11, 4, 8\]"),
        ("llama", "raise_children", a_tensor, "constant Tensor"),
        ("falcon", "emit_anchor", a_method, "calls the method"),
        ("gpt_neo", "drop_past", no_layer, "names no layer"),
        ("gpt_neo", "merge_duplicates", no_layer, "names no layer"),
    ],
)
def test_the_pass_that_broke_a_graph_is_named(
    family: str, name: str, breakage: Break, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = getattr(export, name)

    def broken(graph: fx.Graph, *others: Any) -> None:
        done(graph, *others)
        breakage(graph)

    monkeypatch.setattr(export, name, broken)
    with pytest.raises(CaptureError, match=rf"\(\w+\): after {name}: .*{words}"):
        capture(shared(family), fresh=True)


@pytest.mark.parametrize(("target", "options"), [("mla", {"kv_budget": 1.0}), ("gateswa", WINDOWED)])
def test_a_kind_that_breaks_a_graph_is_named(
    target: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    attnedit.compile(shared("llama"), target, verify=False, **options)
    done = site_graph.prune

    def broken(graph: fx.Graph) -> None:
        done(graph)
        module = first(graph, target)
        output = next(iter(module.users))
        output.meta["val"] = output.meta["val"].to(torch.float16)

    monkeypatch.setattr(site_graph, "prune", broken)
    with pytest.raises(CaptureError, match=f"^after attnedit.{target}: .*is noted as .*float16"):
        attnedit.compile(shared("llama"), target, verify=False, **options)


@pytest.mark.parametrize("name", ["simplify", "fuse_norm", "fuse_swiglu"])
def test_a_pass_over_a_program_that_breaks_it_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Block(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.dropout(x, 0.0, False).exp().sum(-1)

    def broken(module: fx.GraphModule, *_: Any) -> None:
        done(module, *_)
        first(module.graph, aten.exp.default).meta["val"] = torch.empty(3, device="meta")

    program = torch.export.export(Block(), (torch.randn(2, 4),))
    assert any(node.target == aten.exp.default for node in fuse.fuse(program).graph.nodes)
    own = name.removeprefix("fuse")
    done: Any = getattr(fuse, own)
    broken.__name__ = own
    monkeypatch.setattr(fuse, own, broken)
    monkeypatch.setattr(fuse, "PATTERNS", [broken if pattern is done else pattern for pattern in fuse.PATTERNS])
    with pytest.raises(attnedit.AttneditError, match=f"^after {name}: .*is noted as"):
        fuse.fuse(program)


def test_a_rewrite_that_breaks_a_graph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    # What takes the probe's dtype and device out of traced code.
    monkeypatch.setattr(graft, "_finish", lambda *_: {})

    class Shift(attnedit.Rewrite):
        def pattern(self, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
            return attnedit.attention(query_BHTd, key_BGTd, value_BGTv)

        def replacement(self, match: attnedit.Match, query_BHTd: Any, key_BGTd: Any, value_BGTv: Any) -> Any:
            output = attnedit.attention(query_BHTd, key_BGTd, value_BGTv)
            return output + torch.zeros(1, device=output.device, dtype=output.dtype)

    with pytest.raises(
        RewriteError, match=r"^after Shift.replacement \(test_spec.py:\d+\): .* the probe's .* baked in"
    ):
        attnedit.rewrite(shared("llama"), Shift(), verify=False)

"""Reads the facts of an attention site off its normalised graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from transformers.pytorch_utils import Conv1D

from attnedit.compiler.capture.rope import combine, measure
from attnedit.compiler.capture.sites import Facts, NormKind, Projection, Rope
from attnedit.compiler.errors import CaptureError, OtherAttentionError
from attnedit.compiler.graph.dataflow import (
    Evaluator,
    anchors,
    aten,
    digraph,
    dominators,
    is_tensor,
    sources,
    value_ancestors,
    value_inputs,
    where,
)

_EXACT = 1e-9


class NoOutputProjectionError(CaptureError):
    """The output projection is not in the module that runs attention."""


@dataclass(frozen=True)
class _Path:
    """How one of query, key, value comes from the hidden states."""

    projection: Projection | None
    norm: NormKind | None
    affine: bool


@dataclass(frozen=True)
class _Positions:
    """Query and key before their rotary embedding, what it is, its constant factor; or why it cannot be read."""

    query: fx.Node
    key: fx.Node
    rope: Rope | None
    scale: float
    unread: str | None


class FactReader:
    """Reads one graph; the graph may gain nodes that put pre-rope tensors and angles into their usual layout.

    `written_out`: the module writes its attention out, so lengths of new and attended tokens are apart in its graph.
    `angles_known`: some module of the model computes cosines and sines.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: torch.nn.Module,
        constants: Mapping[str, torch.Tensor],
        written_out: bool = False,
        angles_known: bool = True,
    ) -> None:
        self.graph = graph
        self.angles_known = angles_known
        self.written_out = written_out
        self.module = module
        self.evaluator = Evaluator(module, constants)
        found = anchors(graph)
        if len(found) != 1:
            raise CaptureError(f"its graph has {len(found)} anchors; expected 1")
        self.anchor = found[0]
        self.q, self.k, self.v = (self._node(i) for i in range(3))
        self.flow = digraph(graph)
        inputs = sources(self.v)
        if len(inputs) != 1:
            names = ", ".join(node.name for node in inputs) or "no argument"
            raise OtherAttentionError(f"{where(self.v)}: values depend on {names}; expected the hidden states alone")
        self.input = inputs[0]

    def _node(self, index: int) -> fx.Node:
        node = self.anchor.args[index]
        assert isinstance(node, fx.Node)
        return node

    def read(self) -> Facts:
        """All facts, or CaptureError naming the node where one cannot be read."""
        mla = self._already_mla()
        positions = _Positions(self.q, self.k, None, 1.0, None) if mla else self._positions()
        query, key = positions.query, positions.key
        hidden = self._region_input(query, key)
        unread = _Path(None, None, False)
        known = not mla and positions.unread is None
        q, k = (self._path(node, hidden) if known else unread for node in (query, key))
        v = unread if mla else self._path(self.v, hidden)
        output = self._output_projection()
        _, heads, _, head_dim = self.q.meta["val"].shape
        groups, v_head_dim = self.v.meta["val"].shape[1], self.v.meta["val"].shape[3]
        settings: Any = self.anchor.args[3:8]
        mask, scale, softcap, sinks, window = settings
        if sinks is not None and not (isinstance(sinks, fx.Node) and sinks.op == "get_attr"):
            raise CaptureError(f"{where(self.anchor)}: its sinks are computed ({sinks}); expected a parameter")
        bias = isinstance(mask, fx.Node) and not self._passed_through(mask)
        if bias and (not self.written_out or self.input in sources(mask)):
            raise OtherAttentionError(f"{where(mask)}: its attention mask is computed inside the attention module")
        if isinstance(mask, fx.Node) and mask.meta["val"].dim() == 4:
            bias = bias or mask.meta["val"].shape[1] == heads  # the model has added biases to the mask
        return Facts(
            hidden=hidden.name,
            query=query.name,
            key=key.name,
            value=self.v.name,
            anchor=self.anchor.name,
            output_projection=output.name,
            num_attention_heads=int(heads),
            num_key_value_heads=int(groups),
            head_dim=int(head_dim),
            v_head_dim=int(v_head_dim),
            scale=scale * positions.scale,
            softcap=softcap if softcap is None else float(softcap),
            window=window if window is None else int(window),
            sinks=None if sinks is None else str(sinks.target),
            mask=mask.name if isinstance(mask, fx.Node) else None,
            bias=bias,
            rope=positions.rope,
            unread_rope=positions.unread,
            q_proj=q.projection,
            k_proj=k.projection,
            v_proj=v.projection,
            o_proj=self._projection(output, None, 1.0),
            key_norm=k.norm,
            query_norm=q.norm,
            output_gate=self._output_gate(output),
            linear_kv=k.affine and v.affine,
            already_mla=mla,
        )

    def _positions(self) -> _Positions:
        """Where the rotary embedding starts; where it cannot be read, query and key are the anchor's inputs."""
        try:
            query, key = self._before_rope(self.q), self._before_rope(self.k)
            if (query is self.q) != (key is self.k):
                raise CaptureError(f"{where(self.anchor)}: only one of query and key depends on positions")
            if key is self.k:
                return _Positions(query, key, None, 1.0, None)
            turned = [
                measure(self.evaluator, self.input, node, after) for node, after in ((query, self.q), (key, self.k))
            ]
            rope = combine(turned[0], turned[1], self.anchor)
            given = [n for n in sources(turned[0].cos) if n.meta["val"].is_floating_point()]
            if given and not self.angles_known:
                raise CaptureError(f"{where(self.anchor)}: {given[0].name}, its angles, is no module's own output")
        except CaptureError as error:
            return _Positions(self.q, self.k, None, 1.0, str(error))
        rope = dataclasses.replace(rope, cos=self._table(rope.cos), sin=self._table(rope.sin))
        return _Positions(query, key, rope, turned[0].scale * turned[1].scale, None)

    def _passed_through(self, mask: fx.Node) -> bool:
        """The mask is an argument of the module, at most sliced."""
        while mask.target is aten.slice.Tensor:
            mask = value_inputs(mask)[0]
        return sources(mask) == [mask]

    def _linear(self, node: fx.Node) -> torch.nn.Module | None:
        if node.op != "call_module":
            return None
        child = self.module.get_submodule(str(node.target))
        return child if isinstance(child, torch.nn.Linear | Conv1D) else None

    def _projection(self, node: fx.Node, rows: tuple[int, ...] | None, scale: float) -> Projection:
        child = self._linear(node)
        assert child is not None
        name = str(node.target)
        bias = f"{name}.bias" if getattr(child, "bias", None) is not None else None
        return Projection(name, f"{name}.weight", bias, rows, isinstance(child, Conv1D), scale)

    def _already_mla(self) -> bool:
        """Keys and values both come through a second linear module from one narrower than they are."""
        inside = {n for n in value_ancestors(self.k) if self._linear(n) is not None}
        heads, head_dim = self.k.meta["val"].shape[1], self.k.meta["val"].shape[3]
        width = heads * (head_dim + self.v.meta["val"].shape[3])
        of_value = value_ancestors(self.v)
        return any(
            first is not second and first in value_ancestors(second) and int(first.meta["val"].shape[-1]) < width
            for second in inside & of_value
            for first in inside & of_value
        )

    def _before_rope(self, node: fx.Node) -> fx.Node:
        """The last node every path to `node` goes through that depends on nothing but the hidden states."""
        if sources(node) == [self.input]:
            return node
        for candidate in dominators(self.flow, self.input, node):
            # A cast belongs to what comes after it: queries and keys are in the model's dtype.
            cast = candidate.target in (aten.to.dtype, aten.type_as.default)
            if is_tensor(candidate) and not cast and sources(candidate) == [self.input]:
                return self._heads_first(candidate, node)
        raise CaptureError(f"{where(node)}: no node before its rotary embedding depends on the hidden states alone")

    def _table(self, name: str) -> str:
        """The node of cos or sin as [B or 1, T, columns]; where it has a dim for heads, that one is taken out."""
        node = next(n for n in self.graph.nodes if n.name == name)
        shape = node.meta["val"].shape
        single = [dim for dim in (1, 2) if isinstance(shape[dim], int) and shape[dim] == 1] if len(shape) == 4 else []
        if not single:
            return name
        return self._through(node, aten.squeeze.dim, aten.unsqueeze.default, (single[-1],)).name

    def _heads_first(self, candidate: fx.Node, node: fx.Node) -> fx.Node:
        """`candidate` as [B, heads, T, d]; where heads come after T, transposes are put around it."""
        shape, wanted = candidate.meta["val"].shape, node.meta["val"].shape
        expected = (wanted[1], wanted[3])
        if len(shape) == 4 and (shape[1], shape[3]) == expected:
            return candidate
        if len(shape) != 4 or (shape[2], shape[3]) != expected:
            raise CaptureError(
                f"{where(candidate)}: before its rotary embedding {node.name} has shape {list(shape)}; "
                f"expected [batch, {expected[0]}, length, {expected[1]}]"
            )
        return self._through(candidate, aten.transpose.int, aten.transpose.int, (1, 2))

    def _through(self, node: fx.Node, forth: Any, back: Any, arguments: tuple[int, ...]) -> fx.Node:
        """Another layout of `node` that everything after it now comes from, by way of the opposite change of layout."""
        users = list(node.users)
        with self.graph.inserting_after(node):
            moved = self.graph.call_function(forth, (node, *arguments))
        with self.graph.inserting_after(moved):
            original = self.graph.call_function(back, (moved, *arguments))
        for new, value in ((moved, forth(node.meta["val"], *arguments)), (original, node.meta["val"])):
            new.meta.update(node.meta)
            new.meta["val"] = value
        for user in users:
            user.replace_input_with(node, original)
        self.flow = digraph(self.graph)
        return moved

    def _region_input(self, query: fx.Node, key: fx.Node) -> fx.Node:
        """Input of the nearest linear module before the values that queries and keys come from too."""
        chain = dominators(self.flow, self.input, self.v)
        common = set(dominators(self.flow, self.input, query)) & set(dominators(self.flow, self.input, key))
        start = next((i for i, n in enumerate(chain) if self._linear(n) is not None), -1)
        found = next((n for n in chain[start + 1 :] if n in common and is_tensor(n)), None)
        if found is None:
            raise OtherAttentionError(f"{where(self.anchor)}: queries, keys and values do not come from one input")
        return found

    def _path(self, node: fx.Node, hidden: fx.Node) -> _Path:
        """The projection that a query, key or value [B, N, T, d] comes from, and what stands between the two."""
        chain = dominators(self.flow, hidden, node)
        linear = next((n for n in chain if self._linear(n) is not None), None)
        if linear is None or not value_inputs(linear) or value_inputs(linear)[0] is not hidden:
            return _Path(None, None, False)
        for candidate in chain[: chain.index(linear) + 1]:
            if not is_tensor(candidate):
                continue
            selected = self._selection(linear, candidate, hidden)
            if selected is None:
                continue
            rows, scale = selected
            every = tuple(range(int(linear.meta["val"].shape[-1])))
            projection = self._projection(linear, None if rows == every else rows, scale)
            norm = None if candidate is node else self._norm_kind(linear, node, hidden, rows)
            return _Path(projection, norm, candidate is node)
        return _Path(None, None, False)

    def _run(self, linear: fx.Node, node: fx.Node, hidden: fx.Node, output: torch.Tensor) -> torch.Tensor:
        """The value of a node where a linear module gives `output` [1, T, features], float64; `hidden` gives sizes."""
        width = hidden.meta["val"].shape[-1]
        sizes = torch.zeros(1, output.shape[1], width, dtype=torch.float64)
        given: dict[fx.Node, Any] = {hidden: sizes, self.input: sizes, linear: output}
        result = self.evaluator.run([node], given)[0]
        assert isinstance(result, torch.Tensor)
        return result

    def _selection(self, linear: fx.Node, node: fx.Node, hidden: fx.Node) -> tuple[tuple[int, ...], float] | None:
        """(rows, scale) where `node` is scale times a choice of the features of `linear`; None where it is not.

        Rows in (head, dim) order. Feature numbers are pushed through the graph, then random numbers check them.
        """
        features, length = int(linear.meta["val"].shape[-1]), 3
        ones = torch.ones(1, length, features, dtype=torch.float64)

        def run(output: torch.Tensor) -> torch.Tensor:
            result = self._run(linear, node, hidden, output)
            # [B, N, T, d] or [B, T, N, d] or [B, T, N*d], flattened to [T, N*d]
            if result.dim() == 4 and not is_sequence_second(node):
                result = result.transpose(1, 2)
            return result.reshape(length, -1)

        numbers, unit, nothing = run(ones * torch.arange(1.0, features + 1)), run(ones), run(0 * ones)
        scale = float(unit[0, 0])
        if scale == 0.0 or not bool((unit == scale).all()) or bool((nothing != 0).any()):
            return None
        rows = (numbers[0] / scale - 1).round()
        if float((numbers / scale - 1 - rows).abs().max()) > 1e-6 or int(rows.max()) >= features or int(rows.min()) < 0:
            return None
        generator = torch.Generator().manual_seed(0)
        random = torch.randn(1, length, features, dtype=torch.float64, generator=generator) * 1e3
        index = rows.long()
        if float((run(random) - scale * random[0][:, index]).abs().max()) > _EXACT * 1e3 * abs(scale):
            return None
        return tuple(int(i) for i in index.tolist()), scale

    def _norm_kind(self, linear: fx.Node, node: fx.Node, hidden: fx.Node, rows: tuple[int, ...]) -> NormKind:
        """What a change of the first feature of the first head reaches: the other heads, the head, or itself only."""
        features = int(linear.meta["val"].shape[-1])
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(1, 2, features, dtype=torch.float64, generator=generator)
        changed = base.clone()
        changed[..., rows[0]] += 1.0
        difference = (self._run(linear, node, hidden, base) - self._run(linear, node, hidden, changed)).abs()[0, :, 0]
        if bool((difference[1:] > _EXACT).any()):
            return "projection"
        return "per_head" if bool((difference[0, 1:] > _EXACT).any()) else "elementwise"

    def _output_projection(self) -> fx.Node:
        """First linear module on the way every path from the anchor to the output takes."""
        output = next(n for n in self.graph.nodes if n.op == "output")
        for node in dominators(self.flow.reverse(copy=False), output, self.anchor)[1:]:
            if self._linear(node) is not None:
                return node
        raise NoOutputProjectionError(f"{where(self.anchor)}: no linear module takes all of its output")

    def _output_gate(self, output: fx.Node) -> bool:
        """Something between anchor and output projection brings in values that bypass the anchor."""
        for node in value_ancestors(output):
            if node is self.anchor or self.anchor not in value_ancestors(node):
                continue
            for source in value_inputs(node):
                if self.anchor not in value_ancestors(source) and self.input in value_ancestors(source):
                    return True
        return False


def is_sequence_second(node: fx.Node) -> bool:
    """True for a 4-D value laid out [B, T, heads, d]."""
    shape = node.meta["val"].shape
    return isinstance(shape[1], torch.SymInt) and not isinstance(shape[2], torch.SymInt)

"""Attention that a module writes out itself, instead of calling the interface: found in its graph, made an anchor.

Such a module is exported with a stand-in for its cache (`Past`), so that its keys and values are known for certain and
the lengths of new and of attended tokens stay apart. Where the module then computes::

    softmax(scale * q . k + bias) v        or        scaled_dot_product_attention(q, k, v, bias)

the anchor takes over; `bias` is whatever the module makes of its other arguments: masks, ALiBi, windows of its own.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnedit.compiler.capture.normalise import hidden_input
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.dataflow import Evaluator, aten, is_tensor, value_ancestors, where
from attnedit.compiler.graph.surgery import substitute


@torch.library.custom_op("attnedit::cached", mutates_args=())
def cached(past: torch.Tensor, new: torch.Tensor, role: str, layer: int) -> torch.Tensor:
    """What `Past.update` returns: past [B, G, P, d] and new [B, G, T, d] in one [B, G, P + T, d]; only in graphs."""
    return torch.cat((past, new), dim=2)


@cached.register_fake
def _cached_fake(past: torch.Tensor, new: torch.Tensor, role: str, layer: int) -> torch.Tensor:
    return new.new_empty((new.shape[0], new.shape[1], past.shape[2] + new.shape[2], new.shape[3]))


class Past:
    """Stands for the cache of one attention module while it is exported; keys and values [B, G, P, d]."""

    is_compileable = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._keys, self._values = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `transformers.Cache.update`."""
        layer = -1 if layer_idx is None else int(layer_idx)
        return cached(self._keys, key_states, "key", layer), cached(self._values, value_states, "value", layer)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """As `transformers.Cache.get_seq_length`."""
        return self._keys.shape[2]


_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_SDPA = aten.scaled_dot_product_attention.default
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_CASTS = (
    *(aten._to_copy.default, aten.to.dtype, aten.type_as.default, aten.clone.default, aten.contiguous.default),
    *(aten.alias.default, aten.detach.default, aten.detach_.default, aten.dropout.default),
)
_RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
_REPEATS = (aten.expand.default, aten.unsqueeze.default, aten.flatten.using_ints)
_MULTIPLY = (aten.mul.Tensor, aten.mul.Scalar, aten.mul_.Tensor)
_DIVIDE = (aten.div.Tensor, aten.div.Scalar, aten.div_.Tensor)
_ADD = (aten.add.Tensor, aten.add_.Tensor)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor, aten.masked_fill_.Scalar)
_FLOORS = (aten.maximum.default, aten.max.other, aten.clamp.default, aten.clamp_min.default)
_HIDDEN = -1e4  # logits as low as this take no part
_CHOOSE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


@dataclass
class _Logits:
    """What a node on the way from the product to the softmax holds: factor * q . k + bias."""

    factor: float
    bias: fx.Node | None


def emit_anchor(graph: fx.Graph, evaluator: Evaluator) -> None:
    """Replace the attention that a graph writes out by the anchor; its stand-in cache is gone afterwards.

    Args:
        graph: exported with a `Past`; cleaned.
        evaluator: of the graph, to read constants.

    Raises:
        CaptureError: what stands there is no softmax attention as described above; the message names the node.
    """
    keys, values = _cached_nodes(graph)
    for node in list(graph.nodes):
        if node.target is aten.baddbmm.default:
            _split_baddbmm(graph, node)
    reading = [n for n in graph.nodes if n.target in (*_SOFTMAX, _SDPA) and keys in value_ancestors(n)]
    if len(reading) != 1:
        names = ", ".join(where(node) for node in reading) or "none"
        raise CaptureError(f"its graph has {len(reading)} softmaxes over the cached keys ({names}); expected 1")
    found = reading[0]
    if found.target is _SDPA:
        query, factor, bias, mixed = _from_sdpa(found, keys, values)
    else:
        query, factor, bias = _from_softmax(graph, found, keys, evaluator)
        mixed = _mixed(found, values)
    layer = keys.args[3]
    with graph.inserting_before(mixed):
        arguments = (query, keys.args[1], values.args[1], bias, factor, None, None, None, layer)
        anchor = _call(graph, torch.ops.attnedit.attention.default, arguments)
        result = _call(graph, aten.transpose.int, (anchor, 1, 2))
        if mixed.meta["val"].dim() == 3:
            result = _call(graph, aten.flatten.using_ints, (result, 0, 1))
        anchor.meta["stack_trace"] = found.meta.get("stack_trace")
    mixed.replace_all_uses_with(result)
    _forget_weights(graph, found)
    graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    left = [n for n in graph.nodes if n.target is torch.ops.attnedit.cached.default]
    if left:
        raise CaptureError(f"{where(left[0])}: cached keys or values are used outside the attention")


def _cached_nodes(graph: fx.Graph) -> tuple[fx.Node, fx.Node]:
    found = [n for n in graph.nodes if n.target is torch.ops.attnedit.cached.default]
    if [n.args[2] for n in found] != ["key", "value"]:
        raise CaptureError(f"it updates its cache {len(found) // 2} times in one forward; expected 1")
    for node in found:
        new: Any = node.args[1]
        if new.meta["val"].dim() != 4:
            shape = list(new.meta["val"].shape)
            raise CaptureError(f"{where(node)}: it caches tensors of shape {shape}; expected [batch, heads, length, d]")
    return found[0], found[1]


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """A new node with its value on meta."""
    node = graph.call_function(target, args)
    values = fx.node.map_arg(args, lambda n: n.meta["val"])
    mode = next(n.meta["val"].fake_mode for n in node.all_input_nodes if is_tensor(n))
    with mode:
        node.meta["val"] = target(*values)
    return node


def _split_baddbmm(graph: fx.Graph, node: fx.Node) -> None:
    """Write beta * bias + alpha * a b as four nodes."""
    bias, first, second = node.args[:3]
    with graph.inserting_before(node):
        product = _call(graph, aten.bmm.default, (first, second))
        scaled = _call(graph, aten.mul.Tensor, (product, node.kwargs.get("alpha", 1)))
        beta = node.kwargs.get("beta", 1)
        added = bias if beta == 1 else _call(graph, aten.mul.Tensor, (bias, beta))
        total = _call(graph, aten.add.Tensor, (scaled, added))
    for new in (product, scaled, total):
        new.meta = {**node.meta, "val": new.meta["val"]}
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _from_sdpa(node: fx.Node, keys: fx.Node, values: fx.Node) -> tuple[fx.Node, float, fx.Node | None, fx.Node]:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    if keys not in value_ancestors(given["key"]) or values not in value_ancestors(given["value"]):
        raise CaptureError(f"{where(node)}: its keys and values are not those it caches")
    query, factor = _query(given["query"])
    scale = given.get("scale")
    factor *= float(query.meta["val"].shape[-1] ** -0.5 if scale is None else scale)
    if given.get("attn_mask") is None:
        raise CaptureError(f"{where(node)}: it is given no mask, so it may not be causal")
    return query, factor, given["attn_mask"], node


def _from_softmax(
    graph: fx.Graph, softmax: fx.Node, keys: fx.Node, evaluator: Evaluator
) -> tuple[fx.Node, float, fx.Node | None]:
    """Query, scale and bias of softmax(scale * q . k + bias), by going from the product to the softmax."""
    product, query = _product(softmax, keys)
    inside = value_ancestors(softmax)
    held: dict[fx.Node, _Logits] = {product: _Logits(1.0, None)}
    for node in list(graph.nodes):
        if node in inside and node is not softmax and any(n in held for n in node.all_input_nodes):
            with graph.inserting_before(node):
                held[node] = _step(graph, node, held, evaluator)
    last: Any = softmax.args[0]
    found, factor = _query(query)
    if softmax.args[1] not in (-1, last.meta["val"].dim() - 1):
        raise CaptureError(f"{where(softmax)}: its softmax is not over keys")
    bias = held[last].bias
    if bias is not None and bias.meta["val"].dim() == 3:
        heads = int(found.meta["val"].shape[1])
        with graph.inserting_before(softmax):
            bias = _call(graph, aten.unflatten.int, (bias, 0, (-1, heads)))
    return found, factor * held[last].factor, bias


def _product(softmax: fx.Node, keys: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The product of queries and keys, and its factor that holds the queries."""
    for node in softmax.graph.nodes:
        if node.target in _PRODUCTS and node in value_ancestors(softmax):
            first, second = node.args
            of_keys = [keys in value_ancestors(side) for side in (first, second)]
            if of_keys == [False, True]:
                return node, first
    raise CaptureError(f"{where(softmax)}: no product of queries and cached keys comes before it")


def _query(node: fx.Node) -> tuple[fx.Node, float]:
    """The node [B, H, T, d] that queries come from, and the constant between it and `node`."""
    factor = 1.0
    while (source := node.args[0] if node.args else None) is not None and isinstance(source, fx.Node):
        number = node.args[1] if len(node.args) > 1 else None
        if node.target in (*_MULTIPLY, *_DIVIDE) and isinstance(number, int | float):
            factor *= float(number) if node.target in _MULTIPLY else 1 / float(number)
        elif node.target not in _CASTS and not _only_reshaped(node, source):
            break
        node = source
    if node.meta["val"].dim() != 4:
        raise CaptureError(f"{where(node)}: queries have shape {list(node.meta['val'].shape)}; expected 4 dims")
    return node, factor


def _only_reshaped(node: fx.Node, source: fx.Node) -> bool:
    """A change between [B, H, T, d] and the shape that a product takes."""
    if node.target not in (*_RESHAPES, *_REPEATS):
        return False
    return bool(node.meta["val"].dim() != 4 or source.meta["val"].shape == node.meta["val"].shape)


def _step(graph: fx.Graph, node: fx.Node, held: dict[fx.Node, _Logits], evaluator: Evaluator) -> _Logits:
    """What a node holds, given what its inputs hold; new nodes compute its bias."""

    def number(value: Any) -> float | None:
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, fx.Node) and is_tensor(value) and value.meta["val"].numel() == 1:
            try:
                return float(evaluator.run([value], {})[0])
            except KeyError:  # it depends on an argument
                return None
        return None

    first = node.args[0]
    on_path = [n for n in node.all_input_nodes if n in held]
    if len(on_path) != 1:
        raise CaptureError(f"{where(node)} takes attention logits twice")
    logits = held[on_path[0]]
    bias = logits.bias
    if node.target in _CASTS:
        return logits
    if node.target in (*_RESHAPES, *_REPEATS):
        return _Logits(logits.factor, None if bias is None else _reshaped(graph, node, on_path[0], bias))
    if node.target in (*_MULTIPLY, *_DIVIDE) and first in held and (by := number(node.args[1])) is not None:
        scaled = None if bias is None else _call(graph, _plain(node.target), (bias, node.args[1]))
        return _Logits(logits.factor * by if node.target in _MULTIPLY else logits.factor / by, scaled)
    if node.target in _ADD and set(node.kwargs) <= {"alpha"} and node.kwargs.get("alpha", 1) == 1:
        other = node.args[1] if first in held else first
        if isinstance(other, fx.Node):
            return _Logits(logits.factor, other if bias is None else _call(graph, aten.add.Tensor, (bias, other)))
    if node.target in _FLOORS and first in held and (least := number(node.args[1])) is not None and least <= _HIDDEN:
        return _Logits(logits.factor, None if bias is None else _call(graph, node.target, (bias, node.args[1])))
    if node.target in _FILL and first in held:
        return _Logits(logits.factor, _filled(graph, node.args[1], node.args[2], bias, hide=True))
    if node.target in _CHOOSE and node.args[0] not in held:
        condition, chosen, other = node.args
        value = other if chosen in held else chosen
        return _Logits(logits.factor, _filled(graph, condition, value, bias, hide=chosen not in held))
    raise CaptureError(f"{where(node)} does to attention logits what cannot be a scale, a bias or a mask")


def _plain(target: Any) -> Any:
    return {aten.mul_.Tensor: aten.mul.Tensor, aten.div_.Tensor: aten.div.Tensor}.get(target, target)


def _reshaped(graph: fx.Graph, node: fx.Node, source: fx.Node, bias: fx.Node) -> fx.Node:
    """The same change of shape for a bias, which may be one row where logits have many."""
    wanted, own = source.meta["val"], bias.meta["val"]
    if own.shape != wanted.shape:
        kept: list[Any] = [-1] * own.dim()
        for dim in range(-own.dim(), 0):
            if isinstance(own.shape[dim], int) and own.shape[dim] == 1:
                kept[dim] = wanted.shape[dim] if isinstance(wanted.shape[dim], int) else _size(graph, source, dim)
        bias = _call(graph, aten.expand.default, (bias, kept))
    return _call(graph, _plain_reshape(node.target), (bias, *node.args[1:]))


def _plain_reshape(target: Any) -> Any:
    return aten.reshape.default if target in _RESHAPES else target


def _size(graph: fx.Graph, node: fx.Node, dim: int) -> fx.Node:
    """A node that holds a size: one the graph has already, if any, since the tensor itself is to go."""
    size = node.meta["val"].shape[dim]
    known: fx.Node
    for known in graph.nodes:
        if known is node:
            break
        value = known.meta.get("val")
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return known
    raise CaptureError(f"{where(node)}: its size {size} is the size of no argument")


def _filled(graph: fx.Graph, mask: Any, value: Any, bias: fx.Node | None, hide: bool) -> fx.Node:
    """A bias that is `value` where a bool mask says so (or, not `hide`, where it does not)."""
    shown: Any = mask
    if not hide:
        shown = _call(graph, aten.logical_not.default, (mask,))
    if bias is None:
        bias = _call(graph, aten.zeros_like.default, (shown,))
        bias.kwargs = {"dtype": torch.float32}
        bias.meta["val"] = bias.meta["val"].float()
    target = aten.masked_fill.Tensor if isinstance(value, fx.Node) else aten.masked_fill.Scalar
    return _call(graph, target, (bias, shown, value))


def _mixed(softmax: fx.Node, values: fx.Node) -> fx.Node:
    """The product of attention weights and values."""
    waiting: list[fx.Node] = list(softmax.users)
    seen: set[fx.Node] = set()
    while waiting:
        node = waiting.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if node.target in _PRODUCTS and values in value_ancestors(node.args[1]):  # type: ignore[arg-type]
            return node
        if node.target in (*_CASTS, *_RESHAPES, *_REPEATS, operator.getitem, aten.native_dropout.default):
            waiting.extend(node.users)
        elif node.op != "output":
            raise CaptureError(f"{where(node)} changes the attention weights, or uses them in another way")
    raise CaptureError(f"{where(softmax)}: no product of its weights and the cached values comes after it")


def _forget_weights(graph: fx.Graph, softmax: fx.Node) -> None:
    """Return None for attention weights: they are no longer computed."""
    output = next(n for n in graph.nodes if n.op == "output")
    attended = [n for n in graph.nodes if n.target is torch.ops.attnedit.attention.default]

    def forget(node: fx.Node) -> Any:
        found = value_ancestors(node)
        return None if softmax in found and not any(n in found for n in attended) else node

    output.args = fx.node.map_arg(output.args, forget)


def drop_past(graph: fx.Graph, past: list[fx.Node], attended: tuple[fx.Node, int] | None) -> None:
    """Erase the placeholders of the stand-in cache, of which only sizes are used any more.

    Args:
        graph: after `emit_anchor`.
        past: their placeholders.
        attended: an argument, and its dim that is as long as what is attended to; None where there is none.

    Raises:
        CaptureError: the number of cached tokens is needed, and no argument shows it.
    """
    hidden = hidden_input(graph)
    if hidden is None:
        raise CaptureError("its values depend on more than the hidden states")
    for placeholder in past:
        for node in list(placeholder.users):
            if node.target is not aten.sym_size.int:
                raise CaptureError(f"{where(node)} reads its cache")
            with graph.inserting_before(node):
                if node.args[1] == 0:
                    new = graph.call_function(aten.sym_size.int, (hidden, 0))
                elif attended is None:
                    raise CaptureError(f"{where(node)}: no argument tells how many tokens are cached")
                else:
                    total = graph.call_function(aten.sym_size.int, attended)
                    length = graph.call_function(aten.sym_size.int, (hidden, 1))
                    new = graph.call_function(operator.sub, (total, length))
                    shape = attended[0].meta["val"].shape
                    total.meta["val"], length.meta["val"] = shape[attended[1]], hidden.meta["val"].shape[1]
            substitute(node, new)
        graph.erase_node(placeholder)

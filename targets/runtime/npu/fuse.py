"""Fused operators found on the graph: RMSNorm (with the addition before it), rotation, SwiGLU, softmax gating.

A pattern is what aten shows, whatever module wrote it. Where the operands' shapes or dtypes are not what the operator
documents, the graph stays as it is.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from attnedit.compiler.errors import AttneditError
from attnedit.compiler.graph.spec import verify
from attnedit.targets.runtime.npu.simplify import simplify, value

aten = torch.ops.aten
npu = torch.ops.npu


def fuse(program: ExportedProgram, fused: bool = True) -> fx.GraphModule:
    """Return a program in training form as a module, simplified; if asked for, with fused operators where they fit.

    Raises:
        AttneditError: a pass broke the graph; it is named.
    """
    module = program.module()
    if not isinstance(module, fx.GraphModule):
        raise AssertionError("an exported program is a graph")
    simplify(module)
    _verify(module, "simplify")
    for pattern in PATTERNS if fused else ():
        for node in list(module.graph.nodes):
            pattern(module, node)
        module.graph.eliminate_dead_code()
        _verify(module, f"fuse{pattern.__name__}")
    _drop_unused(module)
    module.graph.lint()
    module.recompile()
    return module


def _verify(module: fx.GraphModule, made_by: str) -> None:
    given: dict[str, Any] = {"anchored": False, "resized": False, "program": True, "error": AttneditError}
    verify(module.graph, made_by, root=module, **given)


def _is(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def _uncast(node: Any) -> Any:
    """What a cast casts."""
    while _is(node, aten.to.dtype):
        node = node.args[0]
    return node


def _only_user(node: Any) -> Any:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _other(node: Any, known: Any) -> Any:
    """The other operand of a commutative operator."""
    return node.args[1] if node.args[0] is known else node.args[0]


def _replace(old: Any, build: Callable[[fx.Graph], fx.Node]) -> None:
    with old.graph.inserting_before(old):
        new = build(old.graph)
    new.meta = {name: old.meta[name] for name in ("val", "stack_trace", "nn_module_stack") if name in old.meta}
    old.replace_all_uses_with(new)
    old.graph.erase_node(old)


def _norm(module: fx.GraphModule, node: Any) -> None:
    """``x * rsqrt(mean(x^2) + eps) * w``, or ``* (1 + w)``, casts wherever they are."""
    if not _is(node, aten.rsqrt.default) or not _is(node.args[0], aten.add.Tensor):
        return
    mean, epsilon = node.args[0].args[:2]
    if not _is(mean, aten.mean.dim) or not isinstance(epsilon, float) or list(mean.args[1]) != [-1]:
        return
    square = mean.args[0]
    if not _is(square, aten.pow.Tensor_Scalar, aten.mul.Tensor, aten.square.default):
        return
    given = square.args[0]
    second = square.args[1] if len(square.args) > 1 else given
    if second is not given and second != 2:
        return
    scaled = _only_user(node)
    if scaled is None or not _is(scaled, aten.mul.Tensor) or _other(scaled, node) is not given:
        return
    last, weight, shifted = _weighted(scaled)
    source = _uncast(given)
    x, gamma = value(source), value(weight)
    if last is None or x is None or gamma is None or value(last).dtype != x.dtype or gamma.shape != x.shape[-1:]:
        return
    name = npu.npu_gemma_rms_norm.default if shifted else npu.npu_rms_norm.default
    added = source if _is(source, aten.add.Tensor) and not shifted else None
    if added is not None and _is_residual(added):
        return _add_norm(added, last, weight, epsilon)

    def build(graph: fx.Graph) -> fx.Node:
        both = graph.call_function(name, (source, _cast(graph, weight, x.dtype), epsilon))
        return graph.call_function(operator.getitem, (both, 0))

    _replace(last, build)


def _weighted(scaled: Any) -> tuple[Any, Any, bool]:
    """Follow a normalised node to its product with the weight: last node, weight, and whether the weight is 1 + w."""
    node = _only_user(scaled)
    before = scaled
    while node is not None and _is(node, aten.to.dtype):
        before, node = node, _only_user(node)
    if node is None or not _is(node, aten.mul.Tensor):
        return None, None, False
    factor = _uncast(_other(node, before))
    shifted = _is(factor, aten.add.Tensor) and 1 in factor.args[1:]
    weight = _uncast(factor.args[0]) if shifted else factor
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None, None, False
    after = _only_user(node)
    return (after if after is not None and _is(after, aten.to.dtype) else node), weight, shifted


def _is_residual(added: Any) -> bool:
    first, second = (value(arg) for arg in added.args[:2])
    return (
        first is not None
        and second is not None
        and first.shape == second.shape
        and first.dtype == second.dtype == value(added).dtype
        and not added.kwargs
        and len(added.args) == 2
    )


def _add_norm(added: Any, last: Any, weight: Any, epsilon: float) -> None:
    """Fuse the addition too: its other users take the sum from the operator."""
    graph = added.graph
    with graph.inserting_before(added):
        again = graph.get_attr(str(weight.target))
        again.meta = dict(weight.meta)
        gamma = _cast(graph, again, value(added).dtype)
        both = graph.call_function(npu.npu_add_rms_norm.default, (*added.args, gamma, epsilon))
        normed = graph.call_function(operator.getitem, (both, 0))
        total = graph.call_function(operator.getitem, (both, 2))
    normed.meta, total.meta = dict(last.meta), dict(added.meta)
    last.replace_all_uses_with(normed)
    graph.erase_node(last)
    added.replace_all_uses_with(total)


def _rotation(module: fx.GraphModule, node: Any) -> None:
    """``x cos + cat(-x2, x1) sin``, or the halves ``x1 cos - x2 sin`` and ``x2 cos + x1 sin`` joined."""
    found = _whole_rotation(node) or _halved_rotation(node)
    if found is None:
        return
    parts, cos, sin, halves = found
    size, table = value(node), value(cos)
    if size is None or table is None or value(sin) is None or size.dim() != 4 or table.dim() != 4:
        return
    width = table.shape[-1] * (2 if halves else 1)
    if width != size.shape[-1] or size.shape[-1] >= 896 or table.shape[1] != 1 or table.dtype != size.dtype:
        return
    if any(value(part) is None or value(part).shape[:-1] != size.shape[:-1] for part in parts):
        return

    def build(graph: fx.Graph) -> fx.Node:
        tables: tuple[Any, ...] = (cos, sin)
        if halves:
            tables = tuple(graph.call_function(aten.cat.default, ([part, part], -1)) for part in tables)
        x = parts[0] if len(parts) == 1 else graph.call_function(aten.cat.default, (parts, -1))
        return graph.call_function(npu.npu_rotary_mul.default, (x, *tables))

    _replace(node, build)


def _whole_rotation(node: Any) -> tuple[list[Any], Any, Any, bool] | None:
    if not _is(node, aten.add.Tensor) or not all(_is(arg, aten.mul.Tensor) for arg in node.args[:2]):
        return None
    for straight, turned in (node.args[:2], node.args[1::-1]):
        for cat, sin in (turned.args[:2], turned.args[1::-1]):
            x = _turned_half(cat)
            if x is not None and x in straight.args:
                return [x], _other(straight, x), sin, False
    return None


def _turned_half(cat: Any) -> Any:
    """The x of ``cat(-x2, x1)``."""
    if not _is(cat, aten.cat.default) or len(cat.args[0]) != 2:
        return None
    negative, first = cat.args[0]
    if not _is(negative, aten.neg.default):
        return None
    return _whole(first, negative.args[0])


def _whole(first: Any, second: Any) -> Any:
    """The tensor whose first and second half of the last dim two nodes are; None where there is none."""
    low, high = _half(first), _half(second)
    joined = low is not None and high is not None and low[0] is high[0] and (low[1], high[1]) == (0, 1)
    return low[0] if low is not None and joined else None


def _half(node: Any) -> tuple[Any, int] | None:
    """The tensor whose first (0) or second (1) half of the last dim a node is."""
    if _is(node, aten.slice.Tensor):
        whole, half = value(node.args[0]), value(node)
        if whole is None or node.args[1] % whole.dim() != whole.dim() - 1 or 2 * half.shape[-1] != whole.shape[-1]:
            return None
        # Every second value is half of them too.
        start, step = node.args[2] or 0, node.args[4] if len(node.args) > 4 else 1
        return (node.args[0], int(start != 0)) if step == 1 and start in (0, half.shape[-1]) else None
    if _is(node, operator.getitem) and _is(node.args[0], aten.chunk.default, aten.split.Tensor):
        whole, half = value(node.args[0].args[0]), value(node)
        dim = node.args[0].args[2] if len(node.args[0].args) > 2 else 0
        if dim % whole.dim() == whole.dim() - 1 and 2 * half.shape[-1] == whole.shape[-1]:
            return node.args[0].args[0], node.args[1]
    return None


def _halved_rotation(node: Any) -> tuple[list[Any], Any, Any, bool] | None:
    """The halves need not be of one tensor: DeepSeek takes them from neighbouring pairs, and gives them back apart."""
    if not _is(node, aten.cat.default) or len(node.args[0]) != 2:
        return None
    real, imaginary = node.args[0]
    if not _is(real, aten.sub.Tensor) or not _is(imaginary, aten.add.Tensor):
        return None
    products = (*real.args[:2], *imaginary.args[:2])
    if not all(_is(product, aten.mul.Tensor) for product in products):
        return None
    (x1, cos), (x2, sin) = real.args[0].args[:2], real.args[1].args[:2]
    if {frozenset(product.args[:2]) for product in imaginary.args[:2]} != {frozenset((x2, cos)), frozenset((x1, sin))}:
        return None
    whole = _whole(x1, x2)
    return [x1, x2] if whole is None else [whole], cos, sin, True


def _swiglu(module: fx.GraphModule, node: Any) -> None:
    """``silu(gate) * up``: of both halves of one tensor, of two projections of one input, or of any two."""
    if not _is(node, aten.mul.Tensor):
        return
    for silu, up in (node.args[:2], node.args[1::-1]):
        if _is(silu, aten.silu.default) and isinstance(up, fx.Node):
            gate = silu.args[0]
            if value(up) is not None and value(gate) is not None and value(gate).shape == value(up).shape:
                return _replace(node, partial(_swiglu_of, module, gate, up))


def _swiglu_of(module: fx.GraphModule, gate: Any, up: Any, graph: fx.Graph) -> fx.Node:
    joined = _whole(gate, up)
    if joined is None:
        joined = _joined_projection(module, graph, gate, up) or graph.call_function(aten.cat.default, ([gate, up], -1))
    return graph.call_function(npu.npu_swiglu.default, (joined,))


def _joined_projection(module: fx.GraphModule, graph: fx.Graph, gate: Any, up: Any) -> Any:
    """Both projections as one product with the weights one under the other, if nothing else uses them."""
    linear = aten.linear.default
    if not _is(gate, linear) or not _is(up, linear) or gate.args[0] is not up.args[0]:
        return None
    if len(gate.args) + len(up.args) != 4 or len(gate.users) != 1 or len(up.users) != 1:
        return None
    weights = [node.args[1] for node in (gate, up)]
    if any(weight.op != "get_attr" or len(weight.users) != 1 for weight in weights):
        return None
    path = str(weights[0].target).rpartition(".")[0].rpartition(".")[0]
    name = f"{path}.gate_up_weight" if path else "gate_up_weight"
    tensors = [_attribute(module, str(weight.target)) for weight in weights]
    owner = module.get_submodule(path)
    owner.register_parameter("gate_up_weight", nn.Parameter(torch.cat(tensors), requires_grad=False))
    joined = graph.call_function(linear, (gate.args[0], graph.get_attr(name)))
    joined.meta["val"] = torch.cat((value(gate), value(up)), dim=-1)
    return joined


def _gating(module: fx.GraphModule, node: Any) -> None:
    """``topk(softmax(logits), k)`` of logits [R, E], in float32."""
    if not _is(node, aten.topk.default) or not _is(node.args[0], aten.softmax.int):
        return
    softmax: Any = node.args[0]
    logits, k = softmax.args[0], node.args[1]
    x = value(logits)
    largest = len(node.args) < 4 or node.args[3] is True
    last = softmax.args[1] % softmax.meta["val"].dim() == softmax.meta["val"].dim() - 1
    if x is None or x.dim() != 2 or not largest or not last or not isinstance(k, int) or len(softmax.users) != 1:
        return
    weights = value(softmax)
    graph = node.graph
    with graph.inserting_before(node):
        given = _cast(graph, logits, weights.dtype)
        chosen = graph.call_function(npu.npu_moe_gating_top_k_softmax.default, (given, None, k))
        first = graph.call_function(operator.getitem, (chosen, 0))
        second = graph.call_function(operator.getitem, (chosen, 1))
        index = graph.call_function(aten.to.dtype, (second, torch.int64))
    for user in list(node.users):
        user.replace_all_uses_with((first, index)[user.args[1]])
        graph.erase_node(user)
    graph.erase_node(node)


def _cast(graph: fx.Graph, node: Any, dtype: torch.dtype) -> Any:
    if value(node).dtype == dtype:
        return node
    cast = graph.call_function(aten.to.dtype, (node, dtype))
    cast.meta["val"] = value(node).to(dtype)
    return cast


def _attribute(module: nn.Module, name: str) -> torch.Tensor:
    path, _, attribute = name.rpartition(".")
    found: torch.Tensor = getattr(module.get_submodule(path), attribute)
    return found.detach()


def _drop_unused(module: fx.GraphModule) -> None:
    """Delete tensors that the graph no longer reads."""
    read = {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    for name, _ in [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]:
        if name not in read:
            path, _, attribute = name.rpartition(".")
            delattr(module.get_submodule(path), attribute)


PATTERNS = (_norm, _rotation, _swiglu, _gating)

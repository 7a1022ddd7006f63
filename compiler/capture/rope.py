"""Rotary embedding as measured: which dims rotate together, by which column of cos and sin; and the live angles."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from attnedit.compiler.capture.sites import AttentionSite, Rope
from attnedit.compiler.compatibility.torch_names import pytree
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.dataflow import Evaluator, aten, is_tensor, sources, value_ancestors, value_inputs, where

_EXACT = 1e-9  # float64; an actual rotation is off by 1e-13 at the magnitudes probed
_BROADCASTS = (aten.unsqueeze.default, aten.expand.default, aten.type_as.default, aten.to.dtype)


@dataclass(frozen=True)
class Rotation:
    """What stands between a pre-rope node and the anchor: scale * permutation * rotation (with pass-through dims)."""

    pairs: tuple[tuple[int, int], ...]
    columns: tuple[int, ...]
    imaginary_columns: tuple[int, ...]
    scale: float
    permutation: tuple[int, ...]
    cos: fx.Node
    sin: fx.Node


def angle_nodes(before: fx.Node, after: fx.Node, hidden: fx.Node) -> list[fx.Node]:
    """The nodes through which positions reach `after`: cos and sin, if this is a rotary embedding.

    The graph's own arguments where those are two float tensors; else the nodes that bring them in between `before`
    and `after`, as they were before broadcasting. In graph order.
    """
    arguments = [n for n in sources(after) if n is not hidden and n not in sources(before)]
    if len(arguments) == 2 and all(n.meta["val"].is_floating_point() for n in arguments):
        return arguments
    inside = {n for n in value_ancestors(after) if before in value_ancestors(n)}
    found: dict[fx.Node, None] = {}
    for node in after.graph.nodes:
        if node not in inside or node is before:
            continue
        for source in value_inputs(node):
            if source in inside or source.op == "get_attr" or hidden in value_ancestors(source) or not sources(source):
                continue
            while source.target in _BROADCASTS and is_tensor(value_inputs(source)[0]):
                source = value_inputs(source)[0]
            found[source] = None
    return list(found)


def _angle_tensor(node: fx.Node, rows: torch.Tensor) -> torch.Tensor:
    """`rows` [T, columns] in the layout of the node's own value: [.., T, columns] with ones for all other dims."""
    shape = node.meta["val"].shape
    dim = max((i for i, size in enumerate(shape[:-1]) if isinstance(size, torch.SymInt)), default=len(shape) - 2)
    return rows.reshape([1] * dim + [rows.shape[0]] + [1] * (len(shape) - dim - 2) + [rows.shape[1]])


def measure(evaluator: Evaluator, hidden: fx.Node, before: fx.Node, after: fx.Node) -> Rotation:
    """Measure what the graph does between a pre-rope node and the anchor's input.

    Args:
        evaluator: runs parts of the graph.
        hidden: the region's input, used for sizes only.
        before: pre-rope, [B, N, T, d].
        after: the anchor's input, [B, N, T, d].

    Raises:
        CaptureError: it is not a rotation of pairs with constant scale; the message names the node.
    """
    angles = angle_nodes(before, after, hidden)
    if len(angles) != 2 or any(n.meta["val"].is_complex() or n.meta["val"].dim() < 2 for n in angles):
        names = ", ".join(n.name for n in angles) or "nothing"
        raise CaptureError(
            f"{where(after)} mixes {before.name} with {names}; expected cos and sin, the inputs of a rotary embedding"
        )
    heads, dims = before.meta["val"].shape[1], before.meta["val"].shape[3]
    width = hidden.meta["val"].shape[-1]
    counts = [int(n.meta["val"].shape[-1]) for n in angles]

    def apply(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, order: list[fx.Node]) -> torch.Tensor:
        given: dict[fx.Node, Any] = {
            before: x,
            hidden: torch.zeros(1, x.shape[2], width, dtype=torch.float64),
            order[0]: _angle_tensor(order[0], cos),
            order[1]: _angle_tensor(order[1], sin),
        }
        result = evaluator.run([after], given)[0]
        assert isinstance(result, torch.Tensor)
        return result

    def matrix(cos: torch.Tensor, sin: torch.Tensor, order: list[fx.Node]) -> torch.Tensor:
        basis = torch.eye(dims, dtype=torch.float64).expand(1, heads, dims, dims)
        return apply(basis, cos.expand(dims, -1), sin.expand(dims, -1), order)[0, 0].T

    def reject(reason: str) -> CaptureError:
        return CaptureError(f"{where(after)} is not a rotary embedding of {before.name}: {reason}")

    if counts[0] != counts[1]:
        raise reject(f"{angles[0].name} has {counts[0]} columns and {angles[1].name} has {counts[1]}")
    one, zero = torch.ones(counts[0], dtype=torch.float64), torch.zeros(counts[0], dtype=torch.float64)
    # At angle 0 (cos 1, sin 0) a rotation is the identity; taken the other way round it has minus signs.
    for order in (angles, angles[::-1]):
        still = matrix(one, zero, order)
        scale = float(still.abs().max())
        permutation = still.argmax(dim=1)
        exact = torch.zeros_like(still)
        exact[torch.arange(dims), permutation] = scale
        if scale > 0 and torch.equal(still, exact) and len(set(permutation.tolist())) == dims:
            break
    else:
        raise reject("at angle zero it changes its input")
    generator = torch.Generator().manual_seed(0)
    cos = torch.rand(counts[0], dtype=torch.float64, generator=generator) + 0.5
    sin = torch.rand(counts[0], dtype=torch.float64, generator=generator) + 2.0
    turned = matrix(cos, sin, order) / scale
    rotation = torch.empty_like(turned)
    rotation[permutation] = turned  # row i of the output is dim permutation[i] of the input, rotated
    pairs, columns, imaginary = _read_pairs(rotation, cos, sin, reject)
    found = Rotation(pairs, columns, imaginary, scale, tuple(int(i) for i in permutation.tolist()), order[0], order[1])
    length = 7
    for magnitude in (1.0, 1e3):  # clipping would show at the large one
        x = magnitude * torch.randn(1, heads, length, dims, dtype=torch.float64, generator=generator)
        c = torch.rand(length, counts[0], dtype=torch.float64, generator=generator)
        s = torch.rand(length, counts[0], dtype=torch.float64, generator=generator)
        expected = scale * rotate(x, c, s, found)[..., permutation]
        if float((apply(x, c, s, order) - expected).abs().max()) > _EXACT * magnitude * scale:
            raise reject("it does not rotate every head and position alike")
    return found


def _read_pairs(
    rotation: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, reject: Callable[[str], CaptureError]
) -> tuple[tuple[tuple[int, int], ...], tuple[int, ...], tuple[int, ...]]:
    """Pairs of dims, and the columns of their real and imaginary dims, read off a rotation as a matrix.

    Args:
        rotation: [d, d], row i is what output dim i takes of each input dim.
        cos: [columns], all different, so that an entry tells its column.
        sin: likewise.
        reject: makes the error for a matrix that is no rotation of pairs.
    """
    pairs, columns, imaginary = [], [], []
    dims = rotation.shape[0]

    def column(values: torch.Tensor, value: float) -> int | None:
        near = (values - value).abs() < _EXACT
        return int(near.nonzero()[0]) if int(near.sum()) == 1 else None

    for i in range(dims):
        others = [j for j in range(dims) if j != i and abs(float(rotation[i, j])) > _EXACT]
        if not others:
            if abs(float(rotation[i, i]) - 1.0) > _EXACT:
                raise reject(f"dim {i} is scaled without being rotated")
            continue
        if len(others) > 1:
            raise reject(f"dim {i} takes from {len(others)} other dims")
        j = others[0]
        if float(rotation[i, j]) > 0:
            continue  # the imaginary one; read with its real partner
        a, a_sin = column(cos, float(rotation[i, i])), column(sin, -float(rotation[i, j]))
        b, b_sin = column(cos, float(rotation[j, j])), column(sin, float(rotation[j, i]))
        if a is None or b is None or a != a_sin or b != b_sin:
            raise reject(f"dims {i} and {j} do not turn by one angle")
        pairs.append((i, j))
        columns.append(a)
        imaginary.append(b)
    touched = [dim for pair in pairs for dim in pair]
    rotated = [i for i in range(dims) if int((rotation[i].abs() > _EXACT).sum()) > 1]
    if sorted(touched) != rotated:
        raise reject("its dims do not fall into pairs")
    return tuple(pairs), tuple(columns), tuple(imaginary)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: Rope | Rotation) -> torch.Tensor:
    """Rotate x [..., T, d] by the columns of cos and sin [T, columns] (or [B, T, columns] with heads put between)."""
    if not rope.pairs:
        return x.clone()
    real, imag = (torch.tensor([pair[k] for pair in rope.pairs], device=x.device) for k in (0, 1))
    a = torch.tensor(rope.columns, device=x.device)
    b = torch.tensor(rope.imaginary_columns, device=x.device)
    return turn(x, real, imag, (cos[..., a], sin[..., a]), (cos[..., b], sin[..., b]))


def turn(
    x: torch.Tensor,
    real: torch.Tensor,
    imaginary: torch.Tensor,
    by: tuple[torch.Tensor, torch.Tensor],
    imaginary_by: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Turn pairs of dims.

    Args:
        x: [..., d].
        real: dims of the n pairs' real parts.
        imaginary: dims of their imaginary parts.
        by: cos and sin [..., n].
        imaginary_by: those of the imaginary parts, where they are others.

    Returns:
        [..., d]; dims that are in no pair stay.
    """
    result, first, second = x.clone(), x[..., real], x[..., imaginary]
    (cos, sin), (other_cos, other_sin) = by, imaginary_by or by
    result[..., real] = first * cos - second * sin
    result[..., imaginary] = second * other_cos + first * other_sin
    return result


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, rope: Rope) -> torch.Tensor:
    """`rotate` for code that is traced: slices where they do, no index tensors, nothing in place.

    Args:
        x: [B, heads, T, d].
        cos: [B or 1, T, columns].
        sin: like `cos`.
        rope: which dims turn, by which columns.

    >>> rope = Rope(((0, 1),), (0,), (0,), "cos", "sin", "half")
    >>> x = torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 1, 3)
    >>> rotated(x, torch.zeros(1, 1, 1), torch.ones(1, 1, 1), rope).flatten().tolist()
    [-2.0, 1.0, 5.0]
    """
    real, imaginary = ([pair[part] for pair in rope.pairs] for part in (0, 1))
    still = [dim for dim in range(x.shape[-1]) if dim not in {*real, *imaginary}]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second = pick(x, real), pick(x, imaginary)
    new_first = first * pick(cos, rope.columns) - second * pick(sin, rope.columns)
    new_second = second * pick(cos, rope.imaginary_columns) + first * pick(sin, rope.imaginary_columns)
    if rope.style == "interleaved":
        turned = torch.stack((new_first, new_second), dim=-1).flatten(-2)
        return torch.cat((turned, pick(x, still)), dim=-1) if still else turned
    joined = torch.cat((new_first, new_second, *([pick(x, still)] if still else [])), dim=-1)
    order = [*real, *imaginary, *still]
    return pick(joined, [order.index(dim) for dim in range(x.shape[-1])])


def pick(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """The given entries of the last dim: a slice where they are evenly spaced."""
    step = dims[1] - dims[0] if len(dims) > 1 else 1
    if step > 0 and list(dims) == list(range(dims[0], dims[0] + step * len(dims), step)):
        whole = len(dims) == x.shape[-1]
        return x if whole else x[..., dims[0] : dims[-1] + 1 : step]
    return torch.stack([x[..., dim] for dim in dims], dim=-1)


def combine(query: Rotation, key: Rotation, anchor: fx.Node) -> Rope:
    """The rope of a site, given that queries and keys turn alike; CaptureError where they do not."""
    for fact in ("pairs", "columns", "imaginary_columns", "permutation", "cos", "sin"):
        if getattr(query, fact) != getattr(key, fact):
            raise CaptureError(f"{where(anchor)}: queries and keys are rotated differently ({fact.replace('_', ' ')})")
    count = len(key.pairs)
    style: Any = "other"
    if key.pairs == tuple((i, i + count) for i in range(count)):
        style = "half"
    elif key.pairs == tuple((2 * i, 2 * i + 1) for i in range(count)):
        style = "interleaved"
    return Rope(key.pairs, key.columns, key.imaginary_columns, key.cos.name, key.sin.name, style)


def _live_rotary(model: torch.nn.Module, site: AttentionSite) -> torch.nn.Module:
    assert site.rotary is not None
    module = model.get_submodule(site.rotary.module)
    if any(t.is_meta for t in [*module.parameters(), *module.buffers()]):
        return _rebuilt(module, site.rotary.module)
    # A copy: rotary embeddings that depend on length update their own buffers when called.
    return copy.deepcopy(module).to("cpu").eval()


def live_angles(
    model: torch.nn.Module, site: AttentionSite, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosines and sines of the live model's rotary source at `positions` [T], each float64 [T, columns].

    Raises:
        CaptureError: nothing computes them, or it cannot be run on its own.
    """
    if site.rotary is None:
        return _own_angles(model, site, positions)
    module = _live_rotary(model, site)
    tensors = {"hidden": torch.zeros(1, len(positions), 1), "positions": positions[None].to(torch.long)}

    def fill(leaf: Any) -> Any:
        return tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf

    args, kwargs = pytree.tree_map(fill, (site.rotary.args, dict(site.rotary.kwargs)))
    with torch.no_grad():
        output = module(*args, **kwargs)
    first, second = (output[i].double().reshape(len(positions), -1) for i in site.rotary.outputs)
    return first, second


def _own_angles(
    model: torch.nn.Module, site: AttentionSite, positions: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Angles that the attention module looks up itself, given positions."""
    assert site.rope is not None
    module = model.get_submodule(site.name)
    nodes = [site.node(site.rope.cos), site.node(site.rope.sin)]
    given = {n for node in nodes for n in sources(node)}
    if any(n.op == "placeholder" and n.meta["val"].is_floating_point() for n in given) or len(given) != 1:
        raise CaptureError(f"{site.name}: no module of the model computes the cos and sin of its rotary embedding")
    if any(buffer.is_meta for buffer in module.buffers()):
        module = _rebuilt(module, site.name)
    place: dict[fx.Node, Any] = {n: positions[None].to(torch.long) for n in given}
    hidden = site.node(site.hidden)
    place.setdefault(hidden, torch.zeros(1, len(positions), int(hidden.meta["val"].shape[-1])))
    found = Evaluator(module, site.constants).run(nodes, place)
    first, second = (table.double().reshape(len(positions), -1) for table in found)
    return first, second


def _rebuilt(module: torch.nn.Module, name: str) -> torch.nn.Module:
    """A module on meta made again with values in its buffers, which follow from the configuration alone."""
    try:
        with torch.device("cpu"):
            return type(module)(module.config).eval()
    except (TypeError, AttributeError) as error:
        raise CaptureError(
            f"{name} ({type(module).__name__}) is on the meta device and cannot be rebuilt from its "
            "configuration; build the model with its buffers on CPU (init_empty_weights(include_buffers=False))"
        ) from error


def rope_angles(model: torch.nn.Module, site: AttentionSite) -> tuple[torch.Tensor, float] | None:
    """Frequencies of a site, measured on the live model.

    Returns:
        (inv_freq, attention_scaling): float64 [number of pairs], radians per position in the order of
        `site.rope.pairs`, and the factor on cos and sin; None for a site without rope.

    Raises:
        CaptureError: cos and sin cannot be evaluated, or the two dims of a pair get different angles.
    """
    if site.rope is None:
        return None
    first, second = live_angles(model, site, torch.tensor([0, 1]))
    cos, sin = (first, second) if float(second[0].abs().max()) == 0.0 else (second, first)
    if float(sin[0].abs().max()) != 0.0:
        raise CaptureError(f"{site.name}: {site.rope.sin} is not zero at position 0")
    real, imaginary = list(site.rope.columns), list(site.rope.imaginary_columns)
    if not (torch.equal(cos[:, real], cos[:, imaginary]) and torch.equal(sin[:, real], sin[:, imaginary])):
        raise CaptureError(f"{site.name}: the two dims of a rotary pair turn by different angles")
    inv_freq = torch.atan2(sin[1, real], cos[1, real])
    length = torch.hypot(sin[1, real], cos[1, real])
    scaling = float(cos[0, real].mean())
    if float((length - scaling).abs().max()) > 1e-5 * scaling:
        raise CaptureError(f"{site.name}: cos and sin of its rotary embedding are not on one circle")
    return inv_freq, scaling

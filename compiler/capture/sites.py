"""What the compiler knows about one attention site: plain facts, read off its graph."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

NormKind = Literal["per_head", "projection", "elementwise"]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a site as measured: x_re' = x_re cos - x_im sin, x_im' = x_im cos + x_re sin.

    Attributes:
        pairs: (real, imaginary) dims of the head, one pair per frequency; all other dims pass through.
        columns: the last-dim column of cos and sin that the real dim of each pair is multiplied by.
        imaginary_columns: the same for the imaginary dim; it carries the same angle (checked on the live model).
        cos: name of the graph node that holds cos, [B or 1, T, columns].
        sin: name of the graph node that holds sin.
        style: for the report only.
    """

    pairs: tuple[tuple[int, int], ...]
    columns: tuple[int, ...]
    imaginary_columns: tuple[int, ...]
    cos: str
    sin: str
    style: Literal["half", "interleaved", "other"]


@dataclass(frozen=True)
class Projection:
    """A linear module: y = W x + b.

    Attributes:
        module: FQN relative to the attention module.
        weight: FQN of the weight; [out, in], or [in, out] where `transposed`.
        bias: FQN of the bias, or None.
        rows: for a fused or reordered projection, the output features in (head, dim) order; None for all, in order.
        transposed: the weight is stored [in, out] (transformers' Conv1D).
        scale: constant between the projection and the fact's node.
    """

    module: str
    weight: str
    bias: str | None
    rows: tuple[int, ...] | None = None
    transposed: bool = False
    scale: float = 1.0


@dataclass(frozen=True)
class RotarySource:
    """Where the angles of a site come from in the live model, so that they can be measured at any position.

    Attributes:
        module: FQN (in the model) of the rotary module whose outputs are cos and sin.
        args: positional arguments of its call; tensors are replaced by "hidden" or "positions" markers.
        kwargs: the same for keyword arguments.
        outputs: index of cos and of sin in its output.
    """

    module: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    outputs: tuple[int, int]


@dataclass(frozen=True)
class Facts:
    """What all attention sites of one kind share. Names of nodes refer to their graph.

    Attributes:
        hidden: input of the region, [B, T, E].
        query: before rope, after any norm, [B, H, T, d].
        key: before rope, after any norm, [B, G, T, d].
        value: [B, G, T, dv].
        anchor: the node of attnedit::attention.
        output_projection: the call of the output projection.
        num_attention_heads: H.
        num_key_value_heads: G.
        head_dim: d.
        v_head_dim: dv.
        scale: factor on the logits of rotated query and key (constant factors applied with the rope are in it).
        softcap: logits are capped, or None.
        window: HF's sliding_window (counts the token itself), or None.
        sinks: FQN of the sink logits, or None.
        mask: node of what is added to the logits (or says where to attend), or None.
        bias: `mask` holds more than what may be seen: biases per head (ALiBi), or a window of the module's own.
        rope: None for a site without rotary embedding.
        unread_rope: why positions reach queries and keys in a way that is no rotary embedding, or None; `query` and
            `key` are then the anchor's inputs, so that keys are compressed as they are, positions included.
        q_proj, k_proj, v_proj: None where the path from hidden starts with no linear module.
        o_proj: the output projection.
        key_norm, query_norm: what stands between projection and key or query.
        output_gate: the attention output is multiplied by something computed from hidden.
        linear_kv: key and value are affine in hidden.
        already_mla: key and value come from a shared low-rank latent.
    """

    hidden: str
    query: str
    key: str
    value: str
    anchor: str
    output_projection: str
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float | None
    window: int | None
    sinks: str | None
    mask: str | None
    bias: bool
    rope: Rope | None
    unread_rope: str | None
    q_proj: Projection | None
    k_proj: Projection | None
    v_proj: Projection | None
    o_proj: Projection
    key_norm: NormKind | None
    query_norm: NormKind | None
    output_gate: bool
    linear_kv: bool
    already_mla: bool


@dataclass(frozen=True)
class AttentionSite(Facts):
    """One attention module of the live model, its graph and its facts.

    Attributes:
        name: FQN of the attention module.
        layer_idx: its cache slot.
        kind: equal for sites that share a graph.
        structure: Weisfeiler-Lehman hash of the graph; sites of different kinds may have it in common.
        graph: forward has the signature of the attention module; targets are relative to that module.
        constants: tensors that tracing lifted out of the source code, by the graph's get_attr target.
        rotary: where its angles come from; None without rope, or where the attention module itself computes them.
        implementation: where the source calls no attention interface, the implementation whose arguments the graph
            takes (`attnedit.compiler.capture.capture.as_captured`); None for any.
    """

    name: str
    layer_idx: int
    kind: str
    structure: str
    graph: fx.Graph
    rotary: RotarySource | None
    implementation: str | None = None
    constants: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rotary_pairs(self) -> tuple[tuple[int, int], ...]:
        """Head dims that the rotary embedding turns together, (real, imaginary) by frequency; none without one."""
        return () if self.rope is None else self.rope.pairs

    @property
    def planes(self) -> list[tuple[int, int]]:
        """Head dims of queries and keys in pairs: those that the rotary embedding turns together, then the rest."""
        still = sorted(set(range(self.head_dim)) - {dim for pair in self.rotary_pairs for dim in pair})
        return [*self.rotary_pairs, *zip(still[::2], still[1::2], strict=True)]

    def node(self, name: str) -> fx.Node:
        """The node of `graph` that a fact names.

        Args:
            name: of a node, such as `anchor` or `query`.

        Returns:
            The node itself; its ``meta["val"]`` has shape and dtype.

        Raises:
            KeyError: the graph has none of that name.
        """
        found: fx.Node | None = next((node for node in self.graph.nodes if node.name == name), None)
        if found is None:
            raise KeyError(f"{self.name}: the graph has no node {name!r}")
        return found


class Sites(list[AttentionSite]):
    """The attention sites of a model in the order they run.

    Attributes:
        left: what stays as it is, by module: why attention of another kind is no site, and layers without any.
    """

    def __init__(self, sites: Iterable[AttentionSite], left: Mapping[str, str]) -> None:
        super().__init__(sites)
        self.left = dict(left)


def left_of(sites: Sequence[AttentionSite]) -> dict[str, str]:
    """What stays as it is, by module.

    Args:
        sites: as `capture` returned them.

    Returns:
        The reason by the module's name; none for another list.

    >>> left_of([])
    {}
    """
    return sites.left if isinstance(sites, Sites) else {}


def by_reason(problems: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each reason, with the modules it holds for.

    Args:
        problems: names of modules, and of each a reason.

    Returns:
        Lines for people, in the order of the reasons.

    >>> by_reason([("h.0.attn", "(A): no"), ("h.1.attn", "(A): no"), ("h.2.attn", "(B): never")])
    ['h.0.attn, h.1.attn (A): no', 'h.2.attn (B): never']
    """
    grouped: dict[str, list[str]] = {}
    for name, reason in problems:
        grouped.setdefault(reason, []).append(name)
    return [f"{', '.join(names)} {reason}" for reason, names in grouped.items()]

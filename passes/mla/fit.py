"""One attention site becomes latent: its weights in closed form, and the graph that has them in it.

The closed form is an analytic start (initialise.py), then alternating refits (least_squares.py).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, fx, nn

from attnedit.compiler.capture.capture import graph_module
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import AttneditError
from attnedit.compiler.graph.dataflow import sources
from attnedit.compiler.graph.surgery import cut
from attnedit.passes.fit_options import FitOptions
from attnedit.passes.mla.initialise import Split, analytic, mix_components
from attnedit.passes.mla.least_squares import logit_target, refit_latent, refit_output, refit_query
from attnedit.passes.mla.linear import LinearSite
from attnedit.passes.mla.shapes import Shape
from attnedit.passes.mla.weights import Factors
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import output_weight
from attnedit.passes.solve import thin
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.graph import QUERY_MODULE, mla_graph, without_bias
from attnedit.targets.attention.mla.module import MLA

ROUNDING = 1e-6
"""Of the output's relative squared error, which is a difference of float32 sums."""


@dataclass(frozen=True)
class Fit:
    """Weights, the share of the weighted second moment kept, and the output's relative squared error."""

    factors: Factors
    energy_kept: float
    output_error: float


@torch.no_grad()
def fit_layer(samples: Sequence[LayerSample], shape: Shape, options: FitOptions) -> Fit:
    """Closed-form MLA weights of one layer; see docs/method.md for the steps. The best of all rounds is kept.

    Raises:
        AttneditError: nothing finite was found.
    """
    components = mix_components(samples, shape.fold, shape.columns) if shape.slots else None
    factors, energy = analytic(samples, Split.of(samples, components, shape.slots), shape.rank)
    return refine(samples, factors, energy, options)


@torch.no_grad()
def refine(samples: Sequence[LayerSample], factors: Factors, energy: float, options: FitOptions) -> Fit:
    """Refit weights by least squares, in rounds; the best of all is kept.

    Args:
        samples: of the layer, or of some of its query heads.
        factors: to begin with.
        energy: that the latent keeps.
        options: of the fit.

    Raises:
        AttneditError: nothing finite was found.
    """
    output, error = refit_output(samples, factors)
    best, lowest = Fit(output, energy, error), error
    sides = (refit_query, refit_latent) if options.latent_side else (refit_query,)
    if options.alternations:
        few = [sample.thinned(max(1, round(len(sample.positions) * options.logit_share))) for sample in samples]
    for turn, refit in enumerate(sides * options.alternations):
        target = logit_target(few, factors if turn else None)
        factors, error = refit_output(samples, refit(few, factors, target, options.iterations))
        # Logits stand in for what is attended; where few keys take all of it, that may fail.
        if error <= lowest + ROUNDING:
            best, lowest = Fit(factors, energy, error), min(error, lowest)
    if not math.isfinite(best.output_error):
        raise AttneditError("queries, keys or values are too large for float32, so that no latent can be fitted")
    return best


def exact_factors(site: AttentionSite, shape: Shape, weight: Tensor) -> Factors:
    """Weights of the lossless shape: slots are the source's own rotary components, the latent holds all else.

    Args:
        site: the attention site.
        shape: from `exact_shape`.
        weight: o_proj by head [H, D, e].
    """
    heads, groups, d, e = site.num_attention_heads, site.num_key_value_heads, site.head_dim, site.v_head_dim
    device, share = weight.device, heads // groups
    pairs = site.rotary_pairs
    turning = {dim for pair in pairs for dim in pair}
    still = [dim for dim in range(d) if dim not in turning]
    source = torch.eye(groups * (d + e), device=device)
    latent_rows = [g * d + dim for g in range(groups) for dim in still] + list(range(groups * d, groups * (d + e)))
    slot_rows = [g * d + pair[part] for part in (0, 1) for g in range(groups) for pair in pairs]
    query_latent = torch.zeros(heads, d, shape.rank, device=device)
    query_slots = torch.zeros(heads, 2 * shape.slots, d, device=device)
    output = torch.zeros(heads, weight.shape[1], shape.rank, device=device)
    for h in range(heads):
        g = h // share
        for i, dim in enumerate(still):
            query_latent[h, dim, g * len(still) + i] = 1.0
        for part in (0, 1):
            for i, pair in enumerate(pairs):
                query_slots[h, part * shape.slots + g * len(pairs) + i, pair[part]] = 1.0
        start = groups * len(still) + g * e
        output[h, :, start : start + e] = weight[h]
    columns = torch.tensor(list(site.rope.columns) * groups if site.rope else [], dtype=torch.int64, device=device)
    return Factors(source[latent_rows], source[slot_rows], columns, query_latent, query_slots, output)


def build(
    model: nn.Module, site: AttentionSite, shape: Shape, factors: Factors, linear: LinearSite | None = None
) -> fx.GraphModule:
    """The site's graph with latent attention in it, weights included, in the model's dtype and on its device.

    Args:
        model: the model that the graph will be spliced into; its own tensors are not written to.
        site: the attention site.
        shape: what is cached.
        factors: the weights.
        linear: maps that stand for the source's queries, keys and values; None where the source's own do.
    """
    weight, module = output_weight(model, site)
    if linear is not None and site.o_proj.bias is not None:
        module = without_bias(module)
    heads, rank, e = site.num_attention_heads, factors.rank, site.v_head_dim
    value_up, projected = split_output(site, factors, weight, shape.exact)
    projection = None if projected is None else with_output(site, module, projected)
    down, bias = torch.cat([factors.latent, factors.slots]).double(), None
    if linear is not None:
        down = down @ linear.source
    else:
        down, bias = folded(model, site, down)
    nope = bool(factors.query_latent.any()) or not shape.slots
    config = MLAConfig(
        layer_idx=site.layer_idx,
        num_attention_heads=heads,
        head_dim=site.head_dim,
        v_head_dim=e,
        kv_lora_rank=rank,
        rope_columns=tuple(int(c) for c in factors.columns),
        qk_nope_head_dim=site.head_dim if nope else 0,
        input_size=down.shape[1],
        scale=site.scale,
        kv_bias=bias is not None,
        folded=site.linear_kv or linear is not None,
        softcap=site.softcap,
        sinks=site.sinks is not None,
        window=site.window,
        linear=linear is not None,
    )
    graph = mla_graph(model, site, config, projection)
    mla = cast(MLA, graph.get_submodule("mla"))
    up = torch.cat([factors.query_latent.double(), value_up], 1) if nope else value_up
    with torch.no_grad():
        if linear is not None:
            graph.get_parameter(f"{QUERY_MODULE}.weight").copy_(linear.query)
        mla.kv_a_proj_with_mqa.weight.copy_(down)
        if bias is not None:
            mla.kv_a_proj_with_mqa.bias.copy_(bias)
        mla.kv_b_proj.weight.copy_(up.flatten(0, 1))
        if mla.q_rope_proj is not None:
            mla.q_rope_proj.copy_(factors.query_slots)
        if mla.sinks is not None and site.sinks is not None:
            mla.sinks.copy_(model.get_submodule(site.name).get_parameter(site.sinks))
    return graph


def folded(model: nn.Module, site: AttentionSite, down: Tensor) -> tuple[Tensor, Tensor | None]:
    """What is cached as a map of the hidden states, where keys and values are one; else it stays one of these.

    Args:
        model: the live model.
        site: the attention site.
        down: map of keys and values, groups flattened [c, G d + G e], float64.

    Returns:
        [c, D] or `down`, and a bias [c] or None.
    """
    if not site.linear_kv:
        return down, None
    matrix, offset = kv_as_affine(model, site)
    return down @ matrix, down @ offset if bool(offset.any()) else None


def split_output(site: AttentionSite, factors: Factors, weight: Tensor, exact: bool) -> tuple[Tensor, Tensor | None]:
    """W_UV [H, e, r] in float64, and o_proj's new weight by head [H, D, e] where it changes.

    F_h has rank at most e, so an orthonormal basis of its rows loses nothing: a QR, sooner done on a GPU than an SVD.
    """
    if exact or site.output_gate:
        return torch.linalg.pinv(weight.double()) @ factors.output.double(), None
    e, rank = site.v_head_dim, factors.rank
    up = weight.new_zeros(len(weight), e, rank, dtype=torch.float64)
    projected = torch.zeros_like(weight, dtype=torch.float64)
    # By head: in float64 the weights of all heads are as large as a decoder layer.
    for h, output in enumerate(factors.output):
        basis, small = thin(output.double(), min(e, rank))
        rows, triangle = torch.linalg.qr(small.mT)
        missing = e - len(small)
        up[h] = nn.functional.pad(rows.mT, (0, 0, 0, missing))
        projected[h] = nn.functional.pad(basis @ triangle.mT, (0, missing))
    return up, projected


def with_output(site: AttentionSite, module: nn.Module, by_head: Tensor) -> nn.Module:
    """A copy of the output projection with another weight; its bias is the same object."""
    full = by_head.transpose(0, 1).flatten(1) / site.o_proj.scale
    fresh = copy.deepcopy(module, {id(parameter): parameter for parameter in module.parameters()})
    name = site.o_proj.weight.rsplit(".", 1)[-1]
    old = fresh.get_parameter(name)
    new = (full.T if site.o_proj.transposed else full).to(old.dtype).contiguous()
    setattr(fresh, name, nn.Parameter(new, requires_grad=old.requires_grad))
    return fresh


@torch.no_grad()
def kv_as_affine(model: nn.Module, site: AttentionSite) -> tuple[Tensor, Tensor]:
    """Keys and values as an affine map of the hidden states, read off by running it on the unit vectors.

    Returns:
        matrix [G d + G e, D] and offset [G d + G e], float64 on the model's device.
    """
    graph = cut(graph_module(model, site), (site.key, site.value))
    # float64 copies of the projections: folded weights should be rounded once, at the end
    graph = copy.deepcopy(graph).double()
    hidden = next(n for n in graph.graph.nodes if n.name == site.hidden)
    given = [
        str(n.target) for n in sources(site.node(site.hidden))
    ]  # of a norm before the projections only the size is read
    if hidden.op != "placeholder":
        with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
            place = graph.graph.placeholder("projected")
        hidden.replace_all_uses_with(place)
        graph.recompile()
        given.append("projected")
    size = _input_size(model, site)
    device = next(graph.parameters()).device
    unit = torch.cat([torch.zeros(1, size), torch.eye(size)]).double().to(device)[None]
    arguments = {
        str(n.target): None for n in graph.graph.nodes if n.op == "placeholder" and not str(n.target).startswith("*")
    }
    key, value = graph(**{**arguments, **dict.fromkeys(given, unit)})
    states = torch.cat([key.transpose(1, 2).flatten(2), value.transpose(1, 2).flatten(2)], -1)[0]
    return (states[1:] - states[0]).T, states[0]


def _input_size(model: nn.Module, site: AttentionSite) -> int:
    projection = site.k_proj or site.v_proj
    if projection is None:
        raise ValueError(f"{site.name}: keys are affine in hidden states but no projection was found")
    weight = model.get_submodule(site.name).get_parameter(projection.weight)
    return int(weight.shape[0] if projection.transposed else weight.shape[1])

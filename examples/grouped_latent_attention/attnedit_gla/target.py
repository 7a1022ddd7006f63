"""How grouped latent attention is planned under a budget, and fitted to a source in closed form."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.rewriting.rewrite import Reject
from attnedit.passes.mla.fit import exact_factors, folded, refine, split_output, with_output
from attnedit.passes.mla.initialise import Split, analytic, mix_components
from attnedit.passes.mla.shapes import shape_for
from attnedit.passes.mla.weights import Factors, output_error
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import output_weight
from attnedit.passes.target import AttentionTarget
from attnedit_gla.config import GroupedLatentConfig
from attnedit_gla.kind import KIND, graph


@dataclass(frozen=True)
class GroupedShape:
    """What one layer caches per token: a latent for each group, and rotary slots of two values that all share.

    Attributes:
        ranks: values of each latent.
        slots: rotary slots.
        fold: neighbouring frequencies that are mixed into common slots.
        exact: nothing is lost.
    """

    ranks: tuple[int, ...]
    slots: int
    fold: int = 1
    exact: bool = False

    @property
    def values(self) -> int:
        """Cached values per token."""
        return sum(self.ranks) + 2 * self.slots


@dataclass(frozen=True)
class GroupedFit:
    """Weights as of one latent attention whose latents stand side by side: a head meets those of its group alone."""

    factors: Factors
    energy_kept: float
    output_error: float


class GroupedLatentTarget(AttentionTarget[GroupedShape, GroupedFit]):
    """Grouped latent attention in every layer.

    Args:
        groups: of query heads; the fewest that divide a layer's key/value heads unless told.
    """

    name = "gla"
    kind = KIND
    description = "a latent for each group of query heads, so that devices share the cache"
    does = "fit grouped latent attention"
    fits = GroupedFit

    def __init__(self, groups: int | None = None) -> None:
        if groups is not None and groups < 2:
            raise UsageError(f"groups must be at least 2, got {groups}; one group is target mla")
        self.groups = groups

    def check(self, site: AttentionSite) -> Reject | None:
        """Groups must divide the key/value heads."""
        heads = site.num_key_value_heads
        if heads == 1:
            return Reject("one key/value head, of which there are no groups")
        if heads % self.groups_of(site):
            return Reject(f"{heads} key/value heads, which do not divide into {self.groups} groups")
        return None

    def groups_of(self, site: AttentionSite) -> int:
        """As asked for, or the fewest."""
        heads = site.num_key_value_heads
        return self.groups or next(count for count in range(2, heads + 1) if heads % count == 0)

    def least(self, site: AttentionSite) -> int:
        """One value for each group, and one slot."""
        return self.groups_of(site) + (2 if site.rope else 0)

    def shape(self, site: AttentionSite, values: int) -> GroupedShape:
        """As many slots as latent attention would have; the groups share the rest evenly, which splits the cache."""
        whole, groups = shape_for(site, values), self.groups_of(site)
        each, more = divmod(whole.rank, groups)
        ranks = tuple(each + (group < more) for group in range(groups))
        return GroupedShape(ranks, whole.slots, whole.fold, whole.exact)

    def fit(self, samples: Sequence[LayerSample], shape: GroupedShape) -> GroupedFit:
        """Slots as latent attention has them; then each group's latent to the output of its own heads."""
        components = mix_components(samples, shape.fold) if shape.slots else None
        split = Split.of(samples, components, shape.slots)
        # The slots are shared, so that no group may change them: queries and outputs alone are fitted.
        options = dataclasses.replace(self.fit_options, latent_side=False)
        parts, kept = [], list[float]()
        for (first, end), rank in zip(_spans(samples[0].groups, len(shape.ranks)), shape.ranks, strict=True):
            factors, energy = analytic(samples, split, rank, slice(first, end))
            fit = refine([_of_groups(sample, first, end) for sample in samples], factors, energy, options)
            parts.append(fit.factors)
            kept.append(energy)
        wide = _side_by_side(parts)
        return GroupedFit(wide, sum(kept) / len(kept), output_error(samples, wide))

    def build(
        self, model: PreTrainedModel, site: AttentionSite, shape: GroupedShape, fit: GroupedFit | None
    ) -> fx.GraphModule:
        """The graph with its weights."""
        weight, module = output_weight(model, site)
        factors = _exact(site, shape, weight) if fit is None else fit.factors
        down, bias = folded(model, site, torch.cat([factors.latent, factors.slots]).double())
        config = GroupedLatentConfig(
            layer_idx=site.layer_idx,
            num_attention_heads=site.num_attention_heads,
            head_dim=site.head_dim,
            v_head_dim=site.v_head_dim,
            ranks=shape.ranks,
            rope_columns=tuple(int(column) for column in factors.columns),
            input_size=down.shape[1],
            scale=site.scale,
            kv_bias=bias is not None,
            folded=site.linear_kv,
            softcap=site.softcap,
            sinks=site.sinks is not None,
            window=site.window,
        )
        ups, outputs = [], list[Tensor]()
        for own, (first, end) in zip(_apart(factors, shape.ranks), _spans(len(weight), len(shape.ranks)), strict=True):
            value_up, projected = split_output(site, own, weight[first:end], shape.exact)
            ups.append(torch.cat([own.query_latent.double(), value_up], 1).flatten(0, 1))
            outputs += [] if projected is None else [projected]
        projection = with_output(site, module, torch.cat(outputs)) if outputs else None
        found = graph(model, site, config, projection)
        new = found.get_submodule(KIND.name)
        values = {
            "kv_a_proj_with_mqa.weight": down,
            "kv_a_proj_with_mqa.bias": bias,
            "q_rope_proj": factors.query_slots,
        }
        values |= {f"kv_b_proj.{group}.weight": up for group, up in enumerate(ups)}
        values["sinks"] = model.get_submodule(site.name).get_parameter(site.sinks) if site.sinks else None
        with torch.no_grad():
            for name, parameter in new.named_parameters():
                parameter.copy_(values[name])
        return found


def _spans(total: int, groups: int) -> list[tuple[int, int]]:
    return list(pairwise(range(0, total + 1, total // groups)))


def _of_groups(sample: LayerSample, first: int, end: int) -> LayerSample:
    """The sample with the query heads of some key-value groups, which are to give what these heads give in the source.

    What is cached may still be made of all keys and values.
    """
    share = sample.heads // sample.groups
    heads = slice(first * share, end * share)
    bias = sample.bias if sample.bias is None or len(sample.bias) == 1 else sample.bias[heads]
    own = dataclasses.replace(
        sample,
        query=sample.query[:, heads],
        output_weight=sample.output_weight[heads],
        sinks=None if sample.sinks is None else sample.sinks[heads],
        bias=bias,
    )
    teacher = dataclasses.replace(own, key=sample.key[:, first:end], value=sample.value[:, first:end])
    return dataclasses.replace(own, teacher=teacher)


def _side_by_side(parts: Sequence[Factors]) -> Factors:
    """One latent of those of all groups; slots are the same in all."""
    query = torch.block_diag(*[part.query_latent.flatten(0, 1) for part in parts])
    output = torch.block_diag(*[part.output.flatten(0, 1) for part in parts])
    heads = sum(len(part.output) for part in parts)
    return Factors(
        torch.cat([part.latent for part in parts]),
        parts[0].slots,
        parts[0].columns,
        query.unflatten(0, (heads, -1)),
        torch.cat([part.query_slots for part in parts]),
        output.unflatten(0, (heads, -1)),
    )


def _apart(factors: Factors, ranks: Sequence[int]) -> list[Factors]:
    """Of each group the weights of its own heads and latent."""
    spans, result, start = _spans(len(factors.output), len(ranks)), [], 0
    for (first, end), rank in zip(spans, ranks, strict=True):
        own, heads = slice(start, start + rank), slice(first, end)
        part = copy.copy(factors.__dict__) | {"latent": factors.latent[own]}
        part |= {name: part[name][heads, :, own] for name in ("query_latent", "output")}
        result.append(Factors(**part | {"query_slots": factors.query_slots[heads]}))
        start += rank
    return result


def _exact(site: AttentionSite, shape: GroupedShape, weight: Tensor) -> Factors:
    """Every rotary component is a slot; a group's latent holds all else of its own keys and values."""
    whole = shape_for(site, shape.values)
    factors = exact_factors(site, whole, weight)
    groups, e = site.num_key_value_heads, site.v_head_dim
    still = (whole.rank - groups * e) // groups
    order: list[int] = []
    for first, end in _spans(groups, len(shape.ranks)):
        order += range(first * still, end * still)
        order += range(groups * still + first * e, groups * still + end * e)
    return dataclasses.replace(
        factors,
        latent=factors.latent[order],
        query_latent=factors.query_latent[..., order],
        output=factors.output[..., order],
    )

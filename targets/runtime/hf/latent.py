"""Latent attention of a live model as plain matrices: what a checkpoint without our module needs of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.rope import rope_angles
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.graph.surgery import cut
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.graph import MLA_MODULE, QUERY_MODULE
from attnedit.targets.attention.mla.module import MLA
from attnedit.targets.runtime.eager.classes import source_sites
from attnedit.targets.runtime.hf.native import OTHER


@dataclass(frozen=True)
class LatentSite:
    """What a layer's attention asks of a class, and how large it is: no weights.

    Attributes:
        site: of the source.
        config: shape of the latent attention.
        frequencies: radians per position of each slot.
        rope_scaling: factor that cos and sin come with.
    """

    site: AttentionSite
    config: MLAConfig
    frequencies: tuple[float, ...]
    rope_scaling: float


@dataclass(frozen=True)
class LatentWeights:
    """One layer's attention; D hidden size, H heads, d query size, r latent, s slots, all matrices float64.

    Attributes:
        query: [H, d, D], from hidden states.
        latent: [r, D].
        slots: [2 s, D], rows [real | imaginary], before rotation.
        query_slots: [H, 2 s, d], on the query.
        key_up: [H, n, r]; n is d, or 0 where every key component keeps its rotation.
        value_up: [H, e, r].
        output: [H, D, e].
    """

    query: Tensor
    latent: Tensor
    slots: Tensor
    query_slots: Tensor
    key_up: Tensor
    value_up: Tensor
    output: Tensor


def latent_sites(model: PreTrainedModel) -> list[LatentSite]:
    """Look at all layers of a model whose attention is latent throughout.

    Raises:
        UsageError: a layer has something that DeepSeek's attention does not; the message names it.
    """
    found = []
    for site in source_sites(model).values():
        attention, mla = _modules(model, site)
        _check_expressible(model, site, attention, mla.config)
        found.append(LatentSite(site, mla.config, *slot_frequencies(model, site, mla.config.rope_columns)))
    return found


@torch.no_grad()
def latent_weights(model: PreTrainedModel, site: AttentionSite) -> LatentWeights:
    """Read one layer that `latent_sites` has accepted.

    Raises:
        UsageError: its queries are not linear in the hidden states.
    """
    attention, mla = _modules(model, site)
    config = mla.config
    heads, rank, nope = config.num_attention_heads, config.kv_lora_rank, config.qk_nope_head_dim
    down = mla.kv_a_proj_with_mqa.weight.double()
    up = mla.kv_b_proj.weight.double().view(heads, nope + config.v_head_dim, rank)
    output = attention.get_parameter(site.o_proj.weight).double() * site.o_proj.scale
    output = output.T if site.o_proj.transposed else output
    none = down.new_zeros(heads, 0, config.head_dim)
    return LatentWeights(
        query=_query(attention, site, down.shape[1]),
        latent=down[:rank],
        slots=down[rank:],
        query_slots=none if mla.q_rope_proj is None else mla.q_rope_proj.double(),
        key_up=up[:, :nope],
        value_up=up[:, nope:],
        output=output.unflatten(1, (heads, config.v_head_dim)).transpose(0, 1),
    )


def _modules(model: PreTrainedModel, site: AttentionSite) -> tuple[fx.GraphModule, MLA]:
    attention = model.get_submodule(site.name)
    mla = getattr(attention, MLA_MODULE, None)
    if not isinstance(mla, MLA) or not isinstance(attention, fx.GraphModule):
        raise UsageError(f"{site.name} is no latent attention, and the class has no other; compile all layers to mla")
    return attention, mla


def lacking(site: AttentionSite, limit: int | None) -> tuple[list[str], list[str]]:
    """Say what of a source's attention DeepSeek's has not; a window as long as its limit of positions hides nothing.

    Returns:
        What nothing there could stand for; and what linear maps of the hidden states could stand for approximately.
    """
    never = {
        "an output gate": site.output_gate,
        "sink logits": site.sinks is not None,
        f"a softcap of {site.softcap}": site.softcap is not None,
        f"a sliding window of {site.window} tokens": site.window is not None and site.window < (limit or 2**62),
    }
    nearly = {
        f"queries normalised ({site.query_norm} norm)": site.query_norm is not None,
        f"keys normalised ({site.key_norm} norm)": site.key_norm is not None,
        "keys or values that are not linear in the hidden states": not site.linear_kv and site.key_norm is None,
    }
    return [fact for fact, holds in never.items() if holds], [fact for fact, holds in nearly.items() if holds]


def positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has; None where it does not say."""
    found: int | None = getattr(model.config, "max_position_embeddings", None)
    return found


def _check_expressible(
    model: PreTrainedModel, site: AttentionSite, attention: fx.GraphModule, config: MLAConfig
) -> None:
    never, nearly = lacking(site, positions(model))
    facts = never + ([] if config.linear else nearly)
    facts += [f"a bias ({name})" for name, part in attention.named_parameters() if name.endswith("bias") and part.any()]
    if facts:
        raise UsageError(f"{site.name} has {facts[0]}, which DeepSeek's attention does not; {OTHER}")
    used = {projection.weight for projection in (site.q_proj, site.o_proj) if projection is not None}
    used |= {f"{QUERY_MODULE}.weight"} if config.linear else set()
    others = [name for name, _ in attention.named_parameters() if not name.startswith(MLA_MODULE)]
    for name in others:
        if name not in used and not name.endswith("bias"):
            raise UsageError(f"{site.name} has {name}, which DeepSeek's attention does not; {OTHER}")


def _query(attention: fx.GraphModule, site: AttentionSite, size: int) -> Tensor:
    """Read the pre-rope query off as a linear map of the hidden states [H, d, D]."""
    call: Any = next(n for n in attention.graph.nodes if n.op == "call_module" and n.target == MLA_MODULE)
    part = copy.deepcopy(cut(attention, [call.args[0].name])).double()
    device = next(part.parameters()).device
    names = [str(n.target) for n in part.graph.nodes if n.op == "placeholder" and not str(n.target).startswith("*")]
    # Twice the unit vectors at once: a map that is not linear shows.
    unit = torch.eye(size, dtype=torch.float64, device=device)
    query: Tensor = part(**{**dict.fromkeys(names), site.hidden: torch.stack([unit, 2 * unit])})[0]
    if not torch.allclose(query[1], 2 * query[0], rtol=1e-6, atol=1e-9):
        raise UsageError(f"{site.name}: its queries are not linear in the hidden states; {OTHER}")
    return query[0].transpose(1, 2)


def slot_frequencies(
    model: PreTrainedModel, site: AttentionSite, columns: Sequence[int]
) -> tuple[tuple[float, ...], float]:
    """Return the frequency of each column of cos and sin in radians per position, and the factor that they come with.

    Raises:
        CaptureError: there are columns but no rotary embedding.
    """
    if not columns:
        return (), 1.0
    found = rope_angles(model, site)
    if found is None or site.rope is None:
        raise CaptureError(f"{site.name}: it has rotary slots, but no rotary embedding")
    rotary = model.get_submodule(site.rotary.module) if site.rotary else model
    tables = [buffer.double().cpu() for name, buffer in rotary.named_buffers() if "inv_freq" in name]
    by_column = {
        column: _exact(float(measured), tables) for column, measured in zip(site.rope.columns, found[0], strict=True)
    }
    return tuple(by_column[column] for column in columns), found[1]


def _exact(measured: float, tables: list[Tensor]) -> float:
    """Return the model's own frequency: what is read off a cosine has rounding errors that grow with the position."""
    for table in tables:
        nearest = table.flatten()[(table.flatten() - measured).abs().argmin()]
        if abs(float(nearest) - measured) <= 1e-6 * measured:
            return float(nearest)
    return measured

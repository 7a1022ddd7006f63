"""Attention in plain products, for runtimes that have no kernel for it, or none that fits; and what exports share.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.kernels import Virtual
from attnedit.targets.attention.kinds import kind_of
from attnedit.targets.attention.module import AttentionModule, attention_modules


def lowering_of(module: AttentionModule, runtime: str) -> Any:
    """The class that takes the module's place in an export; None where the module itself is traced.

    Raises:
        UsageError: it has none, and a cache of its own that a graph could not hold.
    """
    kind = kind_of(module.config)
    lowering = kind.lowering(runtime)
    if lowering is None and type(module).bind_cache is not AttentionModule.bind_cache:
        raise UsageError(
            f"layer {module.config.layer_idx}: {kind.title} keeps a cache of its own and has no lowering to {runtime}; "
            "give its AttentionKind one, or run the saved result with transformers"
        )
    return lowering


def lower_attention(model: nn.Module, runtime: str, made: Callable[[Any, AttentionModule], nn.Module | None]) -> None:
    """Replace every rewritten attention in a model by the form that is exported, in place.

    `made` gets the kind's lowering to the runtime, or None, and the module; what it makes takes the module's place.

    Raises:
        UsageError: a kind cannot be lowered.
    """
    for name, module in attention_modules(model):
        if (new := made(lowering_of(module, runtime), module)) is not None:
            model.set_submodule(name, new)


def as_interface(attend: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, None]]:
    """Attention of layers that were not rewritten, as transformers' attention interface wants it.

    Args:
        attend: takes module, query [B, H, T, d], key, value, mask, scale, softcap, further keys (`Virtual`); returns
            [B, H, T, dv].
    """

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        virtual: Virtual = () if s_aux is None else ((s_aux, None),)
        return attend(module, query, key, value, attention_mask, scale, softcap, virtual).transpose(1, 2), None

    return attention


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    softcap: float | None = None,
    virtual: Virtual = (),
) -> Tensor:
    """Attend, heads of a group side by side; returns [B, H, T, dv].

    Args:
        query: [B, H, T, d], scaled.
        key: [B, G, S, d].
        value: [B, G, S, dv].
        bias: float32 to add to the logits, [B, 1, T, S].
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        virtual: further keys.
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    rows = heads // groups * length
    logits = torch.matmul(query.reshape(batch, groups, rows, size), key.transpose(-1, -2))
    sinks = tuple(logit for logit, _ in virtual)
    weights, rest = probabilities(logits.reshape(batch, heads, length, key.shape[2]), bias, softcap, sinks)
    weights = weights.to(value.dtype).reshape(batch, groups, rows, key.shape[2])
    out = torch.matmul(weights, value).reshape(batch, heads, length, value.shape[-1])
    for index, (_, own) in enumerate(virtual):
        if own is not None:
            shared = own.repeat_interleave(heads // own.shape[0], dim=0)
            out = out + rest[..., index : index + 1].to(out.dtype) * shared[:, None]
    return out


def probabilities(
    logits: Tensor, bias: Tensor, softcap: float | None, sinks: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor]:
    """Cap, mask and normalise logits [B, H, T, S] in float32; the sinks' share [B, H, T, len(sinks)] apart."""
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits + bias
    count = logits.shape[-1]
    if sinks:
        extra = torch.stack([sink.float() for sink in sinks], dim=-1)[None, :, None]
        logits = torch.cat((logits, extra.expand(logits.shape[0], -1, logits.shape[2], -1)), dim=-1)
    weights = logits.softmax(dim=-1)
    if not sinks:
        return weights, weights[..., :0]
    return weights[..., :count], weights[..., count:]

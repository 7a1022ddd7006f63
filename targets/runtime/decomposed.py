"""Attention in plain products, for runtimes that have no kernel for it, or none that fits.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnedit.targets.attention.mla import MLA

# Half of the lowest number: a logit added to it stays finite, and a row that sees nothing stays defined.
HIDDEN = torch.finfo(torch.float32).min / 2


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    softcap: float | None = None,
    sinks: tuple[Tensor, ...] = (),
) -> tuple[Tensor, Tensor]:
    """Attend, heads of a group side by side.

    Args:
        query: [B, H, T, d], scaled.
        key: [B, G, S, d].
        value: [B, G, S, dv].
        bias: float32 to add to the logits, [B, 1, T, S].
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: logits [H] of keys without value.

    Returns:
        Outputs [B, H, T, dv], and the probabilities of the sinks [B, H, T, len(sinks)].
    """
    batch, heads, length, size = query.shape
    groups = key.shape[1]
    rows = heads // groups * length
    logits = torch.matmul(query.reshape(batch, groups, rows, size), key.transpose(-1, -2))
    weights, rest = probabilities(logits.reshape(batch, heads, length, key.shape[2]), bias, softcap, sinks)
    weights = weights.to(value.dtype).reshape(batch, groups, rows, key.shape[2])
    return torch.matmul(weights, value).reshape(batch, heads, length, value.shape[-1]), rest


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


def as_bias(visible: Tensor) -> Tensor:
    """Turn a mask, True where to attend, into float32 to add to logits."""
    return (~visible).float() * HIDDEN


@torch.no_grad()
def absorbed(mla: MLA) -> tuple[Tensor, Tensor]:
    """Compute weights that take queries down to what is cached, and outputs up from it.

    Returns:
        [H, d, r + 2 s] ([H, d, 2 s] where nothing of a query meets the latent), and [H, r, dv].
    """
    config = mla.config
    nope, rank = config.qk_nope_head_dim, config.kv_lora_rank
    like = next(mla.kv_a_proj_with_mqa.parameters())
    # Read off the output: an adapter may stand in front of the weight.
    up = mla.kv_b_proj(torch.eye(rank, dtype=like.dtype, device=like.device))
    up = up.unflatten(-1, (config.num_attention_heads, -1)).permute(1, 2, 0)  # [H, nope + dv, r]
    down = [up[:, :nope]] if nope else []
    if mla.q_rope_proj is not None:
        down.append(mla.q_rope_proj.transpose(1, 2))
    return torch.cat(down, dim=-1), up[:, nope:].transpose(1, 2).contiguous()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn [.., 2 s], real parts first, by cos and sin [.., s]."""
    real, imaginary = x.chunk(2, dim=-1)
    return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)

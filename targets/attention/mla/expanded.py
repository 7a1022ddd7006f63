"""Latent attention with keys and values of each head, projected up from the latent: what a prefill takes.

Shapes: B batch, T new tokens, S tokens attended to, h heads, d query size, dv value size, s slots.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.compiler.graph.masks import causal, shown
from attnedit.targets.attention.kernels import kernel_for, with_virtual_keys
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.paths import fused_sizes
from attnedit.targets.attention.prefill import prefill_attention

__all__ = ["attend_expanded"]


def attend_expanded(
    query: Tensor,
    query_rope: Tensor | None,
    up: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    *,
    config: MLAConfig,
    sinks: Tensor | None,
    dropout: float,
    in_kernel: bool,
    probabilities: Callable[[Tensor, Tensor | None, Tensor | None], Tensor],
) -> Tensor:
    """Attend with some heads to their keys and values.

    Args:
        query: [B, h, T, d], before rotation and scale.
        query_rope: [B, h, T, 2s], turned; None without slots.
        up: [B, S, h (qk_nope_head_dim + dv)], keys and values of each head.
        slots: [B, S, 2s], shared by all heads.
        mask: None if causal, or [B, 1 or h, T, S], bool or floats to add.
        config: of the attention.
        sinks: [h] logits of a key that carries no value, or None.
        dropout: rate at which weights are dropped.
        in_kernel: causal through our kernel, whatever the past.
        probabilities: `AttentionModule.probabilities`, for what fused kernels cannot do.

    Returns:
        [B, T, h, dv].
    """
    heads, length = query.shape[1:3]
    nope = config.qk_nope_head_dim
    up = up.unflatten(-1, (heads, nope + config.v_head_dim)).transpose(1, 2)
    key, value = up.split([nope, config.v_head_dim], dim=-1)
    if in_kernel:
        past = torch.full((), before := key.shape[2] - length, dtype=torch.long, device=key.device)
        return prefill_attention(
            query,
            key,
            value,
            past,
            before,
            config.scale,
            window=config.window,
            query_rope=query_rope,
            keys_rope=None if query_rope is None else slots,
        )
    if query_rope is not None:
        rotated = slots.unsqueeze(1).expand(-1, heads, -1, -1)
        query = torch.cat((query, query_rope), dim=-1) if nope else query_rope
        key = torch.cat((key, rotated), dim=-1) if nope else rotated
    is_causal = mask is None and length > 1
    kernel = None if dropout else kernel_for(query, mask)
    if kernel is not None and config.softcap is None and (is_causal or mask is not None):
        visible = None if mask is None else shown(mask)
        if sinks is not None:
            visible = causal(length, key.shape[2], 0, config.window, query.device) if visible is None else visible
            virtual = [(sinks, None)]
            query, key, value, visible = with_virtual_keys(query, key, value, visible, config.scale, virtual)
        return kernel(query, key, value, visible, config.scale).transpose(1, 2)
    if config.softcap is not None or sinks is not None:
        if is_causal:
            mask = causal(length, key.shape[2], 0, config.window, query.device)
        logits = torch.matmul(query * config.scale, key.transpose(-1, -2))
        return torch.matmul(probabilities(logits, mask, sinks).to(value.dtype), value).transpose(1, 2)
    size, wide = fused_sizes(query, key, value, mask)
    query, key, value = (
        x if x.shape[-1] == end else F.pad(x, (0, end - x.shape[-1]))
        for x, end in ((query, size), (key, size), (value, wide))
    )
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=is_causal, scale=config.scale)
    return out[..., : config.v_head_dim].transpose(1, 2)

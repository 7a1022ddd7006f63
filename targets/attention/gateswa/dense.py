"""Sliding-window attention of one block of queries under a mask, in plain torch or in a runtime's kernel.

Shapes: B batch, H heads, G key/value heads, t queries of the block, S keys, d query and key size, dv value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.compiler.compatibility.live import recorded_attention
from attnedit.compiler.graph.masks import masked, shown
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.view import View
from attnedit.targets.attention.kernels import Virtual, kernel_for, with_virtual_keys

__all__ = ["attend_densely"]


def attend_densely(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    config: GateSWAConfig,
    virtual: Virtual,
    dropout: float,
    recorded: View | None,
) -> Tensor:
    """Attend under a mask, all logits at once.

    Args:
        query: [B, H, t, d], rotated.
        keys: [B, G, S, d].
        values: [B, G, S, dv].
        mask: [B or 1, 1 or H, t, S], bool with True where to attend, or floats to add.
        config: of the attention.
        virtual: logits [H] of keys without a token, and their values [G, dv] or None for 0.
        dropout: rate at which weights are dropped.
        recorded: of which tokens the keys are, where weights are recorded.

    Returns:
        [B, t, H, dv].
    """
    batch, heads, length, _ = query.shape
    groups = config.num_key_value_heads
    kernel = None if dropout or recorded is not None else kernel_for(query, mask)
    if kernel is not None and config.softcap is None:
        given = (query, keys, values, shown(mask))
        if virtual:
            given = with_virtual_keys(*given, config.scale, virtual)
        return kernel(*given, config.scale).transpose(1, 2)
    # The heads of a group stand side by side as more queries: keys and values are read once, not repeated.
    grouped = (query * config.scale).reshape(batch, groups, -1, config.head_dim)
    logits = torch.matmul(grouped, keys.transpose(-1, -2)).view(batch, heads, length, -1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if config.softcap is not None:
        logits = config.softcap * torch.tanh(logits / config.softcap)
    if virtual and mask.shape[1] > 1 and mask.dtype != torch.bool:
        # A bias per head may count from either end of the keys, which only a key without bias would notice.
        mask = mask - mask.amax(-1, keepdim=True)
    logits = masked(logits, mask)
    count = logits.shape[-1]
    if virtual:
        extra = torch.stack([logit for logit, _ in virtual], dim=-1).to(logits.dtype)[None, :, None]
        logits = torch.cat((logits, extra.expand(batch, -1, length, -1)), dim=-1)
    weights = logits.softmax(dim=-1)
    if dropout:
        weights = F.dropout(weights, dropout)
    seen = weights[..., :count].to(values.dtype)
    if recorded is not None and (collected := recorded_attention()) is not None:
        seen, values = recorded.by_token(seen, values)
        collected.append(seen)
    out = torch.matmul(seen.reshape(batch, groups, -1, seen.shape[-1]), values).view(
        batch, heads, length, config.v_head_dim
    )
    for place, (_, value) in enumerate(virtual):
        if value is not None:
            own = value.repeat_interleave(heads // groups, dim=0)[:, None]
            out = out + weights[..., count + place : count + place + 1].to(out.dtype) * own.to(out.dtype)
    return out.transpose(1, 2)

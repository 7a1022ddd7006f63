"""Keys outside a fused call: sinks that are logits alone, and kept sink tokens of a prompt.

Shapes: B batch, T new tokens, H heads, G key/value heads, d query size, dv value size, m extra keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attnedit.compiler.graph.masks import HIDDEN
from attnedit.targets.attention.kernels import Virtual
from attnedit.targets.runtime.npu.legalise import LayerPlan


class Extras:
    """Keys outside the fused call: sinks that are logits alone, and kept sink tokens of a prompt.

    Fused attention gives its output and the logarithm of its softmax's sum; so the softmax over more keys is a weighted
    mean of two: exact, and the fused call stays as it is.

    Args:
        logits: of the keys, [B, H, T, m].
        values: [B, H, m, dv]; 0 where a key has none.
    """

    def __init__(self, logits: Tensor, values: Tensor) -> None:
        logits = logits.float()
        self.total = logits.logsumexp(dim=-1, keepdim=True)
        self.out = torch.matmul(logits.softmax(dim=-1), values.float())

    def blend(self, out: Tensor, total: Tensor) -> Tensor:
        """Bring the keys into an output [B, H, T, dv] whose softmax summed to ``exp(total)`` [B, H, T, 1]."""
        share = torch.sigmoid(total - self.total)
        return (out.float() * share + self.out * (1 - share)).to(out.dtype)


def virtual_keys(query: Tensor, value_size: int, virtual: Virtual) -> Extras | None:
    """Make extras of virtual keys for queries [B, H, T, d]; None of none."""
    return Extras(*_of_all(query, value_size, virtual)) if virtual else None


def _of_all(query: Tensor, value_size: int, virtual: Virtual) -> tuple[Tensor, Tensor]:
    """Logits [B, H, T, m] and values [B, H, m, dv] of keys that every query sees."""
    batch, heads, length, _ = query.shape
    logits = torch.stack([logit.float() for logit, _ in virtual], dim=-1)[None, :, None]
    rows = [
        query.new_zeros((heads, value_size)) if own is None else own.repeat_interleave(heads // own.shape[0], dim=0)
        for _, own in virtual
    ]
    return logits.expand(batch, -1, length, -1), torch.stack(rows, dim=1)[None].expand(batch, -1, -1, -1)


def prompt_extras(
    plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    virtual: Virtual,
) -> Extras | None:
    """Virtual keys, and the kept sinks for queries whose window they have left."""
    count = plan.surveyed.sink_tokens
    if not count:
        return virtual_keys(query, value.shape[-1], virtual)
    length, shared = query.shape[2], query.shape[1] // key.shape[1]
    first = torch.arange(count).clamp(max=length - 1)
    keys, values = (x.index_select(2, first).repeat_interleave(shared, dim=1) for x in (key, value))
    logits = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    gone = torch.arange(length)[:, None] - torch.arange(count) >= int(plan.surveyed.window or 0)
    logits = logits.masked_fill(~gone, HIDDEN)
    if virtual:
        more, own = _of_all(query, value.shape[-1], virtual)
        logits, values = torch.cat((logits, more), dim=-1), torch.cat((values, own), dim=2)
    return Extras(logits, values)

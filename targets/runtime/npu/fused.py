"""Calls of fused attention for prompts, and the masks of plain products where it does not fit.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query size, dv value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.compiler.graph.masks import as_bias
from attnedit.targets.runtime.npu.cache import current_step
from attnedit.targets.runtime.npu.extras import Extras
from attnedit.targets.runtime.npu.legalise import LayerPlan

ops = torch.ops.npu


def prompt_attention(
    plan: LayerPlan, query: Tensor, key: Tensor, value: Tensor, scale: float, extras: Extras | None
) -> Tensor:
    """Causal or banded attention of a prompt, by the fused operator; returns [B, H, T, dv].

    Args:
        plan: of the layer.
        query: [B, H, T, d].
        key: [B, G, T, d].
        value: [B, G, T, dv].
        scale: of the logits.
        extras: further keys.
    """
    window = plan.surveyed.window
    size = plan.prefill_size
    out, total = ops.npu_fused_infer_attention_score_v2(
        *(F.pad(x, (0, size - x.shape[-1])).contiguous() for x in (query, key, value)),
        atten_mask=current_step().triangle,
        num_query_heads=query.shape[1],
        num_key_value_heads=key.shape[1],
        softmax_scale=scale,
        input_layout="BNSD",
        sparse_mode=3 if window is None else 4,
        # The band counts the tokens before a query, the window counts the query too.
        **({} if window is None else {"pre_tokens": window - 1, "next_tokens": 0}),
        return_softmax_lse=extras is not None,
    )
    out = out[..., : value.shape[-1]]
    return out if extras is None else extras.blend(out, total)


def prompt_bias(plan: LayerPlan, length: int) -> Tensor:
    """Bias of a prompt's causal or banded mask with its kept sinks, float32 [1, 1, T, T]."""
    surveyed = plan.surveyed
    key = torch.arange(length)
    behind = key[:, None] - key
    visible = behind >= 0
    if surveyed.window is not None:
        visible = visible & ((behind < surveyed.window) | (key < surveyed.sink_tokens))
    return as_bias(visible)[None, None]


def rows_bias(plan: LayerPlan, columns: int) -> Tensor:
    """Bias of a decoding token over everything that its row's pages hold, float32 [B, 1, 1, S]."""
    behind = current_step().positions - torch.arange(columns)
    visible = behind >= 0
    if plan.surveyed.window is not None:
        visible = visible & (behind < plan.surveyed.window)
    return as_bias(visible)[:, None, None]

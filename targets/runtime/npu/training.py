"""Training on Ascend: attention of source and student through ``npu_fusion_attention``, forwards and backwards.

Shapes: B batch, H heads, G key/value heads, T queries, S keys, d size of queries and keys, dv of values.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from attnedit.compiler.graph.anchor import attention_implementation, reference_attention
from attnedit.compiler.graph.masks import shown
from attnedit.targets.attention.kernels import using, with_virtual_keys
from attnedit.targets.runtime.npu.limits import MASK
from attnedit.targets.runtime.npu.reference import register

TRAINING = "attnedit_npu_training"
"""Name of the attention implementation, to transformers."""


@contextmanager
def training_attention(device_type: str, *models: nn.Module) -> Iterator[None]:
    """Inside the block models attend by ``npu_fusion_attention``; on a CPU by its reference."""
    register()
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(attention_implementation(model, TRAINING))
        stack.enter_context(using(device_type, fusion_attention))
        yield


def fusion_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend by ``npu_fusion_attention``.

    Args:
        query: [B, H, T, d].
        key: [B, G, S, d].
        value: [B, G, S, dv]; filled up with zeros to d where it is larger.
        mask: bool, True where to attend, [B or 1, 1 or H, T, S]; None is causal, aligned at the last key.
        scale: of the logits.

    Returns:
        [B, H, T, dv]. A query that may attend to nothing gets 0.
    """
    kind = query.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    size = max(query.shape[-1], value.shape[-1])
    query, key = (nn.functional.pad(x, (0, size - x.shape[-1])) for x in (query, key))
    hidden = _triangle(query.device) if mask is None else ~mask
    out: Tensor = torch.ops.npu.npu_fusion_attention(
        query,
        key,
        value,
        query.shape[1],
        "BNSD",
        atten_mask=hidden,
        scale=scale,
        # Causal from the bottom right by the compressed triangle, or the mask as it is given.
        sparse_mode=3 if mask is None else 1,
        inner_precise=0 if mask is None else 2,
    )[0]
    return out


@cache
def _triangle(device: torch.device) -> Tensor:
    return torch.ones((MASK, MASK), dtype=torch.bool, device=device).triu(1)


def npu_training_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention that was not rewritten, as transformers' attention interface wants it.

    A cap of the logits is not among what the operator computes: such attention stays plain.

    Returns:
        [B, T, H, dv], and no probabilities.
    """
    scale = float(query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None or (attention_mask is None and query.shape[2] == 1):
        out = reference_attention(query, key, value, attention_mask, scale, softcap, s_aux, sliding_window)
        return out, None
    visible = None if attention_mask is None else shown(attention_mask)[..., : key.shape[2]]
    if s_aux is not None:
        if visible is None:
            visible = ~_triangle(query.device)[: query.shape[2], : query.shape[2]][None, None]
        query, key, value, visible = with_virtual_keys(query, key, value, visible, scale, [(s_aux, None)])
    return fusion_attention(query, key, value, visible, scale).transpose(1, 2), None


AttentionInterface.register(TRAINING, npu_training_attention)
AttentionMaskInterface.register(TRAINING, ALL_MASK_ATTENTION_FUNCTIONS["eager"])

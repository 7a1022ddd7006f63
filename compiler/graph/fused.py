"""The anchor's function by torch's own kernel, for long calibration windows."""

from __future__ import annotations

import torch
from torch import Tensor

from attnedit.compiler.graph.anchor import reference_attention


def fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    window: int | None,
    layer: int,
) -> Tensor:
    """Attend without logits in memory where the mask says all; arguments and result as of `attnedit::attention`.

    >>> query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    >>> mask = torch.full((5, 5), float("-inf")).triu(1)[None, None]
    >>> settings = (0.3, None, None, None, 0)
    >>> expected = torch.ops.attnedit.attention(query, key, key, mask, *settings)
    >>> torch.allclose(fused_attention(query, key, key, mask, *settings), expected, atol=1e-5)
    True
    """
    if softcap is not None or sinks is not None or mask is None or mask.dim() != 4:
        return reference_attention(query, key, value, mask, scale, softcap, sinks, window)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    output = sdpa(query, key, value, attn_mask=mask[..., : key.shape[2]], scale=scale, enable_gqa=True)
    return output.transpose(1, 2)

"""By which path, and in which sizes, latent attention is computed.

Shapes: B batch, T new tokens, H heads, d query and key size, dv value size, r latent.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from attnedit.targets.attention.mla.config import MLAConfig

__all__ = ["TORCH_SIZE", "Path", "choose_path", "fused_sizes"]

Path = Literal["absorbed", "expanded"]

TORCH_SIZE = 256
"""Values of a query beyond which torch has no fast kernel."""
SHORT_QUERY = 64
"""Longer queries never take the absorbed path: its fp32 logits [B, H, T, S] would no longer be small."""


def choose_path(query_length: int, key_length: int, config: MLAConfig) -> Path:
    """Say how attention over the latent is computed.

    Both paths compute the same function. Per head and latent, "absorbed" costs ``2 r T`` multiply-adds beyond the
    rotary part, "expanded" ``(r + T) (d + dv)``, since it first projects every cached latent up. One new token
    always absorbs; a few do where that is less work and the cache is longer than what is new; a prefill expands,
    because then a fused attention kernel applies.
    """
    if query_length == 1:
        return "absorbed"
    if query_length > SHORT_QUERY or 2 * query_length > key_length:
        return "expanded"
    rank, size = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
    return "absorbed" if 2 * rank * query_length < (rank + query_length) * size else "expanded"


def fused_sizes(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[int, int]:
    """Sizes of queries and values at which torch's fused attention is fastest; zeros make up what is missing.

    Most kernels want one size for all, a multiple of eight: 3 to 4 times as fast as without (CPU, 1,024 tokens, 96 and
    64). cuDNN's on Hopper take values as they are, which saves a fifth, and like queries in multiples of 64 (H200,
    32,768 tokens: 216 and 128 values take 23.6 ms, 256 and 128 take 21.2). With gradients they are 8 to 10 times as
    fast as the kernel that takes queries beyond `TORCH_SIZE` (8,192 tokens, 32 heads, forward and back: 256 and 128
    values 7.4 ms for 62), which takes values as they are, too.

    Args:
        query: [B, H, T, d].
        key: [B, H, S, d].
        value: [B, H, S, dv].
        mask: None if causal.
    """
    size, wide = query.shape[-1], value.shape[-1]
    if mask is None and query.is_cuda and torch.version.hip is None and query.element_size() == 2 and wide % 8 == 0:
        if size > TORCH_SIZE:
            return _multiple(size, 8), wide
        # Small queries learn padded: that cuDNN's gradients are right there was not compared.
        small = size <= 128 and torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
        if torch.cuda.get_device_capability(query.device)[0] == 9 and not small:
            return _multiple(size, 64 if size > 128 else 8), wide
    size = _multiple(max(size, wide), 8)
    return size, size


def _multiple(size: int, of: int) -> int:
    """The next multiple."""
    return -(-size // of) * of

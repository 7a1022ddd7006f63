"""Sliding windows in exports: what is the same on every runtime that has a lowering of its own for them.

Shapes: B batch, T new tokens, H heads, G key/value heads, dv value size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from attnedit.targets.attention.gateswa.module import GateSWA
from attnedit.targets.attention.kernels import Virtual, as_virtual


class WindowedAttention(nn.Module, ABC):
    """`GateSWA` as exports have it: sinks and gate are the same everywhere, caches are not."""

    def __init__(self, module: GateSWA) -> None:
        super().__init__()
        self.config = module.config
        self.g_proj, self.sink_logit, self.sink_value = module.g_proj, module.sink_logit, module.sink_value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor | None,
        mask: Any,
        cache: Any,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Attend; as `GateSWA.forward`, with an export's cache, which tells the mask; returns [B, T, H, dv]."""
        config = self.config
        virtual = as_virtual(sinks, self.sink_logit, self.sink_value)
        out = self.attend(cache.layers[config.layer_idx], query, key, value, virtual).transpose(1, 2)
        if self.g_proj is None or hidden is None:
            return out
        gate: Tensor = torch.sigmoid(self.g_proj(hidden)).unflatten(-1, (config.num_attention_heads, -1))
        return out * gate

    @abstractmethod
    def attend(self, layer: Any, query: Tensor, key: Tensor, value: Tensor, virtual: Virtual) -> Tensor:
        """Attend to the window, and write what is new; returns [B, H, T, dv]."""

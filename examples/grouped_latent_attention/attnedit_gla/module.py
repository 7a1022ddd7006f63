"""Grouped latent attention as a module in place of rope and attention of a source layer.

Shapes: B batch, T new tokens, S tokens attended to, H heads, h heads of a group, d query size, dv value size, r latent
of a group, R of all groups, s slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnedit.compiler.compatibility.caches import append
from attnedit.compiler.compatibility.live import is_plain_linear, recorded_attention
from attnedit.compiler.graph.masks import causal
from attnedit.targets.attention.mla.rotary import rotate, slot_table
from attnedit.targets.attention.module import AttentionModule
from attnedit_gla.config import GroupedLatentConfig


class GroupedLatent(AttentionModule):
    """From pre-rope queries and the projection's input to per-head outputs.

    Per token the cache holds the latents c_g of all groups, side by side, and s rotary slots. With q the incoming query
    of head h in group g::

        logit = scale * (q . W_UK,h c_g + R(W_QR,h q) . R(slots))        output = W_UV,h sum softmax(logit) c_g

    Weights:
        kv_a_proj_with_mqa: Linear(E -> R + 2 s), rows [latents by group | real parts of the slots | imaginary parts].
        kv_b_proj: for each group Linear(r -> h (d + dv)), rows per head [W_UK; W_UV].
        q_rope_proj: [H, 2 s, d]; None without slots.
        sinks: [H] logits of a key that carries no value; None unless ``config.sinks``.
    """

    config_class = GroupedLatentConfig
    config: GroupedLatentConfig
    q_rope_proj: nn.Parameter | None
    sinks: nn.Parameter | None

    def __init__(
        self, config: GroupedLatentConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config)
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        heads, rope = config.num_attention_heads, config.qk_rope_head_dim
        up = heads // config.latent_groups * (config.head_dim + config.v_head_dim)
        rank = config.kv_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(config.input_size, rank + rope, bias=config.kv_bias, **like)
        self.kv_b_proj = nn.ModuleList(nn.Linear(own, up, bias=False, **like) for own in config.ranks)
        self.q_rope_proj = nn.Parameter(torch.empty(heads, rope, config.head_dim, **like)) if rope else None
        self.sinks = nn.Parameter(torch.empty(heads, **like)) if config.sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the plain parameters random values, as their linear siblings already have."""
        if self.q_rope_proj is not None:
            nn.init.normal_(self.q_rope_proj, std=self.config.head_dim**-0.5)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def forward(
        self,
        query: Tensor,
        kv_input: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, H, T, d], before rope and scale.
            kv_input: [B, T, E].
            cos: [B, T, c], [1, T, c] or [T, c]; None when there are no slots.
            sin: like `cos`.
            attention_mask: any that `AttentionModule.visible` takes.
            past_key_values: a transformers cache; gets the latents [B, 1, T, R] as keys, the slots as values.

        Returns:
            [B, T, H, dv].
        """
        config, length = self.config, query.shape[2]
        latent, slots = self.kv_a_proj_with_mqa(kv_input).unsqueeze(1).tensor_split((config.kv_lora_rank,), dim=-1)
        turned = query[..., :0]
        if self.q_rope_proj is not None and cos is not None and sin is not None:
            cos, sin = (slot_table(table, config.rope_columns, slots).unsqueeze(-3) for table in (cos, sin))
            slots = rotate(slots, cos, sin)
            turned = rotate(torch.einsum("bhtd,hsd->bhts", query, self.q_rope_proj), cos, sin)
        past: int | Tensor = 0
        if past_key_values is not None:
            if length > 1 and (attention_mask is None or attention_mask.dim() == 2):
                past = past_key_values.get_seq_length(config.layer_idx)
            latent, slots = append(past_key_values, latent, slots, config.layer_idx)
            if length > 1 and attention_mask is None:
                latent, slots = (x[:, :, : int(past) + length] for x in (latent, slots))
        keys = latent.shape[2]
        mask = self.visible(attention_mask, length, keys, past, query.device, config.window)
        few = length == 1 or torch.compiler.is_exporting() or recorded_attention() is not None
        if mask is None and length > 1 and (few or self._logits_needed):
            mask = causal(length, keys, 0, config.window, query.device)
        attend = self._absorbed if few else self._expanded
        count, outputs, recorded = config.latent_groups, [], list[Tensor]()
        parts = zip(query.chunk(count, 1), turned.chunk(count, 1), latent.split(config.ranks, -1), strict=True)
        for group, (own, rope, states) in enumerate(parts):
            outputs.append(attend(group, own * config.scale, rope * config.scale, states, slots, mask, recorded))
        if recorded and (kept := recorded_attention()) is not None:
            kept.append(torch.cat(recorded, 1))
        return torch.cat(outputs, 1).transpose(1, 2)

    @property
    def _logits_needed(self) -> bool:
        return self.config.softcap is not None or self.sinks is not None

    def _absorbed(
        self, group: int, query: Tensor, rope: Tensor, latent: Tensor, slots: Tensor, mask: Any, recorded: list[Tensor]
    ) -> Tensor:
        """Take the queries [B, h, T, d] of a group down to its latent [B, 1, S, r]; returns [B, h, T, dv]."""
        up, nope = self._up_weight(group, latent), self.config.head_dim
        down = torch.einsum("bhtd,hdr->bhtr", query, up[:, :nope])
        logits = down @ latent.transpose(-1, -2) + rope @ slots.transpose(-1, -2)
        weights = self._weights(group, logits, mask).to(latent.dtype)
        recorded.append(weights)
        return torch.einsum("bhtr,hvr->bhtv", weights @ latent, up[:, nope:])

    def _expanded(
        self, group: int, query: Tensor, rope: Tensor, latent: Tensor, slots: Tensor, mask: Any, recorded: list[Tensor]
    ) -> Tensor:
        """Project the latent [B, 1, S, r] up to the keys and values of its heads; returns [B, h, T, dv]."""
        config, heads = self.config, query.shape[1]
        both = self.kv_b_proj[group](latent[:, 0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = both.split((config.head_dim, config.v_head_dim), -1)
        query, key = torch.cat((query, rope), -1), torch.cat((key, slots.expand(-1, heads, -1, -1)), -1)
        if self._logits_needed:
            return self._weights(group, query @ key.transpose(-1, -2), mask).to(value.dtype) @ value
        dropout = self.attention_dropout if self.training else 0.0
        mask = mask if mask is None or mask.dtype == torch.bool else mask.to(query.dtype)
        mask = mask if mask is None or mask.shape[1] == 1 else self._of_group(mask, 1, group)
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=mask is None, scale=1.0)

    def _weights(self, group: int, logits: Tensor, mask: Any) -> Tensor:
        sinks = None if self.sinks is None else self._of_group(self.sinks, 0, group)
        own = mask if mask is None or mask.shape[1] == 1 else self._of_group(mask, 1, group)
        return self.probabilities(logits, own, sinks)

    def _of_group(self, x: Tensor, dim: int, group: int) -> Tensor:
        """What of something with H entries in a dim belongs to a group."""
        return x.chunk(self.config.latent_groups, dim)[group]

    def _up_weight(self, group: int, like: Tensor) -> Tensor:
        """Weight of a group's projection [h, d + dv, r], read off its output where something wraps it."""
        module = self.kv_b_proj[group]
        if is_plain_linear(module):
            weight = module.get_parameter("weight")
        else:
            unit = torch.eye(self.config.ranks[group], device=like.device, dtype=like.dtype)
            weight = module(unit).transpose(0, 1)
        return weight.unflatten(0, (-1, self.config.head_dim + self.config.v_head_dim))

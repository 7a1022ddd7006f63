"""Latent attention in exports: what is the same on every runtime that has a lowering of its own for it.

Shapes: B batch, T new tokens, H heads, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnedit.compiler.errors import AttneditError
from attnedit.targets.attention.mla.module import MLA


class AbsorbedAttention(nn.Module):
    """`MLA` as exports have it: queries can be taken down to what is cached, outputs up from it.

    Args:
        mla: the trained module; weights are computed from it.
        scale: factor on the queries that is computed into the weights.
    """

    query_down: Tensor
    value_up: Tensor
    columns: Tensor

    def __init__(self, mla: MLA, scale: float = 1.0) -> None:
        super().__init__()
        self.config = mla.config
        self.kv_a_proj_with_mqa, self.sinks = mla.kv_a_proj_with_mqa, mla.sinks
        query_down, value_up = absorbed(mla)
        self.register_buffer("query_down", query_down * scale)  # [H, d, r + 2 s], or [H, d, 2 s] without nope
        self.register_buffer("value_up", value_up)  # [H, r, dv]
        self.register_buffer("columns", torch.tensor(mla.config.rope_columns, dtype=torch.int64))

    def tables(self, cos: Tensor | None, sin: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
        """Columns of cos and sin, one per slot, [B or 1, 1, T, s].

        Raises:
            AttneditError: the graph has none.
        """
        if cos is None or sin is None:
            raise AttneditError(f"layer {self.config.layer_idx}: rotary slots need cos and sin, and its graph has none")
        picked = (table.index_select(-1, self.columns).to(like.dtype).unsqueeze(-3) for table in (cos, sin))
        return next(picked), next(picked)


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

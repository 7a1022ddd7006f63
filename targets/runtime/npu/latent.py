"""Latent attention as Ascend runs it.

Shapes: B batch, T new tokens, H heads, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnedit.targets.attention.kernels import Virtual
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.module import MLA
from attnedit.targets.attention.mla.rotary import rotate
from attnedit.targets.runtime.decomposed import attend
from attnedit.targets.runtime.latent import AbsorbedAttention
from attnedit.targets.runtime.npu.cache import NpuLayer, current_step
from attnedit.targets.runtime.npu.extras import virtual_keys
from attnedit.targets.runtime.npu.fused import prompt_attention, prompt_bias, rows_bias
from attnedit.targets.runtime.npu.legalise import LayerPlan, Surveyed
from attnedit.targets.runtime.npu.limits import BLOCK

ops = torch.ops.npu

Turn = Callable[[Tensor], Tensor]
"""Rotates slots [B, 1 or H, T, 2 s]; of a layer without any, what passes them on."""


class LatentAttention(AbsorbedAttention):
    """`MLA` with a paged cache: expanded for the prompt, absorbed in decode."""

    @staticmethod
    def describe(config: MLAConfig) -> Surveyed:
        """What the kernels' limits are about."""
        return Surveyed(
            config.layer_idx,
            "latent",
            config.num_attention_heads,
            1,
            config.head_dim,
            config.v_head_dim,
            rank=config.kv_lora_rank,
            rope=config.qk_rope_head_dim,
            nope=config.qk_nope_head_dim > 0,
            window=config.window,
            virtual=int(config.sinks),
            softcap=config.softcap is not None,
        )

    def __init__(self, mla: MLA, plan: LayerPlan) -> None:
        super().__init__(mla)
        self.plan = plan
        self.kv_b_proj, self.q_rope_proj = mla.kv_b_proj, mla.q_rope_proj

    def forward(
        self, query: Tensor, kv_input: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Any, cache: Any
    ) -> Tensor:
        """Attend; as `MLA.forward`, with an NPU cache; returns [B, T, H, dv]. The mask follows from the step."""
        config = self.config
        sizes = [config.kv_lora_rank, config.qk_rope_head_dim]
        latent, slots = self.kv_a_proj_with_mqa(kv_input).unsqueeze(1).split(sizes, dim=-1)
        turn = partial(self._turned, *self.tables(cos, sin, slots)) if config.qk_rope_head_dim else nn.Identity()
        slots = turn(slots)
        layer: NpuLayer = cache.layers[config.layer_idx]
        layer.write_pages(*self._packed(latent, slots))
        virtual: Virtual = () if self.sinks is None else ((self.sinks, None),)
        if current_step().prefill:
            return self._prompt(query, latent, slots, turn, virtual).transpose(1, 2)
        return self._token(query, layer, turn, virtual).transpose(1, 2)

    def _prompt(self, query: Tensor, latent: Tensor, slots: Tensor, turn: Turn, virtual: Virtual) -> Tensor:
        """Expand the latent [B, 1, T, r] to keys and values of every head; returns [B, H, T, dv]."""
        config, heads = self.config, query.shape[1]
        up = self.kv_b_proj(latent[:, 0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = up.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        parts = [(query, key)] if config.qk_nope_head_dim else []
        if self.q_rope_proj is not None:
            turned = turn(torch.matmul(query, self.q_rope_proj.transpose(1, 2)))
            parts.append((turned, slots.expand(-1, heads, -1, -1)))
        extras = virtual_keys(query, config.v_head_dim, virtual)
        query, key = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        if self.plan.prefill.fused:
            return prompt_attention(self.plan, query, key, value, config.scale, extras)
        return attend(query * config.scale, key, value, prompt_bias(self.plan, query.shape[2]), config.softcap, virtual)

    def _token(self, query: Tensor, layer: NpuLayer, turn: Turn, virtual: Virtual) -> Tensor:
        """Take the queries [B, H, 1, d] down to the cache; returns [B, H, 1, dv]."""
        config, plan, step = self.config, self.plan, current_step()
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        down = torch.matmul(query, self.query_down)
        onto_latent = down[..., :rank] if config.qk_nope_head_dim else down.new_zeros((*down.shape[:3], rank))
        onto_slots = turn(down[..., down.shape[-1] - rope :])
        if not plan.decode.fused:
            keys = layer.all_rows(0)
            queries = torch.cat((onto_latent, onto_slots), dim=-1) * config.scale
            bias = rows_bias(plan, keys.shape[2])
            context = attend(queries, keys, keys[..., :rank], bias, config.softcap, virtual)
            return torch.matmul(context, self.value_up)
        extras = virtual_keys(query, config.v_head_dim, virtual)
        parts = self._packed(onto_latent, onto_slots)
        more = plan.heads - query.shape[1]
        parts = [F.pad(x, (0, 0, 0, 0, 0, more)).contiguous() for x in parts]
        options: dict[str, Any] = {}
        if plan.split:
            options = {"query_rope": parts[1], "key_rope": layer.pages(1)}
        elif plan.surveyed.window is not None:
            columns = step.table.shape[1] * BLOCK
            options = {"atten_mask": rows_bias(plan, columns) < 0}
        context, total = ops.npu_fused_infer_attention_score_v2(
            parts[0],
            layer.pages(0),
            layer.pages(0),
            **options,
            actual_seq_kvlen=step.counts,
            block_table=step.table,
            num_query_heads=plan.heads,
            num_key_value_heads=1,
            softmax_scale=config.scale,
            input_layout="BNSD",
            block_size=BLOCK,
            return_softmax_lse=extras is not None,
        )
        heads = query.shape[1]
        out = torch.matmul(context[:, :heads, :, :rank], self.value_up)
        return out if extras is None else extras.blend(out, total[:, :heads])

    def _packed(self, latent: Tensor, slots: Tensor) -> list[Tensor]:
        """Latent and slots as they are cached: joined, or apart with slots beyond 64 in the latent's padding."""
        joined = torch.cat((latent, slots), dim=-1)
        if not self.plan.split:
            return [F.pad(joined, (0, self.plan.size - joined.shape[-1]))]
        rope = int(self.plan.decode.pads["rope"])
        beside, within = slots[..., :rope], slots[..., rope:]
        joined = torch.cat((latent, within), dim=-1)
        return [F.pad(joined, (0, self.plan.size - joined.shape[-1])), F.pad(beside, (0, rope - beside.shape[-1]))]

    def _turned(self, cos: Tensor, sin: Tensor, x: Tensor) -> Tensor:
        if not self.plan.prefill.fused and not self.plan.decode.fused:
            return rotate(x, cos, sin)
        cos, sin = (torch.cat((table, table), dim=-1) for table in (cos, sin))
        return torch.as_tensor(ops.npu_rotary_mul(x.contiguous(), cos, sin))

"""Latent attention as Ascend runs it.

Shapes: B batch, T new tokens, H heads, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.module import MLA
from attnedit.targets.attention.mla.rotary import rotate
from attnedit.targets.runtime.decomposed import Virtual, attend
from attnedit.targets.runtime.latent import AbsorbedAttention
from attnedit.targets.runtime.npu.cache import NpuLayer, current_step
from attnedit.targets.runtime.npu.extras import Extras, virtual_keys
from attnedit.targets.runtime.npu.fused import prompt_attention, prompt_bias, rows_bias
from attnedit.targets.runtime.npu.legalise import LayerPlan, Site
from attnedit.targets.runtime.npu.limits import BLOCK

ops = torch.ops.npu


class LatentAttention(AbsorbedAttention):
    """`MLA` with a paged cache: expanded for the prompt, absorbed in decode."""

    @staticmethod
    def describe(config: MLAConfig) -> Site:
        """What the kernels' limits are about."""
        return Site(
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
        """Attend; as `MLA.forward`, with an NPU cache. The mask follows from the current step.

        Returns:
            [B, T, H, dv].
        """
        config = self.config
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        latent, slots = self.kv_a_proj_with_mqa(kv_input).unsqueeze(1).split([rank, rope], dim=-1)
        if rope:
            cos, sin = self.tables(cos, sin, slots)
            slots = self._turned(slots, cos, sin)
        layer: NpuLayer = cache.layers[config.layer_idx]
        layer.write_pages(*self._packed(latent, slots))
        virtual = [(self.sinks, None)] if self.sinks is not None else []
        extras = virtual_keys(query, config.v_head_dim, virtual)
        attention = self._prompt if current_step().prefill else self._token
        return attention(query, latent, slots, cos, sin, layer, extras).transpose(1, 2)

    def _prompt(
        self,
        query: Tensor,
        latent: Tensor,
        slots: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        layer: NpuLayer,
        extras: Extras | None,
    ) -> Tensor:
        """Expand the latent [B, 1, T, r] to keys and values of every head; returns [B, H, T, dv]."""
        config, heads = self.config, query.shape[1]
        up = self.kv_b_proj(latent[:, 0]).unflatten(-1, (heads, -1)).transpose(1, 2)
        key, value = up.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        parts = [(query, key)] if config.qk_nope_head_dim else []
        if self.q_rope_proj is not None and cos is not None and sin is not None:
            turned = self._turned(torch.matmul(query, self.q_rope_proj.transpose(1, 2)), cos, sin)
            parts.append((turned, slots.expand(-1, heads, -1, -1)))
        query, key = (torch.cat(part, dim=-1) for part in zip(*parts, strict=True))
        if self.plan.prefill.fused:
            return prompt_attention(self.plan, query, key, value, config.scale, extras)
        bias = prompt_bias(self.plan, query.shape[2])
        sinks: Virtual = () if self.sinks is None else ((self.sinks, None),)
        return attend(query * config.scale, key, value, bias, config.softcap, sinks)

    def _token(
        self,
        query: Tensor,
        latent: Tensor,
        slots: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        layer: NpuLayer,
        extras: Extras | None,
    ) -> Tensor:
        """Take the queries [B, H, 1, d] down to the cache; returns [B, H, 1, dv]."""
        config, plan, step = self.config, self.plan, current_step()
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        down = torch.matmul(query, self.query_down)
        onto_latent = down[..., :rank] if config.qk_nope_head_dim else down.new_zeros((*down.shape[:3], rank))
        onto_slots = down[..., down.shape[-1] - rope :]
        if rope and cos is not None and sin is not None:
            onto_slots = self._turned(onto_slots, cos, sin)
        if not plan.decode.fused:
            keys = layer.all_rows(0)
            queries = torch.cat((onto_latent, onto_slots), dim=-1) * config.scale
            sinks: Virtual = () if self.sinks is None else ((self.sinks, None),)
            bias = rows_bias(plan, keys.shape[2])
            context = attend(queries, keys, keys[..., :rank], bias, config.softcap, sinks)
            return torch.matmul(context, self.value_up)
        parts = self._packed(onto_latent, onto_slots)
        more = plan.heads - query.shape[1]
        parts = [F.pad(x, (0, 0, 0, 0, 0, more)).contiguous() for x in parts]
        options: dict[str, Any] = {}
        if plan.split:
            options = {"query_rope": parts[1], "key_rope": layer.pages(1)}
        elif plan.site.window is not None:
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

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.plan.prefill.fused and not self.plan.decode.fused:
            return rotate(x, cos, sin)
        cos, sin = (torch.cat((table, table), dim=-1) for table in (cos, sin))
        return torch.as_tensor(ops.npu_rotary_mul(x.contiguous(), cos, sin))

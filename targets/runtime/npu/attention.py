"""Attention as Ascend runs it: fused operators where the legaliser found that they fit, plain products elsewhere.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query size, dv value size.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from attnedit.compiler.graph.masks import as_bias
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.module import GateSWA
from attnedit.targets.attention.kernels import Virtual
from attnedit.targets.attention.module import AttentionModule
from attnedit.targets.runtime.decomposed import as_interface, attend, lower_attention
from attnedit.targets.runtime.npu.cache import NpuLayer, current_cache, current_step
from attnedit.targets.runtime.npu.extras import prompt_extras, virtual_keys
from attnedit.targets.runtime.npu.fused import prompt_attention, prompt_bias, rows_bias
from attnedit.targets.runtime.npu.legalise import LayerPlan, Surveyed
from attnedit.targets.runtime.npu.limits import BLOCK
from attnedit.targets.runtime.windowed import WindowedAttention

NPU = "attnedit_npu"
"""Name of the attention implementation, to transformers."""

ops = torch.ops.npu


class TracedAttention(nn.Module):
    """Attention of any kind in plain products: its own module, over all that was written to its pages."""

    def __init__(self, module: AttentionModule, plan: LayerPlan) -> None:
        super().__init__()
        self.module, self.plan = module, plan
        self._mask = list(inspect.signature(module.forward).parameters).index("attention_mask")

    def forward(self, *given: Any) -> Tensor:
        """Attend; as the module does, with an NPU cache. The mask follows from the current step."""
        plan, step = self.plan, current_step()
        length = given[0].shape[2]
        bias = prompt_bias(plan, length) if step.prefill else rows_bias(plan, step.table.shape[1] * BLOCK)
        output: Tensor = self.module(*given[: self._mask], bias, *given[self._mask + 1 :])
        return output


class WindowAttention(WindowedAttention):
    """`GateSWA` with a cache that is a ring: the tokens of the window, and the kept sinks before them."""

    @staticmethod
    def describe(config: GateSWAConfig) -> Surveyed:
        """What the kernels' limits are about."""
        return Surveyed(
            config.layer_idx,
            "window",
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            config.v_head_dim,
            window=config.sliding_window,
            sink_tokens=config.sink_tokens,
            virtual=int(config.sinks) + int(config.sink_logit),
            softcap=config.softcap is not None,
        )

    def __init__(self, module: GateSWA, plan: LayerPlan) -> None:
        super().__init__(module)
        self.plan = plan

    def attend(self, layer: NpuLayer, query: Tensor, key: Tensor, value: Tensor, virtual: Virtual) -> Tensor:
        """Attend as the layer's plan says; returns [B, H, T, dv]."""
        return grouped_attention(layer, query, key, value, self.config.scale, self.config.softcap, virtual)


def grouped_attention(
    layer: NpuLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    virtual: Virtual,
) -> Tensor:
    """Attend to keys and values, all of them or those of a window, and write the new ones; returns [B, H, T, dv].

    Args:
        layer: of the cache.
        query: [B, H, T, d], rotated.
        key: [B, G, T, d]; of a "held" layer every key, [B, G, S, d].
        value: like `key`.
        scale: of the logits.
        softcap: of the logits.
        virtual: logits [H] of keys that every query sees, with their values [G, dv] if they have any.
    """
    plan, step = layer.plan, current_step()
    surveyed = plan.surveyed
    if surveyed.form == "window":
        layer.write_ring(key, value)
    elif surveyed.form == "full":
        layer.write_pages(key, value)
    if step.prefill and plan.prefill.fused:
        extras = prompt_extras(plan, query, key, value, scale, virtual)
        return prompt_attention(plan, query, key, value, scale, extras)
    if not step.prefill and plan.decode.fused:
        return _token_attention(layer, query, value.shape[-1], scale, virtual)
    if step.prefill:
        bias = prompt_bias(plan, query.shape[2])
    elif surveyed.form == "window":
        key, value = (buffer for buffer in layer.buffers)
        bias = as_bias(layer.ring_visible())
    else:
        if surveyed.form == "full":
            key, value = layer.all_rows(0), layer.all_rows(1)
        bias = rows_bias(plan, key.shape[2])
    return attend(query * scale, key, value, bias, softcap, virtual)


def _token_attention(layer: NpuLayer, query: Tensor, value_size: int, scale: float, virtual: Virtual) -> Tensor:
    """One token's attention [B, H, 1, dv] to what is cached, by the fused operator."""
    plan, step = layer.plan, current_step()
    extras = virtual_keys(query, value_size, virtual)
    key, value = layer.buffers
    options: dict[str, Any]
    if plan.surveyed.form == "window":
        options = {"atten_mask": ~layer.ring_visible()}
    else:
        key, value = layer.pages(0), layer.pages(1)
        options = {"actual_seq_kvlen": step.counts, "block_table": step.table, "block_size": BLOCK}
    out, total = ops.npu_fused_infer_attention_score_v2(
        F.pad(query, (0, plan.size - query.shape[-1])).contiguous(),
        key,
        value,
        **options,
        num_query_heads=query.shape[1],
        num_key_value_heads=plan.surveyed.kv_heads,
        softmax_scale=scale,
        input_layout="BNSD",
        return_softmax_lse=extras is not None,
    )
    out = out[..., :value_size]
    return out if extras is None else extras.blend(out, total)


def lower(model: nn.Module, plans: list[LayerPlan]) -> None:
    """Replace every rewritten attention in a model by the form that Ascend runs, in place."""
    by_layer = {plan.surveyed.layer: plan for plan in plans}
    lower_attention(
        model, "npu", lambda lowering, module: (lowering or TracedAttention)(module, by_layer[module.config.layer_idx])
    )


npu_attention = as_interface(
    lambda module, query, key, value, mask, *others: grouped_attention(
        current_cache().layers[int(module.layer_idx)], query, key, value, *others
    )
)


def npu_mask(*args: Any, **kwargs: Any) -> None:
    """Nothing: the plan of a layer says what it sees."""
    return None


AttentionInterface.register(NPU, npu_attention)
AttentionMaskInterface.register(NPU, npu_mask)

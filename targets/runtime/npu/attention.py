"""Attention as Ascend runs it: fused operators where the legaliser found that they fit, plain products elsewhere.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query size, dv value size, r latent, s slots,
n sink tokens, W sliding window, m extra keys.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from attnedit.compiler.errors import AttneditError
from attnedit.targets.attention.gateswa import GateSWA
from attnedit.targets.attention.mla import MLA
from attnedit.targets.runtime.decomposed import HIDDEN, absorbed, as_bias, attend, rotate
from attnedit.targets.runtime.npu.cache import NpuLayer, current_cache, current_step
from attnedit.targets.runtime.npu.legalise import LayerPlan
from attnedit.targets.runtime.npu.limits import BLOCK

NPU = "attnedit_npu"
"""Name of the attention implementation, to transformers."""

ops = torch.ops.npu


class Extras:
    """Keys outside the fused call: sinks that are logits alone, and kept sink tokens of a prompt.

    Fused attention gives its output and the logarithm of its softmax's sum; so the softmax over more keys is a weighted
    mean of two: exact, and the fused call stays as it is.

    Args:
        logits: of the keys, [B, H, T, m].
        values: [B, H, m, dv]; 0 where a key has none.
    """

    def __init__(self, logits: Tensor, values: Tensor) -> None:
        logits = logits.float()
        self.total = logits.logsumexp(dim=-1, keepdim=True)
        self.out = torch.matmul(logits.softmax(dim=-1), values.float())

    def blend(self, out: Tensor, total: Tensor) -> Tensor:
        """Bring the keys into an output [B, H, T, dv] whose softmax summed to ``exp(total)`` [B, H, T, 1]."""
        share = torch.sigmoid(total - self.total)
        return (out.float() * share + self.out * (1 - share)).to(out.dtype)


def virtual_keys(query: Tensor, value_size: int, sinks: list[tuple[Tensor, Tensor | None]]) -> Extras | None:
    """Make extras of sinks: logits [H] and, perhaps, values [G, dv], for queries [B, H, T, d]."""
    if not sinks:
        return None
    batch, heads, length, _ = query.shape
    logits = torch.stack([logit for logit, _ in sinks], dim=-1)[None, :, None].expand(batch, -1, length, -1)
    rows = [
        query.new_zeros((heads, value_size))
        if value is None
        else value.repeat_interleave(heads // value.shape[0], dim=0)
        for _, value in sinks
    ]
    return Extras(logits, torch.stack(rows, dim=1)[None])


def prompt_attention(
    plan: LayerPlan, query: Tensor, key: Tensor, value: Tensor, scale: float, extras: Extras | None
) -> Tensor:
    """Causal or banded attention of a prompt, by the fused operator.

    Args:
        plan: of the layer.
        query: [B, H, T, d].
        key: [B, G, T, d].
        value: [B, G, T, dv].
        scale: of the logits.
        extras: further keys.

    Returns:
        [B, H, T, dv].
    """
    window = plan.site.window
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
    site = plan.site
    key = torch.arange(length)
    behind = key[:, None] - key
    visible = behind >= 0
    if site.window is not None:
        visible = visible & ((behind < site.window) | (key < site.sink_tokens))
    return as_bias(visible)[None, None]


def rows_bias(plan: LayerPlan, columns: int) -> Tensor:
    """Bias of a decoding token over everything that its row's pages hold, float32 [B, 1, 1, S]."""
    behind = current_step().positions - torch.arange(columns)
    visible = behind >= 0
    if plan.site.window is not None:
        visible = visible & (behind < plan.site.window)
    return as_bias(visible)[:, None, None]


class LatentAttention(nn.Module):
    """`MLA` with a paged cache: expanded for the prompt, absorbed in decode.

    Args:
        mla: the trained module; weights are computed from it.
        plan: how it runs.
    """

    query_down: Tensor
    value_up: Tensor
    columns: Tensor

    def __init__(self, mla: MLA, plan: LayerPlan) -> None:
        super().__init__()
        self.config, self.plan = mla.config, plan
        self.kv_a_proj_with_mqa, self.kv_b_proj = mla.kv_a_proj_with_mqa, mla.kv_b_proj
        self.q_rope_proj, self.sinks = mla.q_rope_proj, mla.sinks
        query_down, value_up = absorbed(mla)
        self.register_buffer("query_down", query_down)  # [H, d, r + 2 s], or [H, d, 2 s] without nope
        self.register_buffer("value_up", value_up)  # [H, r, dv]
        self.register_buffer("columns", torch.tensor(mla.config.rope_columns, dtype=torch.int64))

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
            if cos is None or sin is None:
                raise AttneditError(f"layer {config.layer_idx}: rotary slots need cos and sin, and its graph has none")
            cos, sin = self._columns(cos, slots), self._columns(sin, slots)
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
        sinks = () if self.sinks is None else (self.sinks,)
        return attend(query * config.scale, key, value, bias, config.softcap, sinks)[0]

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
            sinks = () if self.sinks is None else (self.sinks,)
            bias = rows_bias(plan, keys.shape[2])
            context, _ = attend(queries, keys, keys[..., :rank], bias, config.softcap, sinks)
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

    def _columns(self, table: Tensor, like: Tensor) -> Tensor:
        """Columns of cos or sin, one per slot, [B or 1, 1, T, s]."""
        return table.index_select(-1, self.columns).to(like.dtype).unsqueeze(-3)

    def _turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        if not self.plan.prefill.fused and not self.plan.decode.fused:
            return rotate(x, cos, sin)
        cos, sin = (torch.cat((table, table), dim=-1) for table in (cos, sin))
        return torch.as_tensor(ops.npu_rotary_mul(x.contiguous(), cos, sin))


class WindowAttention(nn.Module):
    """`GateSWA` with a cache that is a ring: the tokens of the window, and the kept sinks before them.

    Args:
        module: the trained module.
        plan: how it runs.
    """

    def __init__(self, module: GateSWA, plan: LayerPlan) -> None:
        super().__init__()
        self.config, self.plan = module.config, plan
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
        """Attend; as `GateSWA.forward`, with an NPU cache. The mask follows from the current step.

        Returns:
            [B, T, H, dv].
        """
        config = self.config
        virtual: list[tuple[Tensor, Tensor | None]] = [] if sinks is None else [(sinks, None)]
        if self.sink_logit is not None:
            virtual.append((self.sink_logit, self.sink_value))
        layer: NpuLayer = cache.layers[config.layer_idx]
        out = grouped_attention(layer, query, key, value, config.scale, config.softcap, virtual).transpose(1, 2)
        if self.g_proj is None or hidden is None:
            return out
        gate: Tensor = torch.sigmoid(self.g_proj(hidden)).unflatten(-1, (config.num_attention_heads, -1))
        return out * gate


def grouped_attention(
    layer: NpuLayer,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float | None,
    virtual: list[tuple[Tensor, Tensor | None]],
) -> Tensor:
    """Attend to keys and values, all of them or those of a window, and write the new ones.

    Args:
        layer: of the cache.
        query: [B, H, T, d], rotated.
        key: [B, G, T, d]; of a "held" layer every key, [B, G, S, d].
        value: like `key`.
        scale: of the logits.
        softcap: of the logits.
        virtual: logits [H] of keys that every query sees, with their values [G, dv] if they have any.

    Returns:
        [B, H, T, dv].
    """
    plan, step = layer.plan, current_step()
    site = plan.site
    if site.form == "window":
        layer.write_ring(key, value)
    elif site.form == "full":
        layer.write_pages(key, value)
    if step.prefill and plan.prefill.fused:
        extras = _prompt_extras(plan, query, key, value, scale, virtual)
        return prompt_attention(plan, query, key, value, scale, extras)
    if not step.prefill and plan.decode.fused:
        return _token_attention(layer, query, value.shape[-1], scale, virtual)
    if step.prefill:
        bias = prompt_bias(plan, query.shape[2])
    elif site.form == "window":
        key, value = (buffer for buffer in layer.buffers)
        bias = as_bias(layer.ring_visible())
    else:
        if site.form == "full":
            key, value = layer.all_rows(0), layer.all_rows(1)
        bias = rows_bias(plan, key.shape[2])
    out, rest = attend(query * scale, key, value, bias, softcap, tuple(logit for logit, _ in virtual))
    for index, (_, own) in enumerate(virtual):
        if own is not None:
            shared = own.repeat_interleave(query.shape[1] // own.shape[0], dim=0)
            out = out + rest[..., index : index + 1].to(out.dtype) * shared[:, None]
    return out


def _token_attention(
    layer: NpuLayer, query: Tensor, value_size: int, scale: float, virtual: list[tuple[Tensor, Tensor | None]]
) -> Tensor:
    """One token's attention [B, H, 1, dv] to what is cached, by the fused operator."""
    plan, step = layer.plan, current_step()
    extras = virtual_keys(query, value_size, virtual)
    key, value = layer.buffers
    options: dict[str, Any]
    if plan.site.form == "window":
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
        num_key_value_heads=plan.site.kv_heads,
        softmax_scale=scale,
        input_layout="BNSD",
        return_softmax_lse=extras is not None,
    )
    out = out[..., :value_size]
    return out if extras is None else extras.blend(out, total)


def _prompt_extras(
    plan: LayerPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    virtual: list[tuple[Tensor, Tensor | None]],
) -> Extras | None:
    """Virtual keys, and the kept sinks for queries whose window they have left."""
    count = plan.site.sink_tokens
    if not count:
        return virtual_keys(query, value.shape[-1], virtual)
    batch, heads, length, _ = query.shape
    shared = heads // key.shape[1]
    first = torch.arange(count).clamp(max=length - 1)
    keys, values = (x.index_select(2, first).repeat_interleave(shared, dim=1) for x in (key, value))
    logits = torch.matmul(query, keys.transpose(-1, -2)).float() * scale
    gone = torch.arange(length)[:, None] - torch.arange(count) >= int(plan.site.window or 0)
    logits = logits.masked_fill(~gone, HIDDEN)
    if virtual:
        more = torch.stack([logit.float() for logit, _ in virtual], dim=-1)[None, :, None]
        logits = torch.cat((logits, more.expand(batch, -1, length, -1)), dim=-1)
        rows = [
            values.new_zeros((heads, values.shape[-1])) if own is None else own.repeat_interleave(shared, dim=0)
            for _, own in virtual
        ]
        values = torch.cat((values, torch.stack(rows, dim=1)[None].expand(batch, -1, -1, -1)), dim=2)
    return Extras(logits, values)


def lower(model: nn.Module, plans: list[LayerPlan]) -> None:
    """Replace every rewritten attention in a model by the form that Ascend runs, in place."""
    by_layer = {plan.site.layer: plan for plan in plans}
    for name, module in list(model.named_modules()):
        if isinstance(module, MLA):
            model.set_submodule(name, LatentAttention(module, by_layer[module.config.layer_idx]))
        elif isinstance(module, GateSWA):
            model.set_submodule(name, WindowAttention(module, by_layer[module.config.layer_idx]))


def npu_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of layers that were not rewritten, as transformers' attention interface wants it.

    Returns:
        [B, T, H, dv], and no probabilities.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer: NpuLayer = current_cache().layers[int(module.layer_idx)]  # type: ignore[arg-type]
    virtual: list[tuple[Tensor, Tensor | None]] = [] if s_aux is None else [(s_aux, None)]
    return grouped_attention(layer, query, key, value, scale, softcap, virtual).transpose(1, 2), None


def npu_mask(*args: Any, **kwargs: Any) -> None:
    """Nothing: the plan of a layer says what it sees."""
    return None


AttentionInterface.register(NPU, npu_attention)
AttentionMaskInterface.register(NPU, npu_mask)

"""Rewritten attention as vLLM runs it: our modules' weights under their names, vLLM's attention and paged cache.

vLLM gives a model all new tokens of a batch as one sequence. Shapes: N those tokens, H heads and G key/value heads of
this rank, d query and key size, v value size, r latent, s rotary slots, D hidden size.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
import vllm
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.rotary import rotate
from attnedit.targets.runtime.vllm.decoder import OrdinaryConfig
from attnedit.targets.runtime.vllm.latent_layer import PagedLatents


def by_heads(*shape: int) -> nn.Parameter:
    """A parameter [heads of this rank, ...] that is loaded from one of all heads."""
    parameter = nn.Parameter(torch.empty(shape), requires_grad=False)
    set_weight_attrs(parameter, {"weight_loader": sharded_weight_loader(0)})
    return parameter


class WeightByHeads(nn.Module):
    """Where a linear module stands in what is loaded, and its weight [rows of this rank's heads, r] alone is read."""

    def __init__(self, rows: int, rank: int) -> None:
        super().__init__()
        self.weight = by_heads(rows, rank)


class ServedLatent(nn.Module):
    """In place of `attnedit.targets.attention.MLA`.

    Args:
        config: its shape, all heads.
        vllm_config: of the engine.
        prefix: the name of this module in the model.
    """

    columns: Tensor

    def __init__(self, config: MLAConfig, vllm_config: Any, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.heads = heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        rank, rope, nope = config.kv_lora_rank, config.qk_rope_head_dim, config.qk_nope_head_dim
        self.kv_a_proj_with_mqa = ReplicatedLinear(
            config.input_size,
            rank + rope,
            bias=config.kv_bias,
            quant_config=vllm_config.quant_config,
            return_bias=False,
            prefix=f"{prefix}.kv_a_proj_with_mqa",
        )
        self.kv_b_proj = WeightByHeads(heads * (nope + config.v_head_dim), rank)
        self.q_rope_proj = by_heads(heads, rope, config.head_dim) if rope else None
        self.sinks = by_heads(heads) if config.sinks else None
        self.register_buffer("columns", torch.tensor(config.rope_columns, dtype=torch.long), persistent=False)
        own = replace(config, num_attention_heads=heads)
        self.attn = PagedLatents(own, self.sinks, vllm_config, f"{prefix}.attn")

    def forward(self, query: Tensor, kv_input: Tensor, cos: Tensor | None, sin: Tensor | None, *_: None) -> Tensor:
        """Attend: query [1, H, N, d] before rope, kv_input [1, N, E], cos and sin [1, N, c]; returns [1, N, H, v]."""
        rows = self.kv_a_proj_with_mqa(kv_input)[0]
        query = query[0].transpose(0, 1)
        turned = query[..., :0]
        if self.q_rope_proj is not None:
            if cos is None or sin is None:
                raise AssertionError("the graph gives a site with rotary slots cos and sin")
            cos, sin = (x.reshape(-1, x.shape[-1]).index_select(-1, self.columns).to(query.dtype) for x in (cos, sin))
            latent, slots = rows.tensor_split((self.config.kv_lora_rank,), dim=-1)
            rows = torch.cat((latent, rotate(slots, cos, sin)), dim=-1)
            turned = rotate(torch.einsum("nhd,hsd->nhs", query, self.q_rope_proj), cos[:, None], sin[:, None])
        out: Tensor = self.attn(query, turned, rows, self.kv_b_proj.weight)
        return out.unsqueeze(0)


class ServedWindow(nn.Module):
    """In place of `attnedit.targets.attention.GateSWA`, and of attention that was not rewritten.

    The value v_s of a sink with logit b goes into what is cached, for
    ``sum e^l (v - v_s) / (sum e^l + e^b) + v_s = (sum e^l v + e^b v_s) / (sum e^l + e^b)``.

    Args:
        config: its shape, all heads.
        vllm_config: of the engine.
        prefix: the name of this module in the model.
        sinks: [H], the source's own sink logits; the parameter that is loaded, or None.
    """

    def __init__(
        self, config: GateSWAConfig | OrdinaryConfig, vllm_config: Any, prefix: str, sinks: nn.Parameter | None
    ) -> None:
        super().__init__()
        self.config = config
        ranks = get_tensor_model_parallel_world_size()
        if config.num_key_value_heads % ranks:  # of layers that were not rewritten nothing stands in config.json
            raise UsageError(
                f"layer {config.layer_idx} has {config.num_key_value_heads} key/value heads for {ranks} ranks; use a "
                "--tensor-parallel-size that divides it"
            )
        self.heads, self.groups = config.num_attention_heads // ranks, config.num_key_value_heads // ranks
        self.g_proj: nn.Module | None = None
        self.sink_logit = self.sink_value = None
        if isinstance(config, GateSWAConfig):
            if config.gate != "none":
                size = config.v_head_dim if config.gate == "element" else 1
                self.g_proj = ColumnParallelLinear(
                    config.hidden_size,
                    config.num_attention_heads * size,
                    bias=config.gate_bias,
                    quant_config=vllm_config.quant_config,
                    return_bias=False,
                    prefix=f"{prefix}.g_proj",
                )
            self.sink_logit = by_heads(self.heads) if config.sink_logit else None
            self.sink_value = by_heads(self.groups, config.v_head_dim) if config.sink_value else None
        self.both = (sinks, self.sink_logit) if sinks is not None and self.sink_logit is not None else None
        logits: Tensor | None = sinks if self.sink_logit is None else self.sink_logit
        if self.both is not None:
            logits = torch.zeros(self.heads)  # filled by `finish`
        _check_sinks(logits, config.layer_idx)
        self.logits = (logits,)  # not a parameter a second time
        self.attn = Attention(
            num_heads=self.heads,
            head_size=config.head_dim,
            scale=config.scale,
            num_kv_heads=self.groups,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            logits_soft_cap=config.softcap,
            per_layer_sliding_window=config.sliding_window,
            prefix=f"{prefix}.attn",
            **({} if logits is None else {"sinks": logits}),
        )
        backend = self.attn.attn_backend.get_name()
        if logits is not None and logits.dtype == torch.float16 and backend == "FLASH_ATTN":
            raise UsageError(
                f"layer {config.layer_idx} has sink logits, which vLLM's {backend} takes in bfloat16 only; use --dtype "
                "bfloat16, or --attention-backend TRITON_ATTN"
            )
        sizes = self.attn.attn_backend.get_supported_head_sizes()
        if sizes and config.head_dim not in sizes:
            raise UsageError(
                f"layer {config.layer_idx}: vLLM's {backend} attends with heads of "
                f"{', '.join(map(str, sizes))} values, this model has {config.head_dim}; use attnedit.load"
            )

    def finish(self) -> None:
        """Compute what depends on loaded weights: two keys without value are one, whose weight is their sum."""
        if self.both is not None:
            first, second = self.both
            logits: Any = self.logits[0]
            logits.copy_(torch.logaddexp(first.float(), second.float()))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor | None = None, *_: Any) -> Tensor:
        """Attend: query [1, H, N, d], key [1, G, N, d] and value [1, G, N, v], all rotated; returns [1, N, H, v]."""
        config, size = self.config, self.config.v_head_dim
        query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # [N, H, d]
        if self.sink_value is not None:
            value = value - self.sink_value
        if size < config.head_dim:
            value = F.pad(value, (0, config.head_dim - size))
        out: Tensor = self.attn(*(x.flatten(1) for x in (query, key, value)))
        out = out.view(-1, self.heads, config.head_dim)[..., :size]
        if self.sink_value is not None:
            out = out + self.sink_value.repeat_interleave(self.heads // self.groups, dim=0)
        if self.g_proj is not None and hidden is not None:
            out = out * torch.sigmoid(self.g_proj(hidden)[0]).unflatten(-1, (self.heads, -1))
        return out.unsqueeze(0)


def _check_sinks(logits: Tensor | None, layer: int) -> None:
    if logits is None or not vllm.__version__.startswith("0.26.") or logits.dtype == torch.bfloat16:
        return
    if current_platform.is_cpu():
        raise UsageError(
            f"layer {layer} has sink logits, which vLLM 0.26 takes on a CPU in bfloat16 only; use --dtype bfloat16, or "
            "vLLM 0.32"
        )

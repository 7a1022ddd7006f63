"""vLLM's attention backend for latent attention on a CPU: any rank, any slots, windows, softcap and sink logits.

vLLM's own CPU kernel takes a latent of 512 values with 64 rotary ones and nothing else. Every query goes the absorbed
way here, over the cache, so that prompts in parts and prompts that share a prefix need nothing of their own.

Shapes: N new tokens of all requests, H heads, r latent, s rotary slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionMetadataBuilder, MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

QUERIES = 256
"""Queries of a prompt that attend at a time: their logits [H, queries, S] are in memory at once."""


@dataclass
class LatentMetadata:
    """One batch, as `vllm.model_executor.layers.attention.MLAAttention` reads it: all of it is "decoded".

    Attributes:
        num_actual_tokens: N.
        starts: first new token of each request, and N.
        lengths: tokens of each request, the new ones included.
        block_table: [requests, blocks].
        slot_mapping: [N], places in the cache.
    """

    num_actual_tokens: int
    num_decode_tokens: int
    num_decodes: int
    starts: list[int]
    lengths: list[int]
    block_table: Tensor
    slot_mapping: Tensor
    num_prefills: int = 0
    prefill: None = None
    decode: bool = True
    causal: bool = True


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Makes the metadata of a batch."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """Read what the backend needs off what all backends share."""
        common = common_attn_metadata
        requests = common.num_reqs
        return LatentMetadata(
            num_actual_tokens=common.num_actual_tokens,
            num_decode_tokens=common.num_actual_tokens,
            num_decodes=requests,
            starts=common.query_start_loc[: requests + 1].tolist(),
            lengths=common.seq_lens[:requests].tolist(),
            block_table=common.block_table_tensor[:requests],
            slot_mapping=common.slot_mapping,
        )


class LatentImpl(CPUMLAImpl):
    """Attention over latents in plain torch.

    Args:
        sliding_window: tokens each query sees, itself included; None is all.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: [H] logits of a key that carries no value.
        others: as for vLLM's own.
    """

    def __init__(
        self,
        *args: Any,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        **others: Any,
    ) -> None:
        super().__init__(*args, sliding_window=None, **others)
        self.window, self.softcap, self.sinks = sliding_window, softcap, sinks

    def forward_mqa(self, q: Any, kv_c_and_k_pe_cache: Tensor, attn_metadata: Any, layer: Any) -> tuple[Tensor, None]:
        """Attend with absorbed queries, [N, H, r] and [N, H, 2 s]; returns [N, H, r]."""
        query = torch.cat(q, dim=-1) if isinstance(q, tuple) else q
        out = query.new_zeros(*query.shape[:2], self.kv_lora_rank)
        size = kv_c_and_k_pe_cache.shape[1]
        for request, length in enumerate(attn_metadata.lengths):
            begin, end = attn_metadata.starts[request : request + 2]
            table = attn_metadata.block_table[request]
            for first in range(begin, end, QUERIES):
                last = min(first + QUERIES, end)
                seen = length - (end - last)  # tokens up to the last of these queries
                low = 0 if self.window is None else max(0, seen - (last - first) - self.window + 1)
                # Blocks that a window has left behind are not this request's any more.
                blocks = table[low // size : -(-seen // size)].long()
                start = low // size * size
                rows = kv_c_and_k_pe_cache[blocks].flatten(0, 1)[low - start : seen - start]
                out[first:last] = self._attend(query[first:last], rows.to(query.dtype))
        return out, None

    def _attend(self, query: Tensor, rows: Tensor) -> Tensor:
        """Attend with the last queries [t, H, r + 2 s] of a sequence to all its rows [S, r + 2 s]."""
        logits = torch.einsum("thc,sc->hts", query, rows).float() * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        new, keys = query.shape[0], rows.shape[0]
        position = torch.arange(keys - new, keys, device=rows.device)[:, None]
        key = torch.arange(keys, device=rows.device)
        shown = key <= position
        if self.window is not None:
            shown &= key > position - self.window
        logits = logits.masked_fill(~shown, float("-inf"))
        if self.sinks is None:
            weights = logits.softmax(dim=-1)
        else:
            sinks = self.sinks.float()[:, None, None].expand(-1, new, 1)
            weights = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return torch.einsum("hts,sr->thr", weights.to(rows.dtype), rows[:, : self.kv_lora_rank])

    def do_kv_cache_update(
        self,
        kv_c_normed: Tensor,
        k_pe: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
        kv_cache_dtype: str,
        k_scale: Tensor,
    ) -> None:
        """Write latents [N, r] and slots [N, 1, 2 s] to their places; padding has places below 0."""
        if not kv_cache.numel():
            return
        rows = torch.cat((kv_c_normed, k_pe.flatten(1)), dim=-1)
        places = slot_mapping.flatten().long()
        real = places >= 0
        places = places[real]
        size = kv_cache.shape[1]
        kv_cache[places // size, places % size] = rows[: real.shape[0]][real].to(kv_cache.dtype)


class LatentBackend(CPUMLABackend):
    """What vLLM asks of a backend."""

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """Any."""
        return []

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any."""
        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Any."""
        return True

    @staticmethod
    def get_impl_cls() -> type[LatentImpl]:
        """Return the class that attends."""
        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """Return the class that makes metadata."""
        return LatentMetadataBuilder

"""vLLM's view of one latent attention: a layer with a paged cache, its backend, and what it is told of a batch.

vLLM's own (`MLAAttention`) takes DeepSeek's sizes from the model's configuration, and differs from release to release
and device to device; this takes any size and knows no device. It stands on what every attention layer of vLLM 0.26 and
0.32 has.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionBackend, AttentionCGSupport, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import MLAAttentionSpec, SlidingWindowMLASpec

from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.runtime.vllm.paged_attention import EXPANDED_BYTES, attend_batch
from attnedit.targets.runtime.vllm.paged_latents import Pages, write
from attnedit.targets.runtime.vllm.plugin import OPERATION


@dataclass
class LatentMetadata:
    """One batch.

    Attributes:
        tokens: N; behind them there may be padding.
        pages: which of them belong to which request, and where its cache is.
        slot_mapping: [N], places in the cache; below 0 for padding.
    """

    tokens: int
    pages: Pages
    slot_mapping: Tensor


class LatentMetadataBuilder(AttentionMetadataBuilder[LatentMetadata]):
    """Makes the metadata of a batch."""

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.reorder_batch_threshold = 1  # requests with one new token come first, and are one call

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """Steps: how their work is cut depends on nothing but the number of requests."""
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> LatentMetadata:
        """Read what the layer needs off what all backends share."""
        common = common_attn_metadata
        requests = common.num_reqs
        pages = Pages(
            starts=common.query_start_loc[: requests + 1],
            lengths=common.seq_lens[:requests],
            table=common.block_table_tensor[:requests],
            most_new=common.max_query_len,
            longest=common.max_seq_len,
        )
        return LatentMetadata(common.num_actual_tokens, pages, common.slot_mapping)


class LatentBackend(AttentionBackend):
    """What vLLM asks of a backend."""

    @staticmethod
    def get_name() -> str:
        """Return a name for logs."""
        return "ATTNEDIT_LATENT"

    @staticmethod
    def get_impl_cls() -> Any:
        """The layer attends by itself."""
        raise NotImplementedError("attnedit's layers attend without a class of the backend's")

    @staticmethod
    def get_builder_cls() -> type[LatentMetadataBuilder]:
        """Return the class that makes metadata."""
        return LatentMetadataBuilder

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int, block_size: int, num_kv_heads: int, head_size: int, cache_dtype_str: str = "auto"
    ) -> tuple[int, ...]:
        """Of vLLM 0.26, which asks; later ones read it off the layer's specification."""
        return num_blocks, block_size, head_size

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Any."""
        return [MultipleOf(1)]

    @classmethod
    def supports_block_size(cls, block_size: int | None) -> bool:
        """Any."""
        return True

    @classmethod
    def indexes_kv_by_block_stride(cls) -> bool:
        """Blocks may be longer than what they hold, so that layers of other sizes share them."""
        return True

    @classmethod
    def is_mla(cls) -> bool:
        """One vector per token, for all heads."""
        return True


class PagedLatents(nn.Module, AttentionLayerBase):
    """Puts latents and slots into the cache and attends to what is there.

    Args:
        config: of the attention, for the heads of this rank.
        sinks: [H] logits of a key that carries no value.
        vllm_config: of the engine.
        name: of this layer in the model.
    """

    impl: Any = None

    def __init__(self, config: MLAConfig, sinks: Tensor | None, vllm_config: Any, name: str) -> None:
        super().__init__()
        self.config, self.layer_name = config, name
        self.sinks = (sinks,)  # not a parameter a second time
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_cache_dtype: str = vllm_config.cache_config.cache_dtype
        self.kv_cache = torch.tensor([])
        layers = vllm_config.compilation_config.static_forward_context
        if name in layers:
            raise AssertionError(f"two layers are called {name}")
        layers[name] = self

    def bind_kv_cache(self, kv_cache: Tensor) -> None:
        """Take the cache [blocks, 1, tokens of a block, r + slots] that vLLM 0.32 gives; 0.26 sets it without the 1."""
        self.kv_cache = kv_cache.squeeze(1)

    def get_attn_backend(self) -> type[AttentionBackend]:
        """Return what vLLM asks about the cache and batches."""
        return LatentBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> Any:
        """Return what the cache holds of a token."""
        common = {
            "block_size": vllm_config.cache_config.block_size,
            "num_kv_heads": 1,
            "head_size": self.width,
            "dtype": kv_cache_dtype_str_to_dtype(self.kv_cache_dtype, vllm_config.model_config),
        }
        if not hasattr(SlidingWindowMLASpec, "prefix_cacheable"):
            # vLLM 0.26 has windows of latents for one model only: the cache holds the whole context. And it takes
            # layers for alike, with the size of the first, unless something but their size differs.
            return MLAAttentionSpec(**common, cache_dtype_str=f"{self.kv_cache_dtype} {self.width}")
        if self.config.window is None:
            return MLAAttentionSpec(**common)
        return SlidingWindowMLASpec(**common, sliding_window=self.config.window)

    def forward(self, query: Tensor, turned: Tensor, rows: Tensor, weight: Tensor) -> Tensor:
        """Attend: query [N, H, d], turned [N, H, s], rows [N, w] of the new tokens, weight [H (nope + v), r].

        Returns:
            [N, H, v].
        """
        out = torch.empty((*query.shape[:2], self.config.v_head_dim), dtype=query.dtype, device=query.device)
        torch.ops.attnedit.paged_latents(query, turned, rows, weight, out, self.layer_name)
        return out

    def attend(
        self, query: Tensor, turned: Tensor, rows: Tensor, weight: Tensor, out: Tensor, metadata: LatentMetadata
    ) -> None:
        """Write the new tokens to their places, then attend; all may have padding at their end."""
        tokens = metadata.tokens
        write(rows[:tokens], self.kv_cache, metadata.slot_mapping[:tokens])
        out.copy_(attend_batch(query, turned, weight, self.kv_cache, metadata.pages, self.config, self.sinks[0]))


def paged_latents(query: Tensor, turned: Tensor, rows: Tensor, weight: Tensor, out: Tensor, layer: str) -> None:
    """One layer's attention, which torch.compile does not look into: the batch's metadata are in vLLM's context."""
    context = get_forward_context()
    metadata = context.attn_metadata
    if isinstance(metadata, list):  # of several small batches
        metadata = metadata[0]
    if metadata is None:  # a forward that only measures memory
        out.zero_()
        if out.is_cuda:  # what a prompt will need is measured, too
            out.new_empty(EXPANDED_BYTES // out.element_size())
        return
    context.no_compile_layers[layer].attend(query, turned, rows, weight, out, metadata[layer])


if not hasattr(torch.ops.attnedit, "paged_latents"):
    _TENSORS = ", ".join(f"Tensor {name}" for name in ("query", "turned", "rows", "weight"))
    torch.library.define(OPERATION, f"({_TENSORS}, Tensor(a!) out, str layer) -> ()")
    torch.library.impl(OPERATION, "CompositeExplicitAutograd", paged_latents)
    torch.library.register_fake(OPERATION, lambda *_: None)

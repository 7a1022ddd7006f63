"""Multi-head latent attention as a module that stands in place of rope and attention of a source layer.

Method: DeepSeek-V2 (arXiv 2405.04434, section 2.1: latent, decoupled rope, absorption), with the source's own
pre-rope queries as input (Attention Editing, arXiv 2604.05688).

Shapes: B batch, T new tokens, S tokens attended to, H heads, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

import functools
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnedit.compiler.compatibility.caches import append
from attnedit.compiler.compatibility.live import is_plain_linear, recorded_attention
from attnedit.compiler.compatibility.paged import PagedLayers
from attnedit.compiler.compatibility.torch_names import exporting
from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph.masks import causal
from attnedit.targets.attention.kernels import kernel_for
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.decode import decodes_fused, latent_decode
from attnedit.targets.attention.mla.expanded import attend_expanded
from attnedit.targets.attention.mla.paths import TORCH_SIZE, choose_path
from attnedit.targets.attention.mla.rotary import rotate, slot_table
from attnedit.targets.attention.mla.step import latent_decode_raised, latent_inputs, surrounded
from attnedit.targets.attention.module import AttentionModule, upcast
from attnedit.targets.attention.prefill import prefills_fused

__all__ = ["MLA", "MLAConfig", "choose_path"]

EXPANDED_BYTES = 1 << 30
"""Queries, keys and values that a prefill holds at a time, roughly: beyond that it goes in blocks of heads."""


class Cache(Protocol):
    """What is used of a transformers cache."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append, and return everything cached for the layer."""
        ...

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Return the number of tokens seen."""
        ...


class MLA(AttentionModule):
    """Latent attention from pre-rope queries and the projection's input to per-head outputs.

    Per token the cache holds a latent c (r values) and s rotary slots (2 s values, stored after rotation), both
    shared by all heads. With q the incoming query of head h::

        logit = scale * (q . W_UK c + R(W_QR q) . R(slots))        output = W_UV sum softmax(logit) c

    Weights:
        kv_a_proj_with_mqa: Linear(E -> r + 2 s), rows [latent | real parts of the slots | imaginary parts].
        kv_b_proj: Linear(r -> H (qk_nope_head_dim + dv)), rows per head [W_UK; W_UV].
        q_rope_proj: [H, 2 s, d], rows ordered as the slots; None without slots.
        sinks: [H] logits of a key that carries no value; None unless ``config.sinks``.

    Args:
        config: the shape.
        device: where the weights are made.
        dtype: their dtype.

    Attributes:
        path: "auto" leaves the choice to `choose_path`; an exporter whose lengths are symbolic fixes it.
        columns: `config.rope_columns` as a tensor, for compilers: constants would make every layer's code its own.
    """

    config_class = MLAConfig
    pages = True
    config: MLAConfig

    q_rope_proj: nn.Parameter | None
    sinks: nn.Parameter | None

    def __init__(
        self, config: MLAConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__(config)
        self.path: Literal["auto", "absorbed", "expanded"] = "auto"
        self.columns: Tensor | None = None
        heads, rank, rope = config.num_attention_heads, config.kv_lora_rank, config.qk_rope_head_dim
        up = heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.kv_a_proj_with_mqa = nn.Linear(
            config.input_size, rank + rope, bias=config.kv_bias, device=device, dtype=dtype
        )
        self.kv_b_proj = nn.Linear(rank, up, bias=False, device=device, dtype=dtype)
        # No zero-size parameters: several checkpoint tools trip over them.
        self.q_rope_proj = (
            nn.Parameter(torch.empty(heads, rope, config.head_dim, device=device, dtype=dtype)) if rope else None
        )
        self.sinks = nn.Parameter(torch.empty(heads, device=device, dtype=dtype)) if config.sinks else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the two plain parameters random values, as their linear siblings already have."""
        if self.q_rope_proj is not None:
            nn.init.normal_(self.q_rope_proj, std=self.config.head_dim**-0.5)
        if self.sinks is not None:
            nn.init.zeros_(self.sinks)

    def constants_as_tensors(self, wanted: bool) -> None:
        """Hold the rotary columns as a tensor."""
        columns = self.config.rope_columns
        self.columns = torch.tensor(columns, device=self.kv_b_proj.weight.device) if wanted else None

    def extra_repr(self) -> str:
        """Name the sizes that define the cache."""
        config = self.config
        return f"heads={config.num_attention_heads}, latent={config.kv_lora_rank}, slots={config.num_slots}"

    def forward(
        self,
        query: Tensor,
        kv_input: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, H, T, d], before rope and scale.
            kv_input: [B, T, E].
            cos: [B, T, c], [1, T, c] or [T, c]; None when there are no slots.
            sin: like ``cos``.
            attention_mask: None (causal; a single query sees every key), bool [B, 1 or H, T, >= S] with True where
                to attend, the same in floats to add to the logits, or a padding mask [B, S] of the new and cached
                tokens.
            past_key_values: a transformers cache, or its pages, which say what is seen in place of the mask; gets the
                latent as keys, the slots as values.

        Returns:
            [B, T, H, dv] in the dtype of ``query``. A query that may attend to nothing gets finite numbers.

        Raises:
            UsageError: there are slots but no cos and sin, or the mask has none of these forms.
        """
        length = query.shape[2]
        config = self.config
        if isinstance(past_key_values, PagedLayers):
            attention_mask = past_key_values.visible(config.layer_idx, config.window)
        if attention_mask is not None and not isinstance(attention_mask, Tensor):
            raise self.no_mask(attention_mask)
        if self.q_rope_proj is not None and (cos is None or sin is None):
            raise UsageError(f"layer {config.layer_idx}: rotary slots need cos and sin, got None")
        if past_key_values is not None and self._is_short_step(query, kv_input, attention_mask):
            return self._step(query, kv_input, cos, sin, attention_mask, past_key_values)
        projected = self.kv_a_proj_with_mqa(kv_input)
        latent, slots = projected.tensor_split((config.kv_lora_rank,), dim=-1)
        query_rope: Tensor | None = None
        if self.q_rope_proj is not None and cos is not None and sin is not None:
            cos, sin = self._table(cos, slots), self._table(sin, slots)
            slots = rotate(slots, cos, sin)
            query_rope = torch.einsum("bhtd,hsd->bhts", query, self.q_rope_proj)
            query_rope = rotate(query_rope, cos.unsqueeze(-3), sin.unsqueeze(-3))
        latent, slots = latent.unsqueeze(1), slots.unsqueeze(1)
        past: int | Tensor = 0
        if past_key_values is not None:
            if length > 1 and (attention_mask is None or attention_mask.dim() == 2):
                past = past_key_values.get_seq_length(config.layer_idx) + 0  # a static cache's changes in place
            latent, slots = append(past_key_values, latent, slots, config.layer_idx)
            if length > 1 and attention_mask is None:
                # The free places of a static cache come last, and nothing else hides them.
                latent, slots = (x[:, :, : int(past) + length] for x in (latent, slots))
        keys = latent.shape[2]
        path = choose_path(length, keys, config) if self.path == "auto" else self.path
        expanded = path == "expanded" and recorded_attention() is None
        if expanded and attention_mask is None and self._prefills(query, latent, keys):
            return self._expanded(query, query_rope, latent[:, 0], slots[:, 0], None, in_kernel=True)
        mask = self.visible(attention_mask, length, keys, past, query.device, config.window)
        if expanded:
            return self._expanded(query, query_rope, latent[:, 0], slots[:, 0], mask)
        return self._absorbed(query, query_rope, latent[:, 0], slots[:, 0], mask, past_key_values)

    def _is_short_step(self, query: Tensor, kv_input: Tensor, mask: Tensor | None) -> bool:
        """Whether one new token of a few sequences goes through the few launches of `_step`."""
        weights = self.kv_a_proj_with_mqa, self.kv_b_proj, self.q_rope_proj
        if query.shape[2] != 1 or self.path == "expanded" or not self.config.qk_nope_head_dim:
            return False
        return surrounded(query, kv_input, mask, *weights) and self._plain() and recorded_attention() is None

    def _plain(self) -> bool:
        """Whether attention is nothing but a softmax, as kernels have it."""
        dropout = self.training and self.attention_dropout
        return self.config.softcap is None and self.sinks is None and not dropout

    def _step(
        self,
        query: Tensor,
        kv_input: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        attention_mask: Tensor | None,
        cache: Cache,
    ) -> Tensor:
        """Attend with one token of each sequence, in as few launches as there are."""
        config, weight = self.config, self.kv_b_proj.weight
        cos, sin = (None if x is None else self._table(x, kv_input).flatten(0, -2) for x in (cos, sin))
        kv = self.kv_a_proj_with_mqa.weight, self.kv_a_proj_with_mqa.bias
        down, rotary, new, new_slots = latent_inputs(
            query[:, :, 0], kv_input[:, 0], *kv, weight, self.q_rope_proj, cos, sin, config.scale
        )
        latent, slots = append(cache, new[:, None, None], new_slots[:, None, None], config.layer_idx)
        mask = self.visible(attention_mask, 1, latent.shape[2], 0, query.device, config.window)
        row = None if mask is None else mask[:, 0, 0]
        filled, rope = _filled(cache, config.layer_idx), None if self.q_rope_proj is None else rotary
        cached = latent[:, 0], slots[:, 0]
        return latent_decode_raised(down, rope, *cached, row, filled, weight, config.v_head_dim)[:, None]

    def _prefills(self, query: Tensor, latent: Tensor, keys: int) -> bool:
        """Whether new tokens without a mask go through our kernel: torch's take no such window, past or size."""
        config, length = self.config, query.shape[2]
        nope = config.qk_nope_head_dim
        # Not off the configuration: there compilers would ask for every layer's columns.
        rope = 0 if self.q_rope_proj is None else self.q_rope_proj.shape[1]
        windowed = config.window is not None and config.window < keys
        if not (windowed or keys > length or nope + rope > TORCH_SIZE) or length == 1 or not nope:
            return False
        if not self._plain() or exporting() or kernel_for(query) is not None:
            return False
        return prefills_fused(query, (latent, *self.parameters()), (nope, config.v_head_dim, *([rope] if rope else [])))

    def _expanded(
        self,
        query: Tensor,
        query_rope: Tensor | None,
        latent: Tensor,
        slots: Tensor,
        mask: Tensor | None,
        in_kernel: bool = False,
    ) -> Tensor:
        """Project the latent up to keys and values, then attend as usual; latent [B, S, r], slots [B, S, 2s].

        Causal through our kernel if `in_kernel`, whatever the past.
        """
        config = self.config
        heads, rows = config.num_attention_heads, config.qk_nope_head_dim + config.v_head_dim
        dropout = self.attention_dropout if self.training else 0.0
        attend = functools.partial(
            attend_expanded,
            config=config,
            sinks=self.sinks,
            dropout=dropout,
            in_kernel=in_kernel,
            probabilities=self.probabilities,
        )
        block = heads
        if config.softcap is None and self.sinks is None and not torch.compiler.is_compiling():
            size = latent.shape[0] * (2 * latent.shape[1] + query.shape[2]) * (rows + config.qk_rope_head_dim)
            block = max(1, min(heads, EXPANDED_BYTES // (size * latent.element_size())))
        if block == heads:
            return attend(query, query_rope, self.kv_b_proj(latent), slots, mask)
        weight = self._up_weight(latent).unflatten(0, (heads, rows))
        parts = []
        for first in range(0, heads, block):
            span = slice(first, first + block)
            up = F.linear(latent, weight[span].flatten(0, 1))
            rope = None if query_rope is None else query_rope[:, span]
            own = mask if mask is None or mask.shape[1] == 1 else mask[:, span]
            parts.append(attend(query[:, span], rope, up, slots, own))
        return torch.cat(parts, dim=2)

    def _absorbed(
        self,
        query: Tensor,
        query_rope: Tensor | None,
        latent: Tensor,
        slots: Tensor,
        mask: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """Take the queries down to the latent instead: all heads read it once; latent [B, S, r], slots [B, S, 2s]."""
        config = self.config
        heads, nope = config.num_attention_heads, config.qk_nope_head_dim
        weight = self._up_weight(latent).reshape(heads, nope + config.v_head_dim, config.kv_lora_rank)
        # The scale goes in first: fp16 overflows later that way.
        down = torch.einsum("bhtd,hdr->bhtr", query * config.scale, weight[:, :nope]) if nope else None
        rotary = None if query_rope is None else query_rope * config.scale
        if self._plain() and recorded_attention() is None and decodes_fused(down, rotary, latent, mask):
            row = None if mask is None else mask[:, 0, 0]
            one, turned = (None if x is None else x[:, :, 0] for x in (down, rotary))
            context = latent_decode(one, turned, latent, slots, row, _filled(cache, config.layer_idx)).unsqueeze(2)
        else:
            context = self._weighted_latent(down, rotary, latent, slots, mask)
        return torch.einsum("bhtr,hvr->bthv", context, weight[:, nope:])

    def _weighted_latent(
        self, down: Tensor | None, rotary: Tensor | None, latent: Tensor, slots: Tensor, mask: Tensor | None
    ) -> Tensor:
        """Attend over the latent in plain torch: down [B, H, T, r], rotary [B, H, T, 2s]; returns [B, H, T, r]."""
        logits: Tensor | None = None
        for query, keys in ((down, latent), (rotary, slots)):
            if query is None:
                continue
            # Heads stand side by side as more queries: one product per sequence.
            part = upcast(torch.bmm(query.flatten(1, 2), keys.transpose(1, 2))).unflatten(1, query.shape[1:3])
            logits = part if logits is None else logits + part
        if logits is None:
            raise AssertionError("MLAConfig allows no attention without keys")
        length, keys_seen = logits.shape[2:]
        if mask is None and length > 1:
            mask = causal(length, keys_seen, 0, self.config.window, logits.device)
        weights = self.probabilities(logits, mask, self.sinks).to(latent.dtype)
        if (recorded := recorded_attention()) is not None:
            recorded.append(weights)
        return torch.bmm(weights.flatten(1, 2), latent).view(*logits.shape[:3], -1)

    def _up_weight(self, like: Tensor) -> Tensor:
        """Weight of ``kv_b_proj`` [H (nope + dv), r], read off its output where something wraps it.

        That something is an adapter, a quantiser, or a hook that brings the weight in for each call only.
        """
        module = self.kv_b_proj
        if is_plain_linear(module):
            return module.weight
        unit: Tensor = module(torch.eye(self.config.kv_lora_rank, device=like.device, dtype=like.dtype))
        return unit.transpose(0, 1)

    def _table(self, table: Tensor, like: Tensor) -> Tensor:
        if self.columns is not None:
            return table.index_select(-1, self.columns).to(like.dtype)
        return slot_table(table, self.config.rope_columns, like)


def _filled(cache: Cache | None, layer: int) -> Tensor | None:
    """Tokens of a static cache that are filled, on the device; None where all that it returns are."""
    seen = None if cache is None else cache.get_seq_length(layer)
    return seen if isinstance(seen, Tensor) else None

"""Attention as it is exported: one body for prefill and decode, in the formulations that ONNX Runtime runs fastest.

Keys are never repeated for the heads that share them: those heads stand side by side as rows of one product, so that
the cache is read once. The mask is added to the logits rather than selected with.

Shapes: B batch, T new tokens, S keys, H heads, G key/value heads, d query size, dv value size, r latent, s slots,
n sink tokens, W sliding window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from attnedit.compiler.graph.masks import as_bias
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.kernels import Virtual
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.module import MLA
from attnedit.targets.attention.mla.rotary import rotate
from attnedit.targets.runtime.decomposed import as_interface, attend, lower_attention, probabilities
from attnedit.targets.runtime.latent import AbsorbedAttention
from attnedit.targets.runtime.onnx.cache import ExportLayer, Step, current_step
from attnedit.targets.runtime.windowed import WindowedAttention

EXPORT = "attnedit_onnx"
"""Name of the attention implementation, to transformers."""


class LatentAttention(AbsorbedAttention):
    """`MLA` with everything absorbed that can be: queries go to the latent, outputs come from it.

    The logits are two products with the two parts of the cache, and the latent is the value as it stands: no part
    of the cache is sliced or copied. Where the cache has keys of another size than the latent's, its two halves
    hold latent and slots joined and cut in the middle.
    """

    def __init__(self, mla: MLA) -> None:
        super().__init__(mla, mla.config.scale)

    @staticmethod
    def held(config: MLAConfig) -> int | None:
        """Tokens that the cache holds, always; None where it grows."""
        return None

    def forward(
        self, query: Tensor, kv_input: Tensor, cos: Tensor | None, sin: Tensor | None, mask: Tensor, cache: Any
    ) -> Tensor:
        """Attend; as `MLA.forward`, with the mask of `export_mask` and an export cache; returns [B, T, H, dv]."""
        config = self.config
        rank, rope = config.kv_lora_rank, config.qk_rope_head_dim
        batch, heads, length, _ = query.shape
        latent, slots = self.kv_a_proj_with_mqa(kv_input).unsqueeze(1).split([rank, rope], dim=-1)
        down = torch.matmul(query, self.query_down)
        onto_latent = down[..., :rank] if config.qk_nope_head_dim else None
        onto_slots = None
        if rope:
            cos, sin = self.tables(cos, sin, slots)
            slots, onto_slots = rotate(slots, cos, sin), rotate(down[..., -rope:], cos, sin)
        layer: ExportLayer = cache.layers[config.layer_idx]
        even = layer.keys is not None and layer.keys.shape[-1] != rank
        if even and layer.keys is not None:
            size = layer.keys.shape[-1]
            onto_latent = query.new_zeros(batch, heads, length, rank) if onto_latent is None else onto_latent
            latent, slots = _halves((latent, slots), size)
            onto_latent, onto_slots = _halves((onto_latent, onto_slots), size)
        latent, slots = cache.update(latent, slots, config.layer_idx)
        pairs = ((latent, onto_latent), (slots, onto_slots))
        parts = [_products(cached, onto) for cached, onto in pairs if onto is not None]
        logits = sum(parts[1:], parts[0]).transpose(1, 2).unflatten(1, (heads, length))
        sinks = () if self.sinks is None else (self.sinks,)
        weights, _ = probabilities(logits, mask, config.softcap, sinks)
        weights = weights.to(latent.dtype).reshape(batch, 1, heads * length, latent.shape[2])
        values = torch.cat([torch.matmul(weights, half) for half in ((latent, slots) if even else (latent,))], dim=-1)
        context = values[..., :rank].reshape(batch, heads, length, rank)
        return torch.matmul(context, self.value_up).transpose(1, 2)


class WindowAttention(WindowedAttention):
    """`GateSWA` over a buffer of fixed size: the sink tokens, then the last ``sliding_window - 1`` tokens.

    Which of them there are is known from positions and padding alone, so what an unwritten one holds has no effect.
    """

    @staticmethod
    def held(config: GateSWAConfig) -> int:
        """Tokens of the buffer."""
        return config.sliding_window - 1 + config.sink_tokens

    def attend(self, layer: ExportLayer, query: Tensor, key: Tensor, value: Tensor, virtual: Virtual) -> Tensor:
        """Attend to the buffer and the new tokens, and put these into it; returns [B, H, T, dv]."""
        config, step = self.config, current_step()
        if layer.keys is None or layer.values is None:
            raise AssertionError("an export layer has tensors")
        slots = first_real(step, config.sink_tokens)
        keys, values = (
            self._appended(past, new, slots, step) for past, new in ((layer.keys, key), (layer.values, value))
        )
        kept = config.sink_tokens + step.length
        layer.keys, layer.values = (
            torch.cat((x[:, :, : config.sink_tokens], x[:, :, kept:]), dim=2) for x in (keys, values)
        )
        return attend(query * config.scale, keys, values, as_bias(self._visible(slots, step)), config.softcap, virtual)

    def _appended(self, past: Tensor, new: Tensor, slots: Tensor, step: Step) -> Tensor:
        """Sink slots, recent tokens, new tokens [B, G, n + W - 1 + T, .]; sinks that just came in fill their slots."""
        count = self.config.sink_tokens
        if not count:
            return torch.cat((past, new), dim=2)
        arrived = (slots - step.start[:, None])[:, None, :, None]  # index among the new tokens
        index = arrived.clamp(min=0, max=step.length - 1).expand(-1, new.shape[1], -1, new.shape[3])
        sinks = torch.where((arrived >= 0) & (arrived < step.length), new.gather(2, index), past[:, :, :count])
        return torch.cat((sinks, past[:, :, count:], new), dim=2)

    def _visible(self, slots: Tensor, step: Step) -> Tensor:
        """Which of `_appended` each query sees, bool [B, 1, T, n + W - 1 + T]."""
        window, total = self.config.sliding_window, step.real.shape[1]
        column = step.start[:, None] + torch.arange(1 - window, step.length)  # positions [B, W - 1 + T]
        real = step.real.gather(1, column.clamp(min=0)) & (column >= 0)
        behind = step.positions()[:, :, None] - column[:, None]
        visible = (behind >= 0) & (behind < window) & real[:, None]
        if self.config.sink_tokens:
            # A sink inside the window is among the columns, so its slot shows only once it has left.
            far = (step.positions()[:, :, None] - slots[:, None] >= window) & (slots < total)[:, None]
            visible = torch.cat((far, visible), dim=-1)
        return visible[:, None]


def first_real(step: Step, count: int) -> Tensor:
    """Positions of the first `count` real tokens of each row, int64 [B, count]; S or more where there are fewer."""
    total = step.real.shape[1]
    rank = torch.where(step.real, step.real.to(torch.int64).cumsum(1), 0)
    wanted = torch.arange(1, count + 1)[:, None]
    chosen = rank[:, None] == wanted
    return torch.where(chosen.any(-1), chosen.to(torch.int64).argmax(-1), total)


def lower(model: nn.Module) -> None:
    """Replace every rewritten attention in a model by the form that is exported, in place."""
    lower_attention(model, "onnx", lambda lowering, module: None if lowering is None else lowering(module))


def _halves(parts: tuple[Tensor | None, ...], size: int) -> tuple[Tensor, Tensor]:
    """Join along the last dim, fill up with zeros to twice `size`, and cut in the middle."""
    joined = torch.cat([part for part in parts if part is not None], dim=-1)
    joined = nn.functional.pad(joined, (0, 2 * size - joined.shape[-1]))
    return joined[..., :size], joined[..., size:]


def _products(cached: Tensor, queries: Tensor) -> Tensor:
    """Products of cached values [B, 1, S, w] with queries [B, H, T, w], as [B, S, H T].

    The cache is the left factor because matrix products pack the right one first, which costs more than to turn the
    logits around afterwards.
    """
    return torch.matmul(cached.squeeze(1), queries.flatten(1, 2).transpose(1, 2))


export_attention = as_interface(
    lambda module, query, key, value, mask, scale, *others: attend(query * scale, key, value, mask, *others)
)


def export_mask(*args: Any, mask_function: Any, **kwargs: Any) -> Tensor:
    """Mask of one type of layer, as transformers' mask interface wants it, from the current step.

    Returns:
        float32 to add to the logits, [B, 1, T, S].
    """
    step = current_step()
    batch, total = step.real.shape
    row = torch.arange(batch)[:, None, None, None]
    query = step.positions()[:, None, :, None]
    key = torch.arange(total)[None, None, None]
    return as_bias(mask_function(row, torch.zeros((), dtype=torch.int64), query, key) & step.real[:, None, None])


AttentionInterface.register(EXPORT, export_attention)
AttentionMaskInterface.register(EXPORT, export_mask)

"""What llama.cpp computes from a file that we wrote: its graphs of our architectures, in torch, for the check.

Read off llama.cpp's src/models: ``deepseek2`` with one latent head, keys and values absorbed; ``step35`` with a sigmoid
per head and rotary halves; ``granite_swa`` with rotary neighbours, biases and sinks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from gguf import Keys
from torch import Tensor

from attnedit.compiler.graph.masks import as_bias
from attnedit.targets.runtime.gguf.file import Written
from attnedit.targets.runtime.gguf.latent import ARCHITECTURE as LATENT
from attnedit.targets.runtime.gguf.windowed import GATED, WITH_SINKS


class Reference:
    """A written file that computes."""

    def __init__(self, written: Written) -> None:
        self.file = written
        self.layers = int(written.key(Keys.LLM.BLOCK_COUNT))
        self.heads = int(written.key(Keys.Attention.HEAD_COUNT))
        self.eps = float(written.key(Keys.Attention.LAYERNORM_RMS_EPS))
        self.theta = float(written.key(Keys.Rope.FREQ_BASE))

    def decoding(self, batch: int, capacity: int) -> Text:
        """Begin a text; every call computes all of it again."""
        return Text(self)

    @torch.inference_mode()
    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return logits [B, T, V] of token ids [B, T], whose mask has 0 for padding on the left."""
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        x = self.file.tensor("token_embd.weight")[ids]
        for index in range(self.layers):
            at = f"blk.{index}."
            attend = self._latent if self.file.architecture == LATENT else self._windowed
            x = x + attend(self._norm(x, f"{at}attn_norm"), index, positions, mask.bool())
            h = self._norm(x, f"{at}ffn_norm")
            x = x + self._linear(
                F.silu(self._linear(h, f"{at}ffn_gate")) * self._linear(h, f"{at}ffn_up"), f"{at}ffn_down"
            )
        head = "output" if "output.weight" in self.file else "token_embd"
        return self._linear(self._norm(x, "output_norm"), head)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight = self.file.tensor(f"{name}.weight")
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.file.tensor(f"{name}.bias") if f"{name}.bias" in self.file else None
        return F.linear(x, self.file.tensor(f"{name}.weight"), bias)

    def _latent(self, h: Tensor, index: int, positions: Tensor, real: Tensor) -> Tensor:
        at = f"blk.{index}."
        key, rope = (int(self.file.key(name)) for name in (Keys.Attention.KEY_LENGTH_MLA, Keys.Rope.DIMENSION_COUNT))
        rank = int(self.file.key(Keys.Attention.KV_LORA_RANK))
        query = self._linear(h, f"{at}attn_q").unflatten(-1, (self.heads, key)).transpose(1, 2)
        nope, rotary = query.split([key - rope, rope], -1)
        latent, slots = self._linear(h, f"{at}attn_kv_a_mqa").split([rank, rope], -1)
        latent = self._norm(latent, f"{at}attn_kv_a_norm")[:, None]
        absorbed = nope @ self.file.tensor(f"{at}attn_k_b.weight").mT
        scores = absorbed @ latent.mT
        scores += self._turn(rotary, positions, rope, True) @ self._turn(slots[:, None], positions, rope, True).mT
        weights = (scores * key**-0.5 + _bias(real, None)).softmax(-1)
        out = (weights @ latent) @ self.file.tensor(f"{at}attn_v_b.weight").mT
        return self._linear(out.transpose(1, 2).flatten(2), f"{at}attn_output")

    def _windowed(self, h: Tensor, index: int, positions: Tensor, real: Tensor) -> Tensor:
        at = f"blk.{index}."
        groups, size = (int(self.file.key(n)) for n in (Keys.Attention.HEAD_COUNT_KV, Keys.Attention.KEY_LENGTH))
        slides = bool(self.file.key(Keys.Attention.SLIDING_WINDOW_PATTERN)[index])
        query, keys, values = (
            self._linear(h, f"{at}attn_{part}").unflatten(-1, (-1, size)).transpose(1, 2) for part in "qkv"
        )
        if f"{at}attn_q_norm.weight" in self.file:
            query = self._norm(query, f"{at}attn_q_norm")
        if f"{at}attn_k_norm.weight" in self.file:
            keys = self._norm(keys, f"{at}attn_k_norm")
        neighbours = self.file.architecture == WITH_SINKS
        rotated = int(self.file.key(Keys.Rope.DIMENSION_COUNT))
        if self.file.architecture == GATED:
            rotated = int(self.file.key(Keys.Rope.DIMENSION_COUNT_SWA)) if slides else rotated // 2
        query, keys = (self._turn(x, positions, rotated, neighbours) for x in (query, keys))
        keys, values = (x.repeat_interleave(self.heads // groups, 1) for x in (keys, values))
        window = int(self.file.key(Keys.Attention.SLIDING_WINDOW)) if slides else None
        scores = query @ keys.mT * size**-0.5 + _bias(real, window)
        if f"{at}attn_sinks.weight" in self.file:
            sinks = self.file.tensor(f"{at}attn_sinks.weight")[None, :, None, None]
            scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], -1)
        out = scores.softmax(-1)[..., : keys.shape[2]] @ values
        if f"{at}attn_gate.weight" in self.file:
            out = out * self._linear(h, f"{at}attn_gate").sigmoid().transpose(1, 2)[..., None]
        return self._linear(out.transpose(1, 2).flatten(2), f"{at}attn_output")

    def _turn(self, x: Tensor, positions: Tensor, size: int, neighbours: bool) -> Tensor:
        """Rotate the first `size` values of [B, H, T, d]."""
        steps = self.theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
        angle = (positions[:, None, :, None] * steps).float()
        part, rest = x[..., :size], x[..., size:]
        one, two = (part[..., 0::2], part[..., 1::2]) if neighbours else part.chunk(2, -1)
        turned = (one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos())
        whole = torch.stack(turned, -1).flatten(-2) if neighbours else torch.cat(turned, -1)
        return torch.cat([whole, rest], -1)


class Text:
    """A text that grows."""

    def __init__(self, model: Reference) -> None:
        self.model = model
        self.ids: list[Tensor] = []
        self.mask: list[Tensor] = []

    def feed(self, input_ids: Any, attention_mask: Any) -> Any:
        """Add tokens, numpy [B, T]; return their logits as numpy."""
        self.ids.append(torch.from_numpy(np.asarray(input_ids)))
        self.mask.append(torch.from_numpy(np.asarray(attention_mask)))
        logits = self.model.logits(torch.cat(self.ids, 1), torch.cat(self.mask, 1))
        return logits[:, -input_ids.shape[1] :].numpy()


def _bias(real: Tensor, window: int | None) -> Tensor:
    """Zero where a query sees a key, else a large negative number [B, 1, T, T]."""
    length = real.shape[1]
    ahead = torch.arange(length)[:, None] - torch.arange(length)
    seen = (ahead >= 0) & (ahead < (window or length))
    shown = seen & real[:, None, :] | torch.eye(length, dtype=torch.bool)  # padding sees itself
    return as_bias(shown)[:, None]

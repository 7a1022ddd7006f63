"""What one attention site shows on calibration text: the tensors every fit of the MLA pass works on.

Shape letters: N sequences, T positions, Q sampled queries per sequence, H query heads, G key-value groups,
d query/key head_dim, e value head_dim, D hidden size, n rotary frequencies.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 24
"""Logits held at once by the chunked loops (elements): bounds memory, keeps matrix products large."""


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of one site: which dims form a plane, and how fast each plane turns.

    Attributes:
        real, imaginary: head dims of each plane [n].
        columns: last-dim column of cos/sin that each plane uses [n].
        frequency: radians per position [n], float64.
        scaling: factor that cos and sin carry (yarn, longrope), 1.0 elsewhere.
    """

    real: Tensor
    imaginary: Tensor
    columns: Tensor
    frequency: Tensor
    scaling: float


@dataclass
class LayerSample:
    """Calibration tensors of one attention site, on one device, float32 unless said otherwise.

    Attributes:
        query: sampled queries before rope, after bias and norm [N, H, Q, d].
        positions: their positions in the sequence [N, Q], int64.
        key: keys before rope, after bias and norm [N, G, T, d].
        value: values [N, G, T, e].
        cos, sin: rotary tables [T, c], or None for a layer without rope.
        rotation: rotary facts, or None.
        output_weight: o_proj's weight by head [H, D, e].
        scale, softcap: of the logits.
        sinks: sink logit per head [H], or None.
        window: tokens a query sees, itself included, or None for all.
        fixed_output: o_proj must stay as it is, since a gate stands between attention and o_proj.
    """

    query: Tensor
    positions: Tensor
    key: Tensor
    value: Tensor
    cos: Tensor | None
    sin: Tensor | None
    rotation: Rotation | None
    output_weight: Tensor
    scale: float
    softcap: float | None = None
    sinks: Tensor | None = None
    window: int | None = None
    fixed_output: bool = False

    rotated_query: Tensor = field(init=False)
    rotated_key: Tensor = field(init=False)
    target: Tensor = field(init=False)
    token_weight: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Rotate queries and keys, then take the teacher's output and the attention each token receives."""
        self.rotated_key = self._rotate(self.key, None)
        self.rotated_query = self._rotate(self.query, self.positions)
        self.target, self.token_weight = self._teacher()

    @property
    def groups(self) -> int:
        """Key-value groups G."""
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.query.shape[1]

    @property
    def source(self) -> Tensor:
        """What is projected into the cache: keys then values, groups flattened [N, T, G d + G e]."""
        return torch.cat([self.key.transpose(1, 2).flatten(2), self.value.transpose(1, 2).flatten(2)], -1)

    def chunks(self) -> Iterator[slice]:
        """Slices over sequences that keep one block of logits below `CHUNK_ELEMENTS`."""
        n, h, q = self.query.shape[:3]
        step = max(1, CHUNK_ELEMENTS // (h * q * self.key.shape[2]))
        for start in range(0, n, step):
            yield slice(start, min(start + step, n))

    def hidden(self, part: slice) -> Tensor:
        """Mask of keys that a sampled query may not see (future, or behind the window) [N', 1, Q, T], bool."""
        return ~self._visible(part)[:, None]

    def _visible(self, part: slice) -> Tensor:
        steps = torch.arange(self.key.shape[2], device=self.key.device)
        behind = self.positions[part, :, None] - steps
        return behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)

    def thinned(self, queries: int) -> LayerSample:
        """The same site seen by at most `queries` of the sampled queries per sequence, evenly spread."""
        count = self.query.shape[2]
        if queries >= count:
            return self
        keep = torch.linspace(0, count - 1, queries, device=self.query.device).round().long()
        return dataclasses.replace(self, query=self.query[:, :, keep], positions=self.positions[:, keep])

    def teacher_logits(self, part: slice) -> Tensor:
        """The source's scaled logits before softcap and mask [N', H, Q, T]."""
        query, key = self.rotated_query[part], self.rotated_key[part]
        n, h, q, d = query.shape
        grouped = query.reshape(n, self.groups, -1, d)
        return (grouped @ key.transpose(-1, -2)).reshape(n, h, q, -1) * self.scale

    def probabilities(self, logits: Tensor, part: slice) -> Tensor:
        """Attention weights of logits [N', H, Q, T]: softcap, causal mask, sinks, softmax."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = logits.masked_fill(self.hidden(part), -torch.inf)
        if self.sinks is None:
            return logits.softmax(-1)
        sink = self.sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]

    def mix_values(self, probabilities: Tensor, part: slice) -> Tensor:
        """Attention output of the source's values under given weights [N', H, Q, e]."""
        n, h, q, t = probabilities.shape
        grouped = probabilities.reshape(n, self.groups, -1, t)
        return (grouped @ self.value[part]).reshape(n, h, q, -1)

    def project(self, heads: Tensor) -> Tensor:
        """Apply o_proj without its bias: [N', H, Q, e] -> [N', Q, D]."""
        return torch.einsum("nhqe,hDe->nqD", heads, self.output_weight)

    def _rotate(self, states: Tensor, positions: Tensor | None) -> Tensor:
        """Source rope on [N, heads, length, d]; positions None means 0..T-1."""
        if self.rotation is None or self.cos is None or self.sin is None:
            return states
        columns = self.rotation.columns
        cos, sin = self.cos[:, columns], self.sin[:, columns]
        if positions is not None:
            cos, sin = cos[positions][:, None], sin[positions][:, None]
        re, im = states[..., self.rotation.real], states[..., self.rotation.imaginary]
        out = states.clone()
        out[..., self.rotation.real] = re * cos - im * sin
        out[..., self.rotation.imaginary] = im * cos + re * sin
        return out

    def _teacher(self) -> tuple[Tensor, Tensor]:
        """The source's attention output on the sampled queries, and the mean attention each token receives.

        The mass a token receives is divided by the number of sampled queries that can see it, and its mean is 1.
        """
        mass = torch.zeros(self.key.shape[0], self.key.shape[2], device=self.key.device)
        target = []
        for part in self.chunks():
            weights = self.probabilities(self.teacher_logits(part), part)
            mass[part] = weights.sum((1, 2))
            target.append(self.project(self.mix_values(weights, part)))
        seen = self._visible(slice(None)).sum(1).clamp(min=1)
        received = mass / seen
        return torch.cat(target), received / received.mean()

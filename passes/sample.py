"""What one attention site shows on calibration text: the tensors that every closed-form fit works on.

Calibration windows may have several lengths; a site then has one `LayerSample` for each, and fits take them all.

Shape letters: N sequences, T positions, Q sampled queries per sequence, H query heads, G key-value groups,
d query/key head_dim, e value head_dim, D hidden size, n rotary frequencies.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnedit.compiler.capture.rope import turn
from attnedit.passes.solve import second_moment

CHUNK_ELEMENTS = 1 << 22
"""Logits held at once by the chunked loops (elements): bounds memory, keeps matrix products large."""
GPU_CHUNKS = 16
"""How many times as many on a GPU, where a chunk of few would take less time than its launches: 256 MiB of floats."""
QUERY_BLOCKS = 8
"""Blocks of neighbouring queries: each meets only keys that it can see, which saves close to half of all logits."""

KEY_MULTIPLE = 8
"""Keys of a block come in multiples of this where there are as many: GPUs multiply rows of odd lengths much slower."""

FIRST_POSITIONS = 4
"""Positions at the start of a sequence whose queries are always among those sampled."""


@dataclass(frozen=True)
class Rotation:
    """Rotary embedding of one site: which dims form a plane, and how fast each plane turns.

    Attributes:
        real, imaginary: head dims of each plane [n].
        columns: last-dim column of cos/sin that each plane uses [n].
        frequency: radians per position [n], float64.
        scaling: factor that cos and sin carry (yarn, longrope), 1.0 elsewhere.
        context: positions that the model is to be served with: no two tokens are further apart.
    """

    real: Tensor
    imaginary: Tensor
    columns: Tensor
    frequency: Tensor
    scaling: float
    context: int


@dataclass(frozen=True)
class Chunk:
    """One block of logits: some queries of some sequences, against every key that one of them can see."""

    sequences: slice
    queries: slice
    keys: slice


@dataclass
class LayerSample:
    """Calibration tensors of one attention site in windows of one length, on one device, float32 unless said otherwise.

    Attributes:
        query: sampled queries before rope, after bias and norm [N, H, Q, d].
        positions: their positions, the same in every sequence, ascending [Q], int64.
        key: keys before rope, after bias and norm [N, G, T, d].
        value: values [N, G, T, e].
        cos, sin: rotary tables [T, c], or None for a layer without rope.
        rotation: rotary facts, or None.
        output_weight: o_proj's weight by head [H, D, e].
        scale, softcap: of the logits.
        sinks: sink logit per head [H], or None.
        window: tokens a query sees, itself included, or None for all.
        bias: what the source adds to the logits of each head beyond causality (ALiBi, a window of its own),
            [H or 1, Q, T], or None.
        fixed_output: o_proj must stay as it is, since a gate stands between attention and o_proj.
        hidden: what queries, keys and values are computed from [N, T, D], or None where nothing asks for it.
        teacher: the sample whose attention is to be met, where queries, keys and values here stand in for its own;
            None where they are its own.
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
    bias: Tensor | None = None
    fixed_output: bool = False
    hidden: Tensor | None = None
    teacher: LayerSample | None = None

    @property
    def groups(self) -> int:
        """Key-value groups G."""
        return self.key.shape[1]

    @property
    def heads(self) -> int:
        """Query heads H."""
        return self.query.shape[1]

    @cached_property
    def source(self) -> Tensor:
        """What is projected into the cache: keys then values, groups flattened [N, T, G d + G e]."""
        return torch.cat([self.key.transpose(1, 2).flatten(2), self.value.transpose(1, 2).flatten(2)], -1)

    @cached_property
    def target(self) -> Tensor:
        """The source's attention output after o_proj, without its bias, on the sampled queries [N, Q, D]."""
        return self._teacher[0]

    @cached_property
    def token_weight(self) -> Tensor:
        """Attention that each token receives, per sampled query that can see it; mean 1 [N, T]."""
        return self._teacher[1]

    def chunks(self) -> list[Chunk]:
        """Blocks that together hold every visible pair once, of at most `CHUNK_ELEMENTS` logits (more on a GPU)."""
        n, h, q = self.query.shape[:3]
        most = CHUNK_ELEMENTS * (1 if self.query.device.type == "cpu" else GPU_CHUNKS)
        edges = torch.linspace(0, q, min(QUERY_BLOCKS, q) + 1).round().int().tolist()
        result, positions = [], self.positions.tolist()  # one wait for the device
        for first, end in itertools.pairwise(edges):
            low, high = positions[first], positions[end - 1] + 1
            start = 0 if self.window is None else max(0, low - self.window + 1)
            keys = slice(start - start % KEY_MULTIPLE, min(high + -high % KEY_MULTIPLE, self.key.shape[2]))
            step = max(1, most // (h * (end - first) * (keys.stop - keys.start)))
            result += [Chunk(slice(i, min(i + step, n)), slice(first, end), keys) for i in range(0, n, step)]
        return result

    def visible(self, chunk: Chunk) -> Tensor:
        """Which keys of the chunk each of its queries may see (not future, not behind the window) [Q', T'], bool."""
        steps = torch.arange(chunk.keys.start, chunk.keys.stop, device=self.key.device)
        behind = self.positions[chunk.queries, None] - steps
        return behind >= 0 if self.window is None else (behind >= 0) & (behind < self.window)

    def thinned(self, queries: int) -> LayerSample:
        """The same site seen by at most `queries` of the sampled queries: the first few, the rest evenly spread."""
        count, first = len(self.positions), min(FIRST_POSITIONS, queries)
        if queries >= count:
            return self
        rest = torch.arange(queries - first, device=self.query.device)
        rest = first + ((rest + 0.5) * (count - first) / max(len(rest), 1)).long()
        keep = torch.cat([torch.arange(first, device=rest.device), rest])
        return dataclasses.replace(
            self,
            query=self.query[:, :, keep],
            positions=self.positions[keep],
            bias=None if self.bias is None else self.bias[:, keep],
            teacher=None if self.teacher is None else self.teacher.thinned(queries),
        )

    def teacher_logits(self, chunk: Chunk) -> Tensor:
        """The source's scaled logits before softcap and mask [N', H, Q', T']."""
        query, key = self._rotated
        query, key = query[chunk.sequences, :, chunk.queries], key[chunk.sequences, :, chunk.keys]
        n, h, q, d = query.shape
        grouped = query.reshape(n, self.groups, -1, d) * self.scale
        return (grouped @ key.transpose(-1, -2)).view(n, h, q, -1)

    def masked(self, logits: Tensor, chunk: Chunk) -> Tensor:
        """Logits [N', H, Q', T'] after softcap and bias, -inf where a query does not see a key."""
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        if self.bias is not None:
            logits = logits + self.bias[:, chunk.queries, chunk.keys]
        return logits.masked_fill(~self.visible(chunk), -torch.inf)

    def normalised(self, logits: Tensor) -> Tensor:
        """Attention weights of masked logits [N', H, Q', T']: softmax, of which the source's sinks take a part."""
        if self.sinks is None:
            return logits.softmax(-1)
        sink = self.sinks.view(1, -1, 1, 1).expand(*logits.shape[:-1], 1)
        return torch.cat([logits, sink], -1).softmax(-1)[..., :-1]

    def probabilities(self, logits: Tensor, chunk: Chunk) -> Tensor:
        """Attention weights of logits [N', H, Q', T']: softcap, causal mask, sinks, softmax."""
        return self.normalised(self.masked(logits, chunk))

    def mix_values(self, probabilities: Tensor, chunk: Chunk) -> Tensor:
        """Attention output of the source's values under given weights [N', H, Q', e]."""
        n, h, q, t = probabilities.shape
        grouped = probabilities.reshape(n, self.groups, -1, t)
        return (grouped @ self.value[chunk.sequences, :, chunk.keys]).view(n, h, q, -1)

    def project(self, heads: Tensor) -> Tensor:
        """Apply o_proj without its bias: [N', H, Q', e] -> [N', Q', D]."""
        return torch.einsum("nhqe,hDe->nqD", heads, self.output_weight)

    @cached_property
    def _rotated(self) -> tuple[Tensor, Tensor]:
        """Queries and keys after rope."""
        return self._rotate(self.query, self.positions), self._rotate(self.key, None)

    def _rotate(self, states: Tensor, positions: Tensor | None) -> Tensor:
        """Source rope on [N, heads, length, d]; positions None means 0..T-1."""
        if self.rotation is None or self.cos is None or self.sin is None:
            return states
        columns = self.rotation.columns
        cos, sin = self.cos[:, columns], self.sin[:, columns]
        if positions is not None:
            cos, sin = cos[positions], sin[positions]
        return turn(states, self.rotation.real, self.rotation.imaginary, (cos, sin))

    @cached_property
    def _teacher(self) -> tuple[Tensor, Tensor]:
        if self.teacher is not None:
            return self.teacher._teacher
        mass = torch.zeros(self.key.shape[0], self.key.shape[2], device=self.key.device)
        seen = torch.zeros(self.key.shape[2], device=self.key.device)
        target = mass.new_empty(len(mass), len(self.positions), self.output_weight.shape[1])
        for chunk in self.chunks():
            weights = self.probabilities(self.teacher_logits(chunk), chunk)
            mass[chunk.sequences, chunk.keys] += weights.sum((1, 2))
            if chunk.sequences.start == 0:
                seen[chunk.keys] += self.visible(chunk).sum(0)
            target[chunk.sequences, chunk.queries] = self.project(self.mix_values(weights, chunk))
        received = mass / seen.clamp(min=1)
        return target, received / received.mean()


def query_moment(samples: Sequence[LayerSample]) -> Tensor:
    """Second moment of the queries of each head [H, d, d], float64."""
    rows = sum(sample.query.shape[0] * sample.query.shape[2] for sample in samples)
    moments = [second_moment(sample.query.transpose(0, 1).flatten(1, 2)) for sample in samples]
    return torch.stack(moments).sum(0) / rows


def token_shares(samples: Sequence[LayerSample]) -> list[Tensor]:
    """Weight of each token by the attention that it receives, [N, T] for each sample, summing to 1 over all."""
    total = sum(float(sample.token_weight.sum()) for sample in samples)
    return [sample.token_weight / total for sample in samples]


def weighted_moment(states: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Second moment [k, k] of all rows of states [N, T, k], with weights [N, T], float64."""
    pairs = zip(states, weights, strict=True)
    return torch.stack([second_moment(rows.flatten(0, 1), weight.flatten()) for rows, weight in pairs]).sum(0)

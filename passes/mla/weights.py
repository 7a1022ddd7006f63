"""The weights of one MLA layer while they are being fitted, in the form the least-squares problems are linear in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attnedit.passes.sample import Chunk, LayerSample
from attnedit.targets.attention.mla.rotary import rotate


@dataclass(frozen=True)
class Factors:
    """One MLA layer; y is the flattened keys and values of a token (`LayerSample.source`, E values).

    Attributes:
        latent: P [r, E], latent c = P y.
        slots: S [2 s, E], rotary slots before rotation, rows [real | imaginary].
        columns: cos/sin column of each slot [s], int64.
        query_latent: B [H, d, r], logit += q . B c (W_UK of DeepSeek-V2, arXiv 2405.04434, eq. 10).
        query_slots: R [H, 2 s, d], logit += rotate(R q) . rotate(S y).
        output: F [H, D, r], attention output = sum_h F_h sum_n p c: the product W_O,h W_UV,h, of rank <= v_head_dim.
    """

    latent: Tensor
    slots: Tensor
    columns: Tensor
    query_latent: Tensor
    query_slots: Tensor
    output: Tensor

    @property
    def rank(self) -> int:
        """Latent size r."""
        return self.latent.shape[0]


def slot_tables(sample: LayerSample, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of the slots [T, s]."""
    if sample.cos is None or sample.sin is None:
        empty = sample.key.new_zeros(sample.key.shape[2], 0)
        return empty, empty
    return sample.cos[:, columns], sample.sin[:, columns]


def query_tables(sample: LayerSample, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Cos and sin of the slots where queries were sampled [Q, s]."""
    cos, sin = slot_tables(sample, columns)
    return cos[sample.positions], sin[sample.positions]


def query_features(sample: LayerSample, query_latent: Tensor, query_slots: Tensor, columns: Tensor) -> Tensor:
    """Query side of the logits of all sampled queries [N, H, Q, r + 2 s], scaled."""
    query = sample.query * sample.scale
    turned = rotate(query @ query_slots.transpose(-1, -2), *query_tables(sample, columns))
    return torch.cat([query @ query_latent, turned], -1)


def key_features(sample: LayerSample, latent: Tensor, slots: Tensor, columns: Tensor) -> Tensor:
    """Cached values of all tokens [N, T, r + 2 s]."""
    turned = rotate(sample.source @ slots.T, *slot_tables(sample, columns))
    return torch.cat([sample.source @ latent.T, turned], -1)


def score(queries: Tensor, keys: Tensor) -> Tensor:
    """Logits [N', H, Q', T'] of query features [N', H, Q', w] and cached values [N', T', w], heads folded into rows."""
    n, h, q, w = queries.shape
    return (queries.reshape(n, h * q, w) @ keys.transpose(-1, -2)).view(n, h, q, -1)


def mix(weights: Tensor, states: Tensor) -> Tensor:
    """Attention-weighted mean of shared states: [N', H, Q', T'] x [N', T', w] -> [N', H, Q', w]."""
    n, h, q, t = weights.shape
    return (weights.reshape(n, h * q, t) @ states).view(n, h, q, -1)


def latent_reads(samples: Sequence[LayerSample], factors: Factors) -> Iterator[tuple[LayerSample, Chunk, Tensor]]:
    """What each head reads from the latent under the layer's own attention, sum_n p c [N', H, Q', r], by chunk."""
    for sample in samples:
        keys = key_features(sample, factors.latent, factors.slots, factors.columns)
        queries = query_features(sample, factors.query_latent, factors.query_slots, factors.columns)
        for chunk in sample.chunks():
            cached = keys[chunk.sequences, chunk.keys]
            weights = sample.probabilities(score(queries[chunk.sequences, :, chunk.queries], cached), chunk)
            yield sample, chunk, mix(weights, cached[..., : factors.rank])


def output_error(samples: Sequence[LayerSample], factors: Factors) -> float:
    """Energy of the attention output's error on the sampled queries, as a fraction of the output's energy."""
    error = energy = 0.0
    for sample, chunk, reads in latent_reads(samples, factors):
        target = sample.target[chunk.sequences, chunk.queries]
        output = torch.einsum("nhqr,hDr->nqD", reads, factors.output)
        error += float((output - target).square().sum())
        energy += float(target.square().sum())
    return error / max(energy, torch.finfo(torch.float32).tiny)

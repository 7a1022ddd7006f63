"""Random calibration samples of one attention layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnedit.passes.mla.weights import Factors, key_features, mix, query_features, score
from attnedit.passes.sample import LayerSample, Rotation


def layer_sample(
    *,
    sequences: int = 3,
    length: int = 12,
    queries: int | None = None,
    heads: int = 4,
    groups: int = 2,
    head_dim: int = 8,
    v_head_dim: int = 6,
    rotary_dims: int = 8,
    hidden: int = 10,
    latents: int | None = None,
    seed: int = 0,
    **options: Any,
) -> LayerSample:
    """A layer whose keys and values come from `latents` hidden causes, all that are needed unless told."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    causes = latents or groups * (head_dim + v_head_dim)
    state = normal(sequences, length, causes)
    key = (state @ normal(causes, groups * head_dim) / causes**0.5).view(sequences, length, groups, -1)
    value = (state @ normal(causes, groups * v_head_dim) / causes**0.5).view(sequences, length, groups, -1)
    count = queries or length
    positions = torch.randperm(length, generator=generator)[:count].sort().values
    planes = rotary_dims // 2
    rotation = cos = sin = None
    if planes:
        frequency = 100.0 ** (-torch.arange(planes, dtype=torch.float64) / planes)
        angle = torch.arange(length)[:, None] * frequency
        cos, sin = angle.cos().float(), angle.sin().float()
        index = torch.arange(planes)
        rotation = Rotation(index, index + planes, index, frequency, 1.0, 512)
    return LayerSample(
        query=normal(sequences, heads, count, head_dim),
        positions=positions,
        key=key.transpose(1, 2).contiguous(),
        value=value.transpose(1, 2).contiguous(),
        cos=cos,
        sin=sin,
        rotation=rotation,
        output_weight=normal(heads, hidden, v_head_dim),
        scale=head_dim**-0.5,
        **options,
    )


def new_logits(sample: LayerSample, factors: Factors) -> list[Tensor]:
    """Logits of the rewritten layer by chunk [N', H, Q', T'], differentiable in every factor."""
    keys = key_features(sample, factors.latent, factors.slots, factors.columns)
    queries = query_features(sample, factors.query_latent, factors.query_slots, factors.columns)
    return [
        score(queries[chunk.sequences, :, chunk.queries], keys[chunk.sequences, chunk.keys])
        for chunk in sample.chunks()
    ]


def new_output(sample: LayerSample, factors: Factors, attention: list[Tensor]) -> list[Tensor]:
    """Output of the rewritten layer by chunk [N', Q', D] at given attention weights."""
    keys = key_features(sample, factors.latent, factors.slots, factors.columns)
    return [
        torch.einsum("nhqr,hDr->nqD", mix(p, keys[chunk.sequences, chunk.keys][..., : factors.rank]), factors.output)
        for chunk, p in zip(sample.chunks(), attention, strict=True)
    ]

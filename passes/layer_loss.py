"""What each layer's new attention costs: the loss of the model in which that layer alone has it, measured.

The loss is the divergence KL(source || edited) of the next-token distributions. The hidden states before a layer do
not change with it, so only the layers from there on are run again: L layers cost (L + 3) / 2 forward passes per token.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.progress import Progress, silent
from attnedit.compiler.sites import AttentionSite
from attnedit.compiler.stream import Walk, decoder_layers, replaced_forward

SEQUENCES = 4
"""Calibration windows that the loss is measured on."""
_CHUNK = 128
"""Positions whose distributions are held in float32 at once."""


@torch.no_grad()
def loss_increases(
    model: PreTrainedModel,
    sites: list[AttentionSite],
    graphs: Mapping[str, fx.GraphModule],
    windows: Tensor,
    *,
    sequences: int = SEQUENCES,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean divergence per token, in nats, of the model with one layer's attention replaced.

    Args:
        model: the live source in eval mode; left as it was.
        sites: the attention sites to try.
        graphs: the replacement of each, by the site's name.
        windows: token ids [N, T], int64, no padding; the first `sequences` are used.
        sequences: how many to measure on.
        progress: told of every layer of every sequence.

    Returns:
        Divergence by the site's name.

    Raises:
        CaptureError: the layers exchange more than hidden states.
    """
    layers, by_layer = decoder_layers(model, sites)
    windows = windows[:sequences]
    report = progress or silent
    total = dict.fromkeys((site.name for site in sites), 0.0)
    steps, done = len(windows) * len(sites), 0
    report("measure layers", done, steps)
    for row in windows.split(1):
        walk = Walk(model, layers, row)
        expected = walk.logits()[0]
        for index in range(max(by_layer) + 1):
            if site := by_layer.get(index):
                with replaced_forward(model.get_submodule(site.name), graphs[site.name].forward):
                    total[site.name] += _divergence(expected, walk.logits()[0]) / len(windows)
                done += 1
                report("measure layers", done, steps)
            walk.advance()
    return total


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over positions of KL(softmax expected || softmax found), logits [T, V]."""
    total = 0.0
    for p, q in zip(expected.split(_CHUNK), found.split(_CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += float((log_p.exp() * (log_p - log_q)).sum())
    return total / len(expected)

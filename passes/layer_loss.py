"""What each layer's new attention costs: the loss of the model in which that layer alone has it, measured.

The loss is the divergence KL(source || edited) of the next-token distributions; without a language-model head, what the
last hidden states are off by. The hidden states before a layer do not change with it, so only the layers from there on
are run again: L layers cost (L + 3) / 2 forward passes per token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.model_inputs import is_given
from attnedit.compiler.execution.stream import Walk, decoder_layers, replaced_forward
from attnedit.compiler.model_io.heads import has_language_head
from attnedit.compiler.progress import Progress, silent
from attnedit.passes.beginnings import without_beginnings
from attnedit.passes.repeats import with_repeats

MEASURED = 8
"""Windows of the shortest length that losses are measured on; of longer ones see `attnedit.passes.site_sample`."""
_CHUNK = 128
"""Positions whose distributions are held in float32 at once."""


@torch.no_grad()
def loss_increases(
    model: PreTrainedModel,
    sites: list[AttentionSite],
    graphs: Mapping[str, fx.GraphModule],
    rows: Sequence[Tensor],
    *,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Mean divergence per token of the model with one layer's attention replaced.

    Args:
        model: the live source in eval mode; left as it was.
        sites: the attention sites to try.
        graphs: the replacement of each, by the site's name.
        rows: windows to measure on, token ids [1, T] of any lengths, int64, no padding; see `measured_rows`.
        progress: told of every layer of every sequence.

    Returns:
        Divergence by the site's name: in nats, or for a model without a language-model head as a fraction of the power
        of its last hidden states.

    Raises:
        CaptureError: the layers exchange more than hidden states.
    """
    layers, by_layer = decoder_layers(model, sites)
    report = progress or silent
    divergence = _divergence if has_language_head(model) else _error
    total = dict.fromkeys((site.name for site in sites), 0.0)
    steps, done = len(rows) * len(sites), 0
    report("measure layers", done, steps)
    for row in rows:
        walk = Walk(model, layers, row)
        expected = walk.logits()[0]
        for index in range(max(by_layer) + 1):
            if site := by_layer.get(index):
                with replaced_forward(model.get_submodule(site.name), graphs[site.name].forward):
                    total[site.name] += divergence(expected, walk.logits()[0]) / len(rows)
                done += 1
                report("measure layers", done, steps)
            walk.advance()
    return total


def measured_rows(windows: Sequence[Tensor], seed: int, long_rows: int) -> tuple[list[Tensor], list[Tensor]]:
    """Split calibration windows into those that layers are fitted on and those that their losses are measured on.

    Passages come again in the measured long windows, thousands of tokens later, and in every second short one: a few
    layers do what copying takes (induction heads, arXiv 2209.11895), and ordinary text hardly shows what it costs to
    lose them. Where images go with a window, its tokens stay where they are.

    Args:
        windows: token ids [N, T] of each length T, longest first; `beginnings` are for fitting alone.
        seed: of the repeated passages.
        long_rows: windows of each longer length to measure on.

    Returns:
        What is left for fitting, of each length; rows [1, T] to measure on. Of a length with one window both have it.
    """
    generator = torch.Generator().manual_seed(seed)
    left, rows = list[Tensor](), list[Tensor]()
    windows, begun = without_beginnings(windows)
    for part in windows:
        long = len(windows) > 1 and part is not windows[-1]
        held = min(long_rows if long else MEASURED, max(1, len(part) // 3))
        left.append(part[: len(part) - held] if len(part) > held else part)
        for index, row in enumerate(part[len(part) - held :].split(1)):
            repeated = (long or index % 2 == 1) and not is_given(row)
            rows.append(with_repeats(row.cpu(), generator).to(row.device) if repeated else row)
    return [*left, *begun], rows


def _error(expected: Tensor, found: Tensor) -> float:
    """Power of the difference of hidden states [T, D], as a fraction of that of what is expected."""
    expected, found = expected.double(), found.double()
    return float((expected - found).square().sum() / expected.square().sum())


def _divergence(expected: Tensor, found: Tensor) -> float:
    """Mean over positions of KL(softmax expected || softmax found), logits [T, V]."""
    total = expected.new_zeros((), dtype=torch.float64)
    for p, q in zip(expected.split(_CHUNK), found.split(_CHUNK), strict=True):
        log_p, log_q = p.float().log_softmax(-1), q.float().log_softmax(-1)
        total += (log_p.exp() * (log_p - log_q)).sum()
    return float(total) / len(expected)

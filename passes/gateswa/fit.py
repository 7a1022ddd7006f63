"""One attention site gets a window: sinks and output projection in closed form, and the graph that has them in it.

What a query attended outside the window is gone. A virtual key with logit b and value v stands for it: with o_in what
is left and z_in its softmax denominator, the new output is (1 - s) o_in + s v with s = sigmoid(b - log z_in). Per head
b minimises the error of the output in the metric of the output projection, v is the least-squares solution given b,
and the two alternate. The output projection is then regressed on the new outputs (docs/method.md, GateSWA).

Shape letters as in `attnedit.passes.sample`, and M sampled queries of all sequences.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.passes.beginnings import begins
from attnedit.passes.sample import LayerSample
from attnedit.passes.site_sample import output_weight
from attnedit.passes.solve import ridge_regression
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE, doubled, gateswa_graph

FIRST_SHARE = 0.5
"""Share of the first token of each window in what sink logit and value are chosen by.

Nothing is cut from it, so that a sink can only do it harm, and many models make it the token that all others attend
to: where its hidden states miss that, every later token is off (docs/notebook/2026-11-windows.md)."""
OUTPUT_RIDGE = 0.5
"""Ridge of the output regression towards the source's weights, as a fraction of the mean diagonal of its Gram matrix:
this times features per sampled query."""
VALUE_RIDGE = 1e-3
"""Ridge of a sink value, as a fraction of the mean diagonal of its matrix."""
SINK_ROUNDS = 4
"""Alternations of sink logit and sink value."""
GRID = 33
"""Sink logits tried at once per head; each of `GRID_ROUNDS` looks between the neighbours of the best one."""
GRID_ROUNDS = 3
ROWS = 1024
"""Queries at once of the output regression."""


@dataclass(frozen=True)
class WindowFit:
    """Weights of one windowed layer.

    Attributes:
        sink_logit: [H], or None.
        sink_value: [G, e], or None.
        output_weight: o_proj by head [H, D, e]; None where it stays.
        output_error: energy of the output's error as a fraction of the output's, on the sampled queries.
    """

    sink_logit: Tensor | None
    sink_value: Tensor | None
    output_weight: Tensor | None
    output_error: float


@dataclass(frozen=True)
class _Heads:
    """Outputs of every head on the sampled queries.

    Attributes:
        whole: the source's [H, M, e].
        inside: with the window and kept sinks only [H, M, e].
        logsumexp: of the logits that `inside` sees, the source's own sinks with them [H, M].
        cut: share of the source's attention that the window takes away [H, M].
        weight: of each query where sinks are fitted [M]; 1, but for the first token of each window.
    """

    whole: Tensor
    inside: Tensor
    logsumexp: Tensor
    cut: Tensor
    weight: Tensor


def fit_window(samples: Sequence[LayerSample], config: GateSWAConfig, refit: bool = True) -> WindowFit:
    """Fit what a windowed layer has beside the source's weights.

    Args:
        samples: the source's queries, keys and values on calibration data: windows of each length, then
            `attnedit.passes.beginnings`, which count in the fit and not in its error.
        config: shape of the windowed attention.
        refit: regress the output projection, unless a gate of the source keeps it fixed.
    """
    sample = samples[0]
    heads = _head_outputs(samples, config)
    logit = value = None
    output = heads.inside
    if config.sink_logit:
        logit, value = _fit_sink(sample, heads, config.sink_value)
        share = torch.sigmoid(logit[:, None] - heads.logsumexp)[..., None]
        output = (1 - share) * output
        if value is not None:
            output = output + share * _per_head(value, sample.heads)
    longest = max(part.key.shape[2] for part in samples)
    windows = [part for part in samples if not begins(part.key.shape[2], longest)]
    rows = sum(len(part.query) * len(part.positions) for part in windows)
    if refit and not sample.fixed_output:
        weight, error = _refit_output(sample, heads.whole, output, rows)
        return WindowFit(logit, value, weight, error)
    wrong = _project(sample, (output - heads.whole)[:, :rows]).double().square().sum()
    energy = _project(sample, heads.whole[:, :rows]).double().square().sum().clamp(min=1e-30)
    return WindowFit(logit, value, None, float(wrong / energy))


def _head_outputs(samples: Sequence[LayerSample], config: GateSWAConfig) -> _Heads:
    parts = [_outputs_of_length(sample, config) for sample in samples]
    whole, inside, logsumexp, cut = (
        torch.cat([part[name].transpose(0, 1).flatten(1, 2) for part in parts], 1)
        for name in ("whole", "inside", "logsumexp", "cut")
    )
    first = torch.cat([(sample.positions == 0).repeat(len(sample.query)) for sample in samples])
    others = (~first).sum() / first.sum().clamp(min=1)
    weight = torch.where(first, others * FIRST_SHARE / (1 - FIRST_SHARE), 1.0)
    return _Heads(whole, inside, logsumexp, cut, weight)


def _project(sample: LayerSample, heads: Tensor) -> Tensor:
    """Apply o_proj without its bias: [H, M, e] -> [M, D]."""
    return sample.project(heads[None])[0]


def _outputs_of_length(sample: LayerSample, config: GateSWAConfig) -> dict[str, Tensor]:
    """The fields of `_Heads` in windows of one length, [N, H, Q, e] or [N, H, Q]."""
    n, h, q = sample.query.shape[:3]
    whole, inside = (sample.value.new_empty(n, h, q, sample.value.shape[-1]) for _ in range(2))
    logsumexp, cut = (sample.value.new_empty(n, h, q) for _ in range(2))
    for chunk in sample.chunks():
        at = (chunk.sequences, slice(None), chunk.queries)
        logits = sample.masked(sample.teacher_logits(chunk), chunk)
        weights = sample.normalised(logits)
        whole[at] = sample.mix_values(weights, chunk)
        steps = torch.arange(chunk.keys.start, chunk.keys.stop, device=logits.device)
        behind = sample.positions[chunk.queries, None] - steps
        hidden = (behind >= config.sliding_window) & (steps >= config.sink_tokens)
        cut[at] = (weights * hidden).sum(-1)
        logits = logits.masked_fill_(hidden, -torch.inf)
        inside[at] = sample.mix_values(sample.normalised(logits), chunk)
        seen = logits.logsumexp(-1)
        if sample.sinks is not None:
            seen = torch.logaddexp(seen, sample.sinks.view(1, -1, 1))
        logsumexp[at] = seen
    return {"whole": whole, "inside": inside, "logsumexp": logsumexp, "cut": cut}


def _fit_sink(sample: LayerSample, heads: _Heads, with_value: bool) -> tuple[Tensor, Tensor | None]:
    """Sink logit [H] and, if wanted, sink value [G, e]."""
    metric = sample.output_weight.mT @ sample.output_weight
    value = heads.whole.new_zeros(sample.groups, heads.whole.shape[-1])
    if not with_value:
        return _best_logit(metric, heads, _per_head(value, sample.heads)), None
    value = _best_value(metric, heads, heads.cut, sample.groups)
    logit = _best_logit(metric, heads, _per_head(value, sample.heads))
    for _ in range(SINK_ROUNDS):
        share = torch.sigmoid(logit[:, None] - heads.logsumexp)
        value = _best_value(metric, heads, share, sample.groups)
        logit = _best_logit(metric, heads, _per_head(value, sample.heads))
    return logit, value


def _best_logit(metric: Tensor, heads: _Heads, value: Tensor) -> Tensor:
    """The b of each head with the least weighted sum over queries of |W (o_in + s (v - o_in) - o)|^2 [H]."""
    toward = value - heads.inside
    pulled = toward @ metric
    linear = 2 * ((heads.inside - heads.whole) * pulled).sum(-1) * heads.weight
    square = (toward * pulled).sum(-1) * heads.weight
    low = heads.logsumexp.amin(1) - 12.0  # a share of 6e-6: none
    high = heads.logsumexp.amax(1) + 12.0
    steps = torch.linspace(0, 1, GRID, device=low.device)
    index = torch.arange(len(low), device=low.device)
    best = low
    for _ in range(GRID_ROUNDS):
        tried = low + steps[:, None] * (high - low)  # [GRID, H]
        share = (torch.sigmoid(row[:, None] - heads.logsumexp) for row in tried)
        cost = torch.stack([(s * (linear + s * square)).double().sum(1) for s in share])
        at = cost.argmin(0)
        best = tried[at, index]
        low, high = tried[(at - 1).clamp(min=0), index], tried[(at + 1).clamp(max=GRID - 1), index]
    return best


def _best_value(metric: Tensor, heads: _Heads, share: Tensor, groups: int) -> Tensor:
    """The v of each key/value head with the least error, given its share of the attention [G, e]."""
    wanted = heads.whole - (1 - share)[..., None] * heads.inside
    amount = (share.square() * heads.weight).double().sum(1)  # [H]
    moment = torch.einsum("hm,hme->he", share * heads.weight, wanted).double()
    left = (metric.double() * amount[:, None, None]).unflatten(0, (groups, -1)).sum(1)
    right = torch.einsum("hef,hf->he", metric.double(), moment).unflatten(0, (groups, -1)).sum(1)
    ridge = VALUE_RIDGE * left.diagonal(dim1=-2, dim2=-1).mean(-1)
    value, _ = ridge_regression(left, right[..., None], torch.zeros_like(right)[..., None], ridge)
    return value[..., 0].float()


def _refit_output(sample: LayerSample, whole: Tensor, output: Tensor, rows: int) -> tuple[Tensor, float]:
    """Ridge regression of the source's attention output on the new head outputs [H, M, e].

    Returns:
        Weight by head [H, D, e], and the relative energy of the error in the first `rows` of M.
    """
    h, size, e = sample.output_weight.shape
    gram, cross, energy = _moments(sample, whole[:, :rows], output[:, :rows])
    all_gram, all_cross = gram, cross
    if rows < output.shape[1]:
        more_gram, more_cross, _ = _moments(sample, whole[:, rows:], output[:, rows:])
        all_gram, all_cross = gram + more_gram, cross + more_cross
    start = sample.output_weight.permute(0, 2, 1).reshape(h * e, size)
    ridge = OUTPUT_RIDGE * h * e / output.shape[1] * float(all_gram.diagonal().mean())
    fitted = ridge_regression(all_gram, all_cross, start, ridge)[0].float()
    error = energy + float(((gram @ fitted).double() * fitted).sum()) - 2 * float((cross.double() * fitted).sum())
    return fitted.view(h, e, size).transpose(1, 2), max(error, 0.0) / max(energy, 1e-30)


def _moments(sample: LayerSample, whole: Tensor, output: Tensor) -> tuple[Tensor, Tensor, float]:
    """Of features [M, H e] with each other and with what they shall make [M, D]; and the energy of that."""
    h, size, e = sample.output_weight.shape
    gram = torch.zeros(h * e, h * e, device=output.device)
    cross = torch.zeros(h * e, size, device=output.device)
    energy = 0.0
    for new, old in zip(output.split(ROWS, 1), whole.split(ROWS, 1), strict=True):
        features = new.transpose(0, 1).flatten(1)
        target = _project(sample, old)
        gram.addmm_(features.mT, features)
        cross.addmm_(features.mT, target)
        energy += float(target.double().square().sum())
    return gram, cross, energy


def _per_head(value: Tensor, heads: int) -> Tensor:
    """[G, e] -> [H, 1, e]."""
    return value.repeat_interleave(heads // len(value), 0)[:, None]


@torch.no_grad()
def build(model: nn.Module, site: AttentionSite, config: GateSWAConfig, fit: WindowFit) -> fx.GraphModule:
    """Graph of the windowed attention with its weights.

    A gate starts at 0, where it is 1/2, so the output projection's weight is doubled.

    Args:
        model: the live model.
        site: its attention site.
        config: shape of the windowed attention.
        fit: its weights.
    """
    projection: nn.Module | None = None
    if fit.output_weight is not None:
        projection = copy.deepcopy(output_weight(model, site)[1])
        weight = fit.output_weight.transpose(0, 1).flatten(1) / site.o_proj.scale
        own = site.o_proj.weight.removeprefix(f"{site.o_proj.module}.")
        projection.get_parameter(own).copy_(weight.mT if site.o_proj.transposed else weight)
    if config.gate != "none":
        projection = doubled(output_weight(model, site)[1] if projection is None else projection)
    graph = gateswa_graph(model, site, config, projection)
    module = graph.get_submodule(GATESWA_MODULE)
    for name, found in (("sink_logit", fit.sink_logit), ("sink_value", fit.sink_value)):
        if found is not None:
            module.get_parameter(name).copy_(found)
    return graph

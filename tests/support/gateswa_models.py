"""Tiny models with windowed attention in them, and what they are compared with."""

import copy
import functools

import torch
from families import shared
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.caches import with_cache
from attnedit.targets.attention import GateSWA
from attnedit.targets.attention.gateswa.graph import gateswa_config, gateswa_graph
from attnedit.targets.runtime.eager import share_copy, splice, to_attnedit

WINDOW = 3  # below every window of the families
OPTIONS = {"gate": "head", "gate_bias": True, "sink_logit": True, "sink_value": True, "sink_tokens": 2}
FEW = ["llama", "mistral", "gemma3_text", "gpt_oss", "phi", "qwen3_next"]


@functools.cache
def sites(family: str) -> tuple[AttentionSite, ...]:
    return tuple(capture(shared(family)))


@functools.cache
def eager_source(family: str) -> PreTrainedModel:
    """The source with the attention that leaves nothing out: SDPA may drop a softcap."""
    model = share_copy(shared(family))
    model.set_attn_implementation("eager")
    return model


def rewrite(
    family: str, which: str = "all", window: int = WINDOW, model: PreTrainedModel | None = None, **options: object
) -> PreTrainedModel:
    """Put GateSWA with random weights into all sites, the first or the last."""
    model = shared(family) if model is None else model
    chosen = {"all": sites(family), "first": sites(family)[:1], "last": sites(family)[-1:]}[which]
    student = share_copy(model)
    configs, graphs = {}, {}
    torch.manual_seed(2)
    for site in chosen:
        configs[site.name] = gateswa_config(site, window, **(options or OPTIONS))
        graphs[site.name] = gateswa_graph(student, site, configs[site.name])
        for parameter in graphs[site.name].get_submodule("gateswa").parameters():
            nn.init.normal_(parameter, std=0.5)
    splice(student, graphs)
    return to_attnedit(student, configs)


@functools.cache
def shared_rewrite(family: str, which: str = "all") -> PreTrainedModel:
    """One rewritten model for tests that only read it."""
    return rewrite(family, which)


class Masked(nn.Module):
    """The same function over whole sequences, masked from the definition; knows the padding.

    It looks at no mask, except where the source adds biases of its own to it.
    """

    def __init__(self, source: GateSWA, real: Tensor, biased: bool) -> None:
        super().__init__()
        self.source, self.real, self.biased = source, real, biased

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hidden: Tensor,
        mask: Tensor | None,
        cache: object,
        sinks: Tensor | None,
    ) -> Tensor:
        assert cache is None
        config, real = self.source.config, self.real
        length, heads = query.shape[2], config.num_attention_heads
        behind = torch.arange(length)[:, None] - torch.arange(length)
        kept = real & (real.cumsum(1) <= config.sink_tokens)
        visible = (behind >= 0) & real[:, None] & ((behind < config.sliding_window) | kept[:, None])
        key, value = (x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
        logits = (query @ key.transpose(-1, -2)) * config.scale
        if config.softcap:
            logits = config.softcap * (logits / config.softcap).tanh()
        if self.biased:
            logits = logits + mask - mask.amax(-1, keepdim=True)
        weights = logits.exp() * visible[:, None]
        total = weights.sum(-1, keepdim=True) + (0 if sinks is None else sinks.exp()[:, None, None])
        out = weights @ value
        if config.sink_logit:
            sink = self.source.sink_logit.exp()[:, None, None]
            out = out + sink * self.source.sink_value.repeat_interleave(heads // config.num_key_value_heads, 0)[:, None]
            total = total + sink
        gate = torch.sigmoid(self.source.g_proj(hidden)).view(*hidden.shape[:2], heads, -1)
        return (out / total).transpose(1, 2) * gate


def masked_logits(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> Tensor:
    other = copy.deepcopy(model)
    for name, module in list(other.named_modules()):
        if isinstance(module, GateSWA):
            graph = other.get_submodule(name.removesuffix(".gateswa")).graph
            given = next(node for node in graph.nodes if node.target == "gateswa").args[4]
            shape = given.meta["val"].shape
            biased = given.op != "placeholder" or shape[1] == module.config.num_attention_heads
            other.set_submodule(name, Masked(module, mask.bool(), biased))
    return other(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits


def positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def batch(length: int = 13) -> dict[str, Tensor]:
    """Two sequences, the first with left padding."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :5], mask[0, :5] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def in_pieces(model: PreTrainedModel, inputs: dict[str, Tensor], sizes: list[int], cache: object) -> Tensor:
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    parts, stop = [], 0
    for size in sizes:
        start, stop = stop, stop + size
        out = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions(mask)[:, start:stop],
            **with_cache(model, cache),
        )
        parts.append(out.logits)
    return torch.cat(parts, 1)


def assert_close(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    """Within 1e-4 of the largest logit, where ``mask`` is set."""
    if mask is not None:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    assert (actual - expected).abs().max() < 1e-4 * expected.abs().max()

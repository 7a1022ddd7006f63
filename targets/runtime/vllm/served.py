"""How each kind of attention is served: what vLLM's plugin must know of it, without vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.decode_sizes import CHUNK
from attnedit.targets.runtime.vllm.limits import Settings

Problem = tuple[str, str]
"""What a layer has that is not served, and what to do instead."""


@dataclass(frozen=True)
class Served:
    """One kind of attention; a kind's lowering "vllm".

    Arguments are those of the attention's call in a graph, by index.

    Attributes:
        module: ``module:name`` of the class that takes its place, imported where vLLM is: called with the
            configuration, vLLM's, the name in the model, and with `sinks` the source's sink logits.
        split: arguments whose projections are split among ranks by heads.
        shared: arguments whose projections every rank holds whole.
        engines: arguments that the engine has itself: mask and cache.
        sinks: the argument with the source's own sink logits; None where the attention has them itself.
        block: tokens of a block of the cache on a GPU, that its fastest kernel wants; None for whatever vLLM chooses.
        problems: what of a configuration cannot be served.
    """

    module: str
    split: tuple[int, ...]
    shared: tuple[int, ...] = ()
    engines: tuple[int, ...] = ()
    sinks: int | None = None
    block: int | None = None
    problems: Callable[[Any, Settings], Iterator[Problem]] = lambda config, settings: iter(())


def _latent_problems(config: MLAConfig, settings: Settings) -> Iterator[Problem]:
    ranks = settings.tensor_parallel
    if config.num_attention_heads % ranks:
        yield (
            f"{config.num_attention_heads} heads for {ranks} ranks",
            "use a --tensor-parallel-size that divides it",
        )


def _window_problems(config: GateSWAConfig, settings: Settings) -> Iterator[Problem]:
    ranks = settings.tensor_parallel
    if config.sink_tokens:
        yield (
            f"{config.sink_tokens} kept first tokens (--sinks keep:{config.sink_tokens}), for which vLLM's cache "
            "has no place",
            "compile with --sinks none or --sinks logit",
        )
    if config.sinks and config.sink_value:
        yield "a sink value beside the source's own sink logits", "compile with --sinks none or --sinks logit"
    if config.v_head_dim > config.head_dim:
        yield f"values of {config.v_head_dim} numbers and keys of {config.head_dim}", "use attnedit.load"
    if config.num_key_value_heads % ranks:
        yield (
            f"{config.num_key_value_heads} key/value heads for {ranks} ranks",
            "use a --tensor-parallel-size that divides it",
        )


_MODULES = "attnedit.targets.runtime.vllm.attention"
LATENT = Served(f"{_MODULES}:ServedLatent", (0,), shared=(1,), engines=(4, 5), block=CHUNK, problems=_latent_problems)
WINDOW = Served(f"{_MODULES}:ServedWindow", (0, 1, 2), engines=(4, 5), sinks=6, problems=_window_problems)
ORDINARY = Served(f"{_MODULES}:ServedWindow", (0, 1, 2), sinks=3)
"""Layers that were not rewritten."""

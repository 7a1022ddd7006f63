"""Decoder layers through `torch.compile` while they train, layers that compute the same through one compilation.

What keeps layers apart for the compiler is not what they compute: each rewritten attention is a graph with a class of
its own, and each latent attention has its own rotary columns as constants. Both are made equal here for as long as
training takes (regional compilation, as in PyTorch's recipe of that name).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import fx, nn

from attnedit.compiler.compatibility.torch_names import compiler_limits, share_class
from attnedit.compiler.execution.stream import replaced_forwards
from attnedit.targets.attention.module import AttentionModule

COMPILATIONS = 64
"""Of one function, for layers that differ and for batches of other sizes, before it runs uncompiled."""
WORTH = 150
"""Steps from which compiling pays for its half minute or so."""


def worthwhile(wanted: bool | None, device: torch.device, steps: int) -> bool:
    """Whether to compile: as asked; where nothing is asked, on a GPU for runs long enough."""
    useful = device.type == "cuda" and steps >= WORTH
    return useful if wanted is None else wanted


def pieces(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """What decoder layers consist of, for when something happens between the parts: hooks cut a graph in two."""
    return [piece for layer in layers for piece in layer.children()]


@contextmanager
def compiled(modules: Sequence[nn.Module], wanted: bool) -> Iterator[None]:
    """Let `torch.compile` run the forward passes of modules while inside, if wanted; nothing else of them changes."""
    if not wanted:
        yield
        return
    limits = {"recompile_limit": COMPILATIONS, "accumulated_recompile_limit": 8 * COMPILATIONS}
    modules = list(dict.fromkeys(modules))
    with _alike(modules), compiler_limits(**limits):
        forwards = [torch.compile(module.forward, dynamic=False) for module in modules]
        with replaced_forwards(modules, forwards):
            yield


@contextmanager
def _alike(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Graphs of equal code share one class, and constants that differ between layers are tensors."""
    inner = [module for outer in modules for module in outer.modules()]
    graphs = [(module, type(module)) for module in inner if isinstance(module, fx.GraphModule)]
    attentions = [module for module in inner if isinstance(module, AttentionModule)]
    classes: dict[str, type] = {}
    for graph, own in graphs:
        share_class(graph, classes.setdefault(graph.code, own))
    for attention in attentions:
        attention.constants_as_tensors(True)
    try:
        yield
    finally:
        for attention in attentions:
            attention.constants_as_tensors(False)
        for graph, own in graphs:
            share_class(graph, own)

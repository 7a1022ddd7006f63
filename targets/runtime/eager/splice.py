"""Put rewritten attention graphs into a live transformers model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from attnedit.compiler.errors import UsageError

_DROPOUT = ("attention_dropout", "attn_dropout", "attn_dropout_p", "dropout")
"""What transformers' attention modules call their dropout of attention weights, the plainest name first."""


def splice(model: nn.Module, graphs: Mapping[str, nn.Module]) -> None:
    """Put each graph in place of the attention module of its name, in place.

    Whatever the replaced module had and the graph does not use is gone, from ``state_dict`` too. Plain attributes
    (``layer_idx``, ``is_sliding``, ``config``) are carried over, since decoder layers read them. So is the dropout of
    attention weights, which new attention applies in training as the source does.

    Raises:
        UsageError: the model has no module of that name.
    """
    for name, graph in graphs.items():
        try:
            replaced = model.get_submodule(name)
        except AttributeError as error:
            raise UsageError(f"{type(model).__name__} has no module {name!r} to replace") from error
        for attribute, value in vars(replaced).items():
            if not attribute.startswith("_") and not hasattr(graph, attribute):
                setattr(graph, attribute, value)
        rate = dropout_rate(replaced)
        parts: list[Any] = [part for part in graph.modules() if hasattr(type(part), "attention_dropout")]
        for part in (graph, *parts):
            part.attention_dropout = rate
        graph.train(replaced.training)
        model.set_submodule(name, graph)
    _keep_whole(model, graphs)


def _keep_whole(model: nn.Module, names: Iterable[str]) -> None:
    """Take modules out of the plans for tensor parallelism: new attention works with all heads, on every device."""
    parts: list[tuple[str, Any]] = list(model.named_modules())
    for place, part in parts:
        if plan := getattr(part, "tp_plan", None):
            inside = f"{place}." if place else ""
            whole = {re.sub(r"\.\d+(?=\.|$)", ".*", name.removeprefix(inside)) + "." for name in names}
            part.tp_plan = {entry: how for entry, how in plan.items() if not entry.startswith(tuple(whole))}


def dropout_rate(attention: nn.Module) -> float:
    """Rate at which an attention module of a source drops attention weights in training, whether it trains or not."""
    for name in _DROPOUT:
        value = getattr(attention, name, None)
        if isinstance(value, nn.Dropout):
            return float(value.p)
        if isinstance(value, int | float):
            return float(value)
    return 0.0

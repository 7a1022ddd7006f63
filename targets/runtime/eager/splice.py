"""Put rewritten attention graphs into a live transformers model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from attnedit.compiler.errors import UsageError


def splice(model: nn.Module, graphs: Mapping[str, nn.Module]) -> None:
    """Put each graph in place of the attention module of its name, in place.

    Whatever the replaced module had and the graph does not use is gone, from ``state_dict`` too. Plain attributes
    (``layer_idx``, ``is_sliding``, ``config``) are carried over, since decoder layers read them.

    Args:
        model: the live model.
        graphs: by module name, such as "model.layers.0.self_attn".

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
        graph.train(replaced.training)
        model.set_submodule(name, graph)

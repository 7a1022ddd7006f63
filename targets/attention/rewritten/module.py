"""Modules that a lowered graph calls: the model's cache, its attention implementation, and masks in one form.

Shapes: B batch, T new tokens, S keys, D hidden size, H heads, G key/value heads, d query and key size, v value size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from attnedit.compiler.compatibility.caches import append
from attnedit.compiler.compatibility.transformers_names import attention_of
from attnedit.compiler.graph.anchor import reference_attention
from attnedit.compiler.graph.masks import dense_mask


class KVCache(nn.Module):
    """Appends to the model's cache what an attention caches.

    Args:
        config: of the site.
        explicit: the replacement called `attnedit.cache` itself.
    """

    def __init__(self, config: Any, explicit: bool) -> None:
        super().__init__()
        self.config = config
        self.explicit = explicit

    def extra_repr(self) -> str:
        """Name the rewrites."""
        return ", ".join(entry["rewrite"].rpartition(":")[2] for entry in self.config.rewrites)

    def forward(self, key: Tensor, value: Tensor, past_key_values: Any = None) -> tuple[Tensor, Tensor]:
        """Append.

        Args:
            key: [B, G, T, ..], any dtype.
            value: [B, G, T, ..].
            past_key_values: a transformers cache, or None.

        Returns:
            All that is cached, [B, G, S, ..] each.
        """
        if past_key_values is None:
            return key, value
        return append(past_key_values, key, value, self.config.layer_idx)


class Attend(nn.Module):
    """Attention by the implementation that the model's configuration names, as the source's own modules call it.

    Args:
        config: the model's.
        layer_idx: of the layer.
        scale: factor on the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        window: the sliding window that the implementation is told of; the mask shows it too.
    """

    is_causal = True
    attention_dropout: float = 0.0

    def __init__(
        self, config: Any, layer_idx: int, scale: float, softcap: float | None = None, window: int | None = None
    ) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.scale, self.softcap, self.window = scale, softcap, window
        self.num_key_value_groups = 1

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, sinks: Tensor | None = None
    ) -> Tensor:
        """Attend.

        Args:
            query: [B, H, T, d].
            key: [B, G, S, d].
            value: [B, G, S, v].
            attention_mask: whatever the model makes for its implementation.
            sinks: [H], or None.

        Returns:
            [B, T, H, v].
        """
        groups = query.shape[1] // key.shape[1]
        if self.num_key_value_groups != groups:
            self.num_key_value_groups = groups  # implementations read it off the module
        given = {"softcap": self.softcap, "sliding_window": self.window, "s_aux": sinks}
        settings = {name: setting for name, setting in given.items() if setting is not None}
        attend: Any = ALL_ATTENTION_FUNCTIONS.get_interface(attention_of(self.config), _eager)
        settings["dropout"] = self.attention_dropout if self.training else 0.0
        output: Tensor = attend(self, query, key, value, attention_mask, scaling=self.scale, **settings)[0]
        return output


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    output = reference_attention(query, key, value, attention_mask, scaling, softcap, s_aux, sliding_window, dropout)
    return output, None


class DenseMask(nn.Module):
    """Brings whatever mask a model makes into the one form that replacements add to logits.

    Args:
        window: tokens that a query sees, itself included, where the mask does not say; None for all.
    """

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.window = window

    def forward(self, mask: Tensor | None, hidden: Tensor, keys: Tensor) -> Tensor:
        """Return a mask to add, of hidden [B, T, D], keys [B, G, S, ..]: `attnedit.compiler.graph.masks.dense_mask`."""
        return dense_mask(mask, hidden, keys.shape[2], self.window)

"""What every kind of attention with a module and a cache of its own has in common; copied into remote-code checkpoints.

Shapes: B batch, T new tokens, S tokens attended to, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache

from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph.masks import causal, masked
from attnedit.targets.attention.config import SiteConfig


class AttentionModule(nn.Module):
    """Attention that keeps its own cache, in a graph in place of the source's; called with what `KindGraph` says.

    A module appends what it keeps with `attnedit.compiler.compatibility.caches.append`, [B, heads, tokens, size] twice,
    and is given the masks that the model makes. Where it is plain torch code of any lengths, exports trace it as it is;
    then ``exporting()``, and lengths are symbols that nothing may depend on.

    Args:
        config: the shape.
        device: where the weights are made.
        dtype: their dtype.

    Attributes:
        config_class: of `config`.
        pages: whether it takes the pages of continuous batching
            (`attnedit.compiler.compatibility.paged.PagedLayers`) as a cache.
        attention_dropout: rate at which attention weights are dropped in training.
    """

    config_class: ClassVar[type[SiteConfig]]
    pages: ClassVar[bool] = False
    attention_dropout: float = 0.0
    config: Any

    def __init__(
        self, config: SiteConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config

    def reset_parameters(self) -> None:
        """Give the weights the values that they have when they are made."""

    def bind_cache(self, cache: Cache) -> None:
        """Put a layer of its own into a cache before the first tokens; one that does is not traced.

        Args:
            cache: of transformers.
        """

    def constants_as_tensors(self, wanted: bool) -> None:
        """Hold constants that differ between layers as tensors, so that one compilation serves all.

        Args:
            wanted: False to hold them as numbers again.
        """

    def visible(
        self,
        mask: Tensor | None,
        length: int,
        keys: int,
        past: int | Tensor,
        device: torch.device,
        window: int | None = None,
    ) -> Tensor | None:
        """Bring every form of mask to one.

        Args:
            mask: None, [B, S] of the new and cached tokens, or [B, 1 or H, T, >= S].
            length: T.
            keys: S, which may be more than there are tokens so far.
            past: tokens that were cached before.
            device: of the mask.
            window: tokens that a query sees, itself included; None for all.

        Returns:
            None (plain causal over equal lengths, or all keys), or [B, 1 or H, T, S], bool or floats to add.

        Raises:
            UsageError: the mask has none of these forms.
        """
        if isinstance(mask, Tensor) and mask.dim() == 4:
            return mask[..., :keys]
        # Static caches return more keys than there are, and start at 0; a sliding cache has dropped old ones.
        offset = min(int(past), keys - length)
        if mask is None:
            if length == 1 or (keys == length and (window is None or keys <= window)):
                return None
            return causal(length, keys, offset, window, device)
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            raise self.no_mask(mask)
        padding = F.pad(mask[:, -keys:].to(torch.bool), (0, max(0, keys - mask.shape[1])))[:, None, None, :]
        return padding if length == 1 else padding & causal(length, keys, offset, window, device)

    def probabilities(self, logits: Tensor, mask: Tensor | None, sinks: Tensor | None = None) -> Tensor:
        """Cap (`config.softcap`), mask and normalise logits, then drop.

        Args:
            logits: [B, H, T, S], scaled.
            mask: as `visible` has it.
            sinks: [H] logits of a key that carries no value; its share is left out.

        Returns:
            [B, H, T, S] in at least fp32.
        """
        logits = upcast(logits)
        softcap = self.config.softcap
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        if mask is not None:
            logits = masked(logits, mask)
        if sinks is None:
            weights = logits.softmax(dim=-1)
        else:
            sinks = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(logits.shape[0], -1, logits.shape[2], 1)
            weights = torch.cat((logits, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return F.dropout(weights, self.attention_dropout) if self.training and self.attention_dropout else weights

    def no_mask(self, mask: object) -> UsageError:
        """What to raise for a mask of no known form."""
        form = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        return UsageError(
            f"layer {self.config.layer_idx}: attention mask {form} is neither None nor [B, S] nor [B, 1, T, S]; "
            "use attn_implementation 'sdpa' or 'eager'"
        )


def upcast(x: Tensor) -> Tensor:
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def attention_modules(model: nn.Module) -> Iterator[tuple[str, AttentionModule]]:
    """The modules in a model that are of some kind, with their names."""
    for name, module in list(model.named_modules()):
        if isinstance(module, AttentionModule):
            yield name, module

"""The shape of one grouped latent attention: everything but its weights."""

from __future__ import annotations

from dataclasses import dataclass

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig


@dataclass(frozen=True)
class GroupedLatentConfig(SiteConfig):
    """Plain JSON values only.

    Attributes:
        layer_idx: the layer of the cache that this attention writes.
        num_attention_heads: H, of which each group has as many.
        head_dim: d, the size of the query that comes in (before rope).
        v_head_dim: dv, the size of one head's output.
        ranks: cached latent values per token of each group.
        rope_columns: for each rotary slot, which all groups share, the last-dim column of cos and sin that turns it.
        input_size: E, the size of what the cached values are projected from.
        scale: factor of the logits.
        kv_bias: whether that projection has a bias.
        folded: whether it reads the hidden states themselves rather than the source's keys and values.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: whether each head has a sink logit.
        window: tokens each query sees in the source, itself included; None is all.
    """

    layer_idx: int
    num_attention_heads: int
    head_dim: int
    v_head_dim: int
    ranks: tuple[int, ...]
    rope_columns: tuple[int, ...]
    input_size: int
    scale: float
    kv_bias: bool = False
    folded: bool = False
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that no module could have."""
        object.__setattr__(self, "ranks", tuple(self.ranks))
        object.__setattr__(self, "rope_columns", tuple(self.rope_columns))
        where = f"GroupedLatentConfig of layer {self.layer_idx}"
        if not self.ranks or min(self.ranks) < 1:
            raise UsageError(f"{where}: every group needs a latent of at least one value, got {self.ranks}")
        if self.num_attention_heads % len(self.ranks):
            raise UsageError(f"{where}: {self.num_attention_heads} heads do not divide into {len(self.ranks)} groups")

    @property
    def latent_groups(self) -> int:
        """Groups of query heads, each with a latent of its own."""
        return len(self.ranks)

    @property
    def kv_lora_rank(self) -> int:
        """Cached latent values per token, of all groups."""
        return sum(self.ranks)

    @property
    def qk_rope_head_dim(self) -> int:
        """Cached rotary values per token."""
        return 2 * len(self.rope_columns)

"""The shape of one multi-head latent attention: everything but its weights."""

from __future__ import annotations

from dataclasses import dataclass

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig


@dataclass(frozen=True)
class MLAConfig(SiteConfig):
    """Shape of one multi-head latent attention; plain JSON values only.

    Attributes:
        layer_idx: the layer of the cache that this attention writes.
        num_attention_heads: H.
        head_dim: d, the size of the query that comes in (before rope).
        v_head_dim: dv, the size of one head's output.
        kv_lora_rank: r, cached latent values per token.
        rope_columns: for each rotary slot the last-dim column of cos and sin that turns it.
        qk_nope_head_dim: size of the query's part that meets the latent: ``head_dim``, or 0 when every key
            component keeps its rotation.
        input_size: E, the size of what the cached values are projected from.
        kv_bias: whether that projection has a bias.
        folded: whether it reads the hidden states themselves rather than the source's keys and values.
        linear: whether the query, too, is a projection of the hidden states of its own (``q_proj``), and none of the
            projections has a bias, whatever the source does there: the attention that DeepSeek's classes have.
        scale: factor of the logits.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        sinks: whether each head has a sink logit.
        window: tokens each query sees, itself included; None is all.

    Raises:
        UsageError: the numbers contradict each other.

    >>> config = MLAConfig(layer_idx=0, num_attention_heads=4, head_dim=8, v_head_dim=8, kv_lora_rank=6,
    ...                    rope_columns=(0, 2), qk_nope_head_dim=8, input_size=32, scale=8 ** -0.5)
    >>> config.qk_rope_head_dim, MLAConfig.from_dict(config.to_dict()) == config
    (4, True)
    """

    layer_idx: int
    num_attention_heads: int
    head_dim: int
    v_head_dim: int
    kv_lora_rank: int
    rope_columns: tuple[int, ...]
    qk_nope_head_dim: int
    input_size: int
    scale: float
    kv_bias: bool = False
    folded: bool = False
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None
    linear: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that no module could have."""
        object.__setattr__(self, "rope_columns", tuple(self.rope_columns))
        where = f"MLAConfig of layer {self.layer_idx}"
        self._check_sizes("num_attention_heads", "head_dim", "v_head_dim", "kv_lora_rank", "input_size")
        if self.qk_nope_head_dim not in (0, self.head_dim):
            raise UsageError(
                f"{where}: qk_nope_head_dim must be 0 or head_dim ({self.head_dim}), got {self.qk_nope_head_dim}"
            )
        if not self.rope_columns and not self.qk_nope_head_dim:
            raise UsageError(f"{where}: without rotary slots qk_nope_head_dim must be head_dim, got 0")
        if self.linear and (self.kv_bias or not self.folded):
            raise UsageError(f"{where}: a linear attention is folded and has no kv_bias")
        if any(column < 0 for column in self.rope_columns):
            raise UsageError(f"{where}: rope_columns must not be negative, got {self.rope_columns}")
        if self.window is not None and self.window < 1:
            raise UsageError(f"{where}: window must be at least 1, got {self.window}")

    @property
    def num_slots(self) -> int:
        """Rotary slots s: complex key components, shared by all heads, that keep their rotation."""
        return len(self.rope_columns)

    @property
    def cached(self) -> tuple[int, int, int]:
        """One head of latents, as keys, and rotary slots, as values."""
        return 1, self.kv_lora_rank, self.qk_rope_head_dim

    @property
    def qk_rope_head_dim(self) -> int:
        """2 s: cached values per token that are rotated."""
        return 2 * len(self.rope_columns)

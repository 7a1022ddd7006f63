"""The shape of one attention of each target: everything but its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self, get_args

from attnedit.compiler.errors import UsageError

Gate = Literal["head", "element", "none"]


class SiteConfig:
    """What the configurations of all kinds have in common: frozen dataclasses of plain JSON values.

    Attributes:
        layer_idx: the layer of the cache that the attention writes.
    """

    layer_idx: int

    @property
    def edges(self) -> tuple[int, ...]:
        """Lengths at which what a query sees begins to change, such as a window; checks go around them."""
        return ()

    @property
    def cached(self) -> tuple[int, int, int] | None:
        """Heads, key size and value size of what a layer caches; None where only its first forward tells."""
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values: what a saved result's ``config.json`` has for an attention.

        Returns:
            Values by field.
        """
        values = asdict(self)  # type: ignore[call-overload]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` wrote.

        Args:
            values: by field.

        Returns:
            The configuration.

        Raises:
            UsageError: a field is missing, or there is one that this version does not know.
        """
        known = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        if unknown := sorted(set(values) - known):
            raise UsageError(
                f"{cls.__name__} has no field {', '.join(unknown)}: the file was written by another version of attnedit"
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise UsageError(f"{cls.__name__} cannot be read: {error}") from error


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
        for name in ("num_attention_heads", "head_dim", "v_head_dim", "kv_lora_rank", "input_size"):
            if getattr(self, name) < 1:
                raise UsageError(f"{where}: {name} must be at least 1, got {getattr(self, name)}")
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
    def edges(self) -> tuple[int, ...]:
        """The window, if the source has one."""
        return () if self.window is None else (self.window,)

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


@dataclass(frozen=True)
class GateSWAConfig(SiteConfig):
    """Shape of one gated sliding-window attention; plain JSON values only.

    Attributes:
        layer_idx: the layer of the cache that this attention writes.
        num_attention_heads: H.
        num_key_value_heads: G, a divisor of H.
        head_dim: d, the size of queries and keys.
        v_head_dim: dv, the size of values and of one head's output.
        hidden_size: D, the size of the hidden states that the gate reads.
        sliding_window: W, tokens each query sees, itself included.
        scale: factor of the logits of rotated queries and keys.
        gate: the output times a sigmoid of the hidden states, one per "head" or per "element", or "none".
        gate_bias: whether the gate's projection has a bias.
        sink_logit: whether each head has the logit of a virtual key, seen by every query.
        sink_value: whether that key has a value, one per key/value head; without, it only takes probability.
        sink_tokens: the first so many real tokens of each sequence stay visible outside the window.
        softcap: logits become ``softcap * tanh(logits / softcap)``; the virtual keys' are not capped.
        sinks: whether the source has sink logits of its own (virtual keys without value).
        source_window: sliding window of the source's own masks; None where they show every earlier token.

    Raises:
        UsageError: the numbers contradict each other.

    >>> config = GateSWAConfig(layer_idx=0, num_attention_heads=4, num_key_value_heads=2, head_dim=8, v_head_dim=8,
    ...                        hidden_size=32, sliding_window=128, scale=8 ** -0.5, gate="head", sink_tokens=4)
    >>> config.cached_tokens, GateSWAConfig.from_dict(config.to_dict()) == config
    (132, True)
    """

    layer_idx: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    hidden_size: int
    sliding_window: int
    scale: float
    gate: Gate = "none"
    gate_bias: bool = False
    sink_logit: bool = False
    sink_value: bool = False
    sink_tokens: int = 0
    softcap: float | None = None
    sinks: bool = False
    source_window: int | None = None

    def __post_init__(self) -> None:
        """Refuse what no module could have."""
        where = f"GateSWAConfig of layer {self.layer_idx}"
        sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "v_head_dim", "hidden_size")
        for name in (*sizes, "sliding_window"):
            if getattr(self, name) < 1:
                raise UsageError(f"{where}: {name} must be at least 1, got {getattr(self, name)}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UsageError(
                f"{where}: {self.num_attention_heads} heads cannot share {self.num_key_value_heads} key/value heads"
            )
        if self.gate not in get_args(Gate):
            raise UsageError(f"{where}: gate must be one of {', '.join(get_args(Gate))}, got {self.gate!r}")
        if self.gate_bias and self.gate == "none":
            raise UsageError(f"{where}: without a gate there is no gate_bias")
        if self.sink_value and not self.sink_logit:
            raise UsageError(f"{where}: sink_value needs sink_logit, which gives it its weight")
        if self.sink_tokens < 0:
            raise UsageError(f"{where}: sink_tokens must not be negative, got {self.sink_tokens}")
        if self.source_window is not None and self.sliding_window > self.source_window:
            raise UsageError(
                f"{where}: sliding_window {self.sliding_window} exceeds the source's own window {self.source_window}"
            )

    @property
    def edges(self) -> tuple[int, ...]:
        """The window; sinks make a second edge."""
        return self.sliding_window, self.cached_tokens

    @property
    def cached(self) -> tuple[int, int, int]:
        """The source's heads."""
        return self.num_key_value_heads, self.head_dim, self.v_head_dim

    @property
    def cached_tokens(self) -> int:
        """The most tokens that the cache of this attention holds: ``sliding_window + sink_tokens``."""
        return self.sliding_window + self.sink_tokens

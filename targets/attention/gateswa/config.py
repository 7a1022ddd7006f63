"""The shape of one gated sliding-window attention: everything but its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig

Gate = Literal["head", "element", "none"]


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
        self._check_sizes(*sizes, "sliding_window")
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

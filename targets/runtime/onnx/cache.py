"""The cache of an exported model: what each layer holds, and a transformers cache whose tensors are graph inputs.

Shapes: B batch, T new tokens, P cached tokens, S = P + T (or the capacity of fixed buffers), G cached heads.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.module import attention_modules
from attnedit.targets.runtime.decomposed import lowering_of
from attnedit.targets.runtime.tracing import kept_tensors

CacheForm = Literal["dynamic", "static", "fixed"]
"""Grown by concatenation; buffers of any capacity, written by TensorScatter; every size a number, written by
ScatterElements, which older opsets have too."""

TENSOR_SCATTER_OPSET = 24


@dataclass(frozen=True)
class LayerCache:
    """What one layer caches: a key [B, heads, tokens, key_size] and a value [B, heads, tokens, value_size].

    Attributes:
        layer: N in ``past_key_values.N.key``.
        heads: cached heads; 1 for latent attention.
        key_size: values per token and head of the key; the latent's, for latent attention.
        value_size: the same of the value; the rotary slots' for latent attention, 0 if it has none.
        tokens: how many tokens a bounded layer holds, always (those not yet written may hold anything); None where
            the layer holds every token.
    """

    layer: int
    heads: int
    key_size: int
    value_size: int
    tokens: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    def names(self, prefix: str) -> tuple[str, str]:
        """Name key and value.

        >>> LayerCache(3, 1, 8, 4).names("present")
        ('present.3.key', 'present.3.value')
        """
        return f"{prefix}.{self.layer}.key", f"{prefix}.{self.layer}.value"


@torch.no_grad()
def layer_caches(model: PreTrainedModel) -> list[LayerCache]:
    """Run two tokens and read off what each layer caches.

    Raises:
        UsageError: a layer keeps something else than keys and values, such as the state of linear attention, or keeps
            them in another dtype.
    """
    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, 2), dtype=torch.int64)
    model(ids, attention_mask=torch.ones_like(ids), **with_cache(model, cache))
    rewritten = {module.config.layer_idx: module for _, module in attention_modules(model)}
    found = []
    for index, layer in enumerate(cache.layers):
        key, value = kept_tensors(model, index, layer, "the ONNX export has no inputs")
        if key.dtype != model.dtype or value.dtype != model.dtype:
            raise UsageError(
                f"layer {index} of {type(model).__name__} caches {str(key.dtype).removeprefix('torch.')}; the caches "
                "of an exported model hold its own dtype"
            )
        lowering = lowering_of(rewritten[index], "onnx") if index in rewritten else None
        bound = None if lowering is None else lowering.held(rewritten[index].config)
        found.append(LayerCache(index, key.shape[1], key.shape[3], value.shape[3], bound))
    return found


@dataclass(frozen=True)
class Step:
    """Where the new tokens of a call stand.

    Attributes:
        start: position of the first new token of each row, int64 [B].
        real: False for padding, bool [B, S].
        past: P as a number, for those who ask; 0 with buffers, where only ``start`` tells.
        length: T.
    """

    start: Tensor
    real: Tensor
    past: int
    length: int

    def positions(self) -> Tensor:
        """Positions of the new tokens in the padded sequence, int64 [B, T]."""
        return self.start[:, None] + torch.arange(self.length)


_step: ContextVar[Step] = ContextVar("attnedit_onnx_step")


@contextmanager
def stepping(step: Step) -> Iterator[None]:
    """Make `step` the one that `current_step` returns inside the block."""
    token = _step.set(step)
    try:
        yield
    finally:
        _step.reset(token)


def current_step() -> Step:
    """Return the step of the call that is being traced."""
    return _step.get()


class ExportLayer(CacheLayerMixin):
    """One layer whose past is an input of the graph; `keys` and `values` become its outputs.

    Args:
        keys: [B, G, P, d], or the whole buffer [B, G, S, d] in the static form.
        values: the same with dv.
        form: "dynamic" appends, the others write into the buffer at ``Step.start``.
    """

    is_sliding = False

    def __init__(self, keys: Tensor, values: Tensor, form: CacheForm) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys, self.values, self.form = keys, values, form
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the tensors are there from the start."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add new tokens [B, G, T, .], and return all keys and values [B, G, S, .]."""
        if self.keys is None or self.values is None:
            raise AssertionError("an export layer has tensors")
        self.keys = self._added(self.keys, key_states)
        self.values = self._added(self.values, value_states)
        return self.keys, self.values

    def _added(self, past: Tensor, new: Tensor) -> Tensor:
        if self.form == "dynamic":
            return torch.cat((past, new), dim=2)
        if past.shape[-1] == 0:
            return past
        if self.form == "fixed":
            return past.scatter(2, current_step().positions()[:, None, :, None].expand_as(new), new)
        return torch.onnx.ops.symbolic(
            "TensorScatter",
            (past, new, current_step().start),
            {"axis": 2},
            dtype=past.dtype,
            shape=past.shape,
            version=TENSOR_SCATTER_OPSET,
        )

    def get_seq_length(self) -> int:
        """Return P, as far as it is a number."""
        return current_step().past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return S and offset 0: every layer looks like full attention to transformers' masks."""
        return current_step().real.shape[1], 0

    def get_max_length(self) -> int:
        """Return -1: no bound."""
        return -1


def export_cache(past: Sequence[tuple[Tensor, Tensor]], form: CacheForm) -> Cache:
    """Make a transformers cache over the past of each layer (key, value)."""
    return Cache(layers=[ExportLayer(key, value, form) for key, value in past])

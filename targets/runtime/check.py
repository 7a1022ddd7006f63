"""The exported model against the live one: logits at several batch, sequence and past lengths."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import VerificationError
from attnedit.targets.attention.module import attention_modules
from attnedit.targets.runtime.tracing import takes_positions

Case = tuple[int, int, tuple[int, ...]]
"""Batch, left padding of the first row, and tokens of successive calls."""

PREFILL = 256
"""Tokens of a prompt that go in at once."""


class Decoder(Protocol):
    """A running text of an exported model."""

    def feed(self, input_ids: Any, attention_mask: Any) -> Any:
        """Add tokens, numpy int64 [B, T], with 0 in the mask for padding.

        Returns:
            Numpy logits [B, T, V], or of the last tokens alone [B, 1, V].
        """
        ...


class Exported(Protocol):
    """An exported model that can be run here."""

    def decoding(self, batch: int, capacity: int) -> Decoder:
        """Begin with an empty cache."""
        ...


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        batch: rows.
        padding: left padding of the first row.
        lengths: tokens of successive calls on one cache; the first has past 0.
        deviation: largest difference of logits at real tokens, as a fraction of the largest logit; with integer
            weights root mean squares in place of largest values.
    """

    batch: int
    padding: int
    lengths: tuple[int, ...]
    deviation: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "lengths": list(self.lengths)}


def windows(model: PreTrainedModel) -> list[int]:
    """Sliding windows in a model, rewritten or its own, shortest first; sinks make a second edge."""
    found = {edge for _, module in attention_modules(model) for edge in module.config.edges}
    config = model.config.get_text_config(decoder=True)
    own = getattr(config, "sliding_window", None)
    if isinstance(own, int) and getattr(config, "use_sliding_window", True):
        found.add(own)
    limit = getattr(config, "max_position_embeddings", None) or 2**31
    return sorted(window for window in found if window + 2 <= limit)


def cases(edges: Iterable[int]) -> Iterator[Case]:
    """Batch, padding and lengths of all comparisons; W - 1, W and W + 1 tokens for every window.

    >>> [lengths for _, _, lengths in cases([300])][-2:]
    [(256, 43, 1, 1, 1), (256, 45, 1)]
    """
    yield 1, 0, (5, 1, 1)
    yield 1, 0, (1, 1, 3)
    yield 2, 2, (7, 3, 1)
    yield 3, 1, (2, 1, 6)
    for window in edges:
        yield 2, 1, (*_pieces(window - 1), 1, 1, 1)
        yield 1, 0, (*_pieces(window + 1), 1)


def _pieces(length: int) -> tuple[int, ...]:
    full, rest = divmod(length, PREFILL)
    return (PREFILL,) * full + ((rest,) if rest else ())


@torch.no_grad()
def check_model(
    model: PreTrainedModel,
    exported: Exported,
    tolerance: float,
    plan: Iterable[Case] | None = None,
    *,
    rounded: bool = False,
) -> list[Check]:
    """Compare an exported model with the live one it came from.

    Args:
        model: in the dtype that was exported.
        exported: the result, loaded.
        tolerance: bound on `Check.deviation`.
        plan: batch, padding and lengths of each comparison; `cases` unless told.
        rounded: compare root mean squares.

    Raises:
        VerificationError: the bound is exceeded; names the case.
    """
    done = []
    for batch, padding, lengths in cases(windows(model)) if plan is None else plan:
        ids, mask = _tokens(model, batch, padding, sum(lengths))
        cache: Any = DynamicCache(config=model.config)
        state = exported.decoding(batch, sum(lengths) + 3)
        differences, references, seen = [], [], 0
        for length in lengths:
            span = slice(seen, seen + length)
            seen += length
            expected = _eager(model, ids, mask, span, cache)
            found = torch.from_numpy(state.feed(ids[:, span].numpy(), mask[:, span].numpy())).float()
            expected = expected[:, -found.shape[1] :]
            real = mask[:, span][:, -found.shape[1] :].bool()
            differences.append((found - expected)[real].flatten())
            references.append(expected[real].flatten())
        sizes = [_size(torch.cat(parts), rounded) for parts in (differences, references)]
        check = Check(batch, padding, lengths, sizes[0] / max(sizes[1], 1e-9))
        if not check.deviation <= tolerance:
            raise VerificationError(
                f"the exported model computes something else than {type(model).__name__}: with {batch} rows, "
                f"{padding} tokens of padding and calls of {', '.join(map(str, lengths))} tokens its logits deviate "
                f"by {check.deviation:.1e} of the largest ({tolerance:.0e} is tolerated); nothing was written"
            )
        done.append(check)
    return done


def _size(values: Tensor, rounded: bool) -> float:
    return float(values.square().mean().sqrt() if rounded else values.abs().max())  # NaN stays NaN


def _tokens(model: PreTrainedModel, batch: int, padding: int, length: int) -> tuple[Tensor, Tensor]:
    rows: Any = model.get_input_embeddings()
    ids = torch.randint(0, rows.weight.shape[0], (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask


def _eager(model: PreTrainedModel, ids: Tensor, mask: Tensor, span: slice, cache: Any) -> Tensor:
    call: Any = model
    positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, span]} if takes_positions(model) else {}
    out = call(ids[:, span], attention_mask=mask[:, : span.stop], **with_cache(model, cache), **positions)
    logits: Tensor = out.logits.float()
    return logits

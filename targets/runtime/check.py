"""A written model against the live one it came from: logits at several batch, sequence and past lengths."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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

Measure = Callable[[Tensor, Tensor], float]
"""Takes differences of logits and the logits themselves, of all real tokens [N, V]; returns `Check.deviation`."""

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
        deviation: largest difference of logits at real tokens, as a fraction of the largest logit; rounded weights
            have a measure of their own.
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


class Live:
    """A model of transformers on any device, as `Exported`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model

    def decoding(self, batch: int, capacity: int) -> LiveDecoding:
        """Begin with an empty cache, which grows."""
        return LiveDecoding(self.model, batch)


class LiveDecoding:
    """A running text of a model of transformers."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self._model: Any = model
        self._cache = DynamicCache(config=model.config)
        self._mask = torch.zeros((batch, 0), dtype=torch.int64, device=model.device)

    @torch.no_grad()
    def feed(self, input_ids: Any, attention_mask: Any) -> Any:
        """See `Decoder`; logits are float32."""
        ids, added = (torch.as_tensor(given).to(self._model.device) for given in (input_ids, attention_mask))
        self._mask = mask = torch.cat((self._mask, added), dim=1)
        arguments = with_cache(self._model, self._cache)
        if takes_positions(self._model):
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self._model(ids, attention_mask=mask, **arguments).logits.float().cpu().numpy()


def largest(differences: Tensor, logits: Tensor) -> float:
    """The largest difference, as a fraction of the largest logit."""
    return float(differences.abs().max()) / max(float(logits.abs().max()), 1e-9)  # NaN stays NaN


def root_mean_square(differences: Tensor, logits: Tensor) -> float:
    """Root mean squares in place of largest values: for weights that were rounded."""
    return float(differences.square().mean().sqrt()) / max(float(logits.square().mean().sqrt()), 1e-9)


def check_model(
    model: PreTrainedModel,
    exported: Exported,
    tolerance: float,
    plan: Iterable[Case] | None = None,
    *,
    measure: Measure = largest,
    advice: str = "nothing was written",
) -> list[Check]:
    """Compare a written model with the live one it came from.

    Args:
        model: in the dtype that was written.
        exported: the result, loaded.
        tolerance: bound on `Check.deviation`.
        plan: batch, padding and lengths of each comparison; `cases` unless told.
        measure: of the deviation.
        advice: end of the message.

    Raises:
        VerificationError: the bound is exceeded; names the case.
    """
    done = []
    for batch, padding, lengths in cases(windows(model)) if plan is None else plan:
        ids, mask = _tokens(model, batch, padding, sum(lengths))
        texts = [one.decoding(batch, sum(lengths) + 3) for one in (Live(model), exported)]
        differences, references = [], []
        for part, added in zip(ids.split(lengths, dim=1), mask.split(lengths, dim=1), strict=True):
            expected, found = (torch.from_numpy(text.feed(part.numpy(), added.numpy())).float() for text in texts)
            expected, real = expected[:, -found.shape[1] :], added[:, -found.shape[1] :].bool()
            differences.append((found - expected)[real])
            references.append(expected[real])
        check = Check(batch, padding, lengths, measure(torch.cat(differences), torch.cat(references)))
        if not check.deviation <= tolerance:
            raise VerificationError(
                f"what was exported computes something else than {type(model).__name__}: with {batch} rows, "
                f"{padding} tokens of padding and calls of {', '.join(map(str, lengths))} tokens its logits deviate "
                f"by {check.deviation:.1e} of the largest ({tolerance:.0e} is tolerated); {advice}"
            )
        done.append(check)
    return done


def _tokens(model: PreTrainedModel, batch: int, padding: int, length: int) -> tuple[Tensor, Tensor]:
    rows: Any = model.get_input_embeddings()
    ids = torch.randint(0, rows.weight.shape[0], (batch, length), generator=torch.Generator().manual_seed(batch))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    return ids, mask

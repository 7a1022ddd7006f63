"""A written model against the live one it came from: logits of prefill and of decoding from the cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import VerificationError
from attnedit.compiler.execution.verify import HALF
from attnedit.targets.attention.module import attention_modules

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest tolerated difference of logits, as a fraction of the largest logit."""
PREFILL = 24


@dataclass(frozen=True)
class Check:
    """One comparison.

    Attributes:
        lengths: tokens of successive calls on one cache, of two rows, the first with left padding.
        deviation: difference of logits at real tokens, as a fraction of the largest logit; the largest, but in half
            precision that of three tokens in four.
    """

    lengths: tuple[int, ...]
    deviation: float

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "lengths": list(self.lengths)}


@torch.inference_mode()
def check_same(model: PreTrainedModel, written: PreTrainedModel) -> list[Check]:
    """Compare the logits of two models, both ways to compute them.

    Args:
        model: the rewritten model.
        written: what was made of it, loaded from its files.

    Raises:
        VerificationError: they differ.
    """
    tolerance = TOLERANCES[model.dtype]
    windows = {edge for _, module in attention_modules(model) for edge in module.config.edges} or {PREFILL}
    done = []
    for lengths in {(window + by, 1, 1, 3) for window in windows for by in (-1, 5)}:
        lengths = (max(lengths[0], 2), *lengths[1:])
        check = Check(lengths, _deviation(model, written, lengths))
        if not check.deviation <= tolerance:
            raise VerificationError(
                f"{type(written).__name__} computes something else than {type(model).__name__}: calls of "
                f"{', '.join(map(str, lengths))} tokens deviate by {check.deviation:.1e} of the largest logit "
                f"({tolerance:.0e} is tolerated), so the class differs in something; nothing was written, "
                "use --profile remote"
            )
        done.append(check)
    return done


def _deviation(model: PreTrainedModel, written: PreTrainedModel, lengths: tuple[int, ...]) -> float:
    rows: Any = model.get_input_embeddings()
    shape = (2, sum(lengths))
    ids = torch.randint(0, rows.weight.shape[0], shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, : min(3, lengths[0] - 1)] = 0
    expected, found = (_logits(one, ids, mask, lengths) for one in (model, written))
    by_token = (found - expected)[mask.bool()].abs().amax(-1)
    error = by_token.quantile(0.75) if model.dtype in HALF else by_token.max()
    return float(error / expected[mask.bool()].abs().max())


def _logits(model: PreTrainedModel, ids: Tensor, mask: Tensor, lengths: tuple[int, ...]) -> Tensor:
    cache: Any = DynamicCache(config=model.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    call: Any = model
    ids, mask, positions = (x.to(model.device) for x in (ids, mask, positions))
    parts, seen = [], 0
    for length in lengths:
        span = slice(seen, seen + length)
        seen += length
        out = call(
            ids[:, span],
            attention_mask=mask[:, :seen],
            position_ids=positions[:, span],
            **with_cache(model, cache),
        )
        parts.append(out.logits.float().cpu())
    return torch.cat(parts, 1)

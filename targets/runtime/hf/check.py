"""A checkpoint that was written against the live model, both ways to compute logits: prefill, and from the cache."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attnedit.compiler.execution.verify import HALF
from attnedit.targets.attention.module import attention_modules
from attnedit.targets.runtime.check import Case, Check, Live, check_model, largest

TOLERANCES = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 5e-2}
"""Largest tolerated difference of logits, as a fraction of the largest logit."""
PREFILL = 24


def check_same(model: PreTrainedModel, written: PreTrainedModel) -> list[Check]:
    """Compare a model's logits with those of what was loaded from its files; in half precision of three tokens in four.

    Raises:
        VerificationError: they differ.
    """
    windows = {edge for _, module in attention_modules(model) for edge in module.config.edges} or {PREFILL}
    firsts = sorted({max(window + by, 2) for window in windows for by in (-1, 5)})
    plan: list[Case] = [(2, min(3, first - 1), (first, 1, 1, 3)) for first in firsts]
    measure = _most_tokens if model.dtype in HALF else largest
    advice = f"so {type(written).__name__} differs in something; nothing was written, use --profile remote"
    return check_model(model, Live(written), TOLERANCES[model.dtype], plan, measure=measure, advice=advice)


def _most_tokens(differences: Tensor, logits: Tensor) -> float:
    return float(differences.abs().amax(-1).quantile(0.75) / logits.abs().max())

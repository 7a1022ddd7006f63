"""Hold a rewritten model to its promises on real numbers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.errors import VerificationError
from attnedit.compiler.report import Verification
from attnedit.compiler.sampling import position_ids

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest deviation allowed, as a fraction of the largest logit."""
HALF = (torch.float16, torch.bfloat16)
"""Here rounding alone sends single tokens to other experts, in the source too: three in four tokens must agree. Half
of them are decoded, so an error of decoding alone still shows."""
LENGTH = 48
"""Tokens that promises are checked on."""


def check_tokens(
    windows: Tensor | None, model: PreTrainedModel, window: int = 0, device: torch.device | None = None
) -> Tensor:
    """A short prompt [1, T], longer than `window`: the start of the calibration data, or token ids 0, 1, 2, ..."""
    device = device or next(model.parameters()).device
    if windows is not None:
        return windows[:1, : LENGTH + window].to(device)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids: Tensor = (torch.arange(LENGTH, device=device) * 7919 % vocabulary)[None]
    return ids


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [1, T, vocabulary] of one prompt."""
    logits: Tensor = model(ids, use_cache=False).logits
    return logits


@torch.inference_mode()
def same_logits(expected: Tensor, result: PreTrainedModel, ids: Tensor) -> Verification:
    """The result computes what the source computed: `expected`, from `logits_of`.

    Raises:
        VerificationError: it does not, within `TOLERANCE` of the source's largest logit.
    """
    return _hold("logits of the result against the source", expected, logits_of(result, ids))


@torch.inference_mode()
def same_decode(
    result: PreTrainedModel, ids: Tensor, rounding: float = 0.0, *, few_passes: bool = False
) -> Verification:
    """Decoding token by token from the cache gives the logits of a prefill.

    Args:
        result: the model.
        ids: token ids [1, T].
        rounding: what the model rounds its cache by, as a fraction: like half precision, where one number may fall to
            the other side, so that three in four tokens must agree within it.
        few_passes: the last token alone and those before it together, for a model that is read for every pass.

    Raises:
        VerificationError: it does not, within `TOLERANCE` of the largest logit.
    """
    # Positions are given in both: left out, some families start to count elsewhere.
    prefill: Tensor = result(ids, use_cache=False, **position_ids(result, ids, 0)).logits
    cache = DynamicCache(config=result.config)
    first = max(ids.shape[1] // 2, ids.shape[1] - LENGTH // 2)
    steps = []
    ends = [first, ids.shape[1] - 1, ids.shape[1]] if few_passes else range(first, ids.shape[1] + 1)
    for start, stop in itertools.pairwise([0, *ends]):
        part = ids[:, start:stop]
        call = {"past_key_values": cache, "use_cache": True, **position_ids(result, part, start)}
        steps.append(result(part, **call).logits)
    return _hold("decoding from the cache against prefill", prefill, torch.cat(steps, 1), rounding)


def _hold(what: str, expected: Tensor, found: Tensor, rounding: float = 0.0) -> Verification:
    tolerance = TOLERANCE.get(expected.dtype, 1e-4)
    rounded = expected.dtype in HALF or rounding > tolerance
    tolerance = max(tolerance, rounding)
    kind = torch.promote_types(expected.dtype, torch.float32)
    size = float(expected.to(kind).abs().max())
    by_token = (expected.to(kind) - found.to(kind)).abs().amax(-1).flatten()
    error = float(by_token.quantile(0.75) if rounded else by_token.max()) / max(size, 1e-30)
    if not error <= tolerance:
        raise VerificationError(
            f"{what}: off by {error:.1e} of the largest logit where {tolerance:.0e} is allowed; "
            "please report the model's class and configuration"
        )
    return Verification(what=what, contract="close", error=error, tolerance=tolerance)

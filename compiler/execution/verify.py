"""Hold a rewritten model to its promises on real numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import VerificationError
from attnedit.compiler.execution.model_inputs import position_ids
from attnedit.compiler.model_io.heads import has_language_head, outputs_of, runner
from attnedit.compiler.reporting.records import Verification

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest deviation allowed, as a fraction of the largest logit."""
HALF = (torch.float16, torch.bfloat16)
"""Here rounding alone sends single tokens to other experts, in the source too: three in four tokens must agree. Half
of them are decoded, so an error of decoding alone still shows."""
LENGTH = 48
"""Tokens that promises are checked on."""


def check_tokens(
    windows: Sequence[Tensor] | None, model: PreTrainedModel, window: int = 0, device: torch.device | None = None
) -> Tensor:
    """A short prompt [1, T], longer than `window`: the start of a longest calibration window, or made-up ids."""
    device = device or next(model.parameters()).device
    if windows is not None:
        return windows[0][:1, : LENGTH + window].to(device)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids: Tensor = (torch.arange(LENGTH, device=device) * 7919 % vocabulary)[None]
    return ids


@torch.inference_mode()
def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [1, T, vocabulary] of one prompt; last hidden states [1, T, D] where there is no language-model head."""
    return outputs_of(model, ids, use_cache=False)


@torch.inference_mode()
def same_logits(expected: Tensor, result: PreTrainedModel, ids: Tensor) -> Verification:
    """The result computes what the source computed: `expected`, from `logits_of`.

    Raises:
        VerificationError: it does not, within `TOLERANCE` of the source's largest logit.
    """
    what = "logits" if has_language_head(result) else "hidden states"
    return _hold(f"{what} of the result against the source", expected, logits_of(result, ids))


@torch.inference_mode()
def same_decode(
    result: PreTrainedModel, ids: Tensor, rounding: float = 0.0, *, own: float = 0.0, few_passes: bool = False
) -> Verification:
    """Decoding token by token from the cache gives the logits of a prefill.

    Args:
        result: the model.
        ids: token ids [1, T].
        rounding: what the model rounds its cache by, as a fraction: like half precision, where one number may fall to
            the other side, so that three in four tokens must agree within it.
        own: how far the source is off in the same, `decode_error`: so far twice, and at most what bfloat16 may be, the
            result may be off too.
        few_passes: the last token alone and those before it together, for a model that is read for every pass.

    Raises:
        VerificationError: it does not, within `TOLERANCE` of the largest logit.
    """
    prefill, decoded = _decoded(result, ids, few_passes)
    allowed = min(2 * own, TOLERANCE[torch.bfloat16])
    return _hold("decoding from the cache against prefill", prefill, decoded, rounding, allowed)


@torch.inference_mode()
def decode_error(source: PreTrainedModel, ids: Tensor, sites: int) -> float:
    """How far a source's own decoding is off its prefill, of the largest logit; 0 where all layers are attention.

    Some state-space layers do other things in the two: Nemotron-H's bound their time step in prefill only.

    Args:
        source: the model.
        ids: token ids [1, T].
        sites: how many attention sites it has.
    """
    if sites >= source.config.get_text_config(decoder=True).num_hidden_layers:
        return 0.0
    return float(_by_token(*_decoded(source, ids, False)).max())


def decode_note(own: float) -> list[str]:
    """What a report says of a source whose decoding is not its prefill."""
    off = f"the source's own decoding is off its prefill by {own:.1e} of the largest logit"
    return [off] if own > TOLERANCE[torch.float32] else []


def _decoded(model: PreTrainedModel, ids: Tensor, few_passes: bool) -> tuple[Tensor, Tensor]:
    """Logits of a prefill, and of decoding after its first half."""
    # Positions are given in both: left out, some families start to count elsewhere.
    run = runner(model)
    prefill = outputs_of(model, ids, use_cache=False, **position_ids(run, ids, 0))
    cache = DynamicCache(config=model.config)
    first = max(ids.shape[1] // 2, ids.shape[1] - LENGTH // 2)
    steps = []
    ends = [first, ids.shape[1] - 1, ids.shape[1]] if few_passes else range(first, ids.shape[1] + 1)
    for start, stop in itertools.pairwise([0, *ends]):
        part = ids[:, start:stop]
        steps.append(outputs_of(model, part, **with_cache(run, cache), **position_ids(run, part, start)))
    return prefill, torch.cat(steps, 1)


def _by_token(expected: Tensor, found: Tensor) -> Tensor:
    """The largest deviation of each token, of the largest logit [tokens], in float32 at least."""
    kind = torch.promote_types(expected.dtype, torch.float32)
    expected, found = expected.to(kind), found.to(kind)
    return (expected - found).abs().amax(-1).flatten() / expected.abs().max().clamp(min=1e-30)


def _hold(what: str, expected: Tensor, found: Tensor, rounding: float = 0.0, allowed: float = 0.0) -> Verification:
    tolerance = TOLERANCE.get(expected.dtype, 1e-4)
    rounded = expected.dtype in HALF or rounding > tolerance
    tolerance = max(tolerance, rounding, allowed)
    by_token = _by_token(expected, found)
    error = float(by_token.quantile(0.75) if rounded else by_token.max())
    if not error <= tolerance:
        raise VerificationError(
            f"{what}: off by {error:.1e} of the largest logit where {tolerance:.0e} is allowed; "
            "please report the model's class and configuration"
        )
    return Verification(what=what, contract="close", error=error, tolerance=tolerance)

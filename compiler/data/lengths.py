"""How long the texts were that a result was made on, which it carries with it, and what is said beyond."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

CALIBRATION, TRAINING = "calibration_length", "training_length"
"""Keys of the record in a result's configuration: tokens of the longest windows."""


def record_lengths(model: PreTrainedModel, *, calibration: int | None = None, training: int | None = None) -> None:
    """Keep in a result's configuration how long its longest windows were; None leaves what is there."""
    record: dict[str, Any] = model.config.attnedit
    for key, length in ((CALIBRATION, calibration), (TRAINING, training)):
        if length is not None:
            record[key] = max(length, record.get(key, 0))


def beyond(config: PreTrainedConfig, length: int) -> str | None:
    """One line on a text of more tokens than a result was made on; None for fewer, and for other models."""
    record = getattr(config, "attnedit", None) or {}
    calibrated, trained = record.get(CALIBRATION), record.get(TRAINING)
    known = max(calibrated or 0, trained or 0)
    if not known or length <= known:
        return None
    made = {"calibrated": calibrated, "trained": trained}
    how = " and ".join(f"{what} on windows of {tokens:,} tokens" for what, tokens in made.items() if tokens)
    return f"{length:,} tokens are beyond what this result was made for: it was {how}, and farther on it may lose much"

"""What can be asked of calibration."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from attnedit.compiler.errors import UsageError
from attnedit.compiler.options import Flag, Number, Options, Switch, Whole

Train = Literal["attention", "norms", "all"]
Rule = Literal["adamw", "muon"]

_EXPONENTS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _bytes(value: Any) -> Any:
    return parse_bytes(value) if isinstance(value, str) else value


class CalibrationOptions(Options):
    """Of layer-wise fitting and of distillation."""

    called: ClassVar[str] = "calibration option"

    fit_steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps of layer-wise fitting: each attention learns the source attention's output.

    It does so on the source's own hidden states."""
    distill_steps: Annotated[Whole, Field(ge=0)] = 0
    """Steps of distillation: the model learns the source's next-token distributions."""
    batch_size: Annotated[Whole, Field(ge=1)] = 8
    """Training: windows per step."""
    seq_len: Annotated[Whole, Field(ge=2)] = 1024
    """Training: tokens per window; the model's positions if those are fewer."""
    short_seq_len: Annotated[Whole | None, Field(ge=2)] = None
    """Training: tokens per window in the first steps of each stage; all of `seq_len` unless given.

    Steps on fewer tokens are cheaper, and more of them fit into as many tokens; what lies far back is learned in the
    last ones. Not with layers fitted in turn (`memory_limit`), whose hidden states are kept on disk."""
    short_share: Annotated[Number, Field(ge=0, le=1)] = 0.7
    """Training: fraction of each stage's steps that have the shorter windows."""
    accumulation: Annotated[Whole, Field(ge=1)] = 1
    """Training: parts that a batch is computed in, to save memory.

    One after the other, with the same result."""
    fit_learning_rate: Annotated[Number | None, Field(gt=0, lt=1)] = None
    """Highest rate of fitting, relative to the size of each weight; unless told, by how far each layer is off.

    The size is the weight's root mean square. Linear warm-up, then half a cosine to nothing. None is for
    `fitting_rate`."""
    distill_learning_rate: Annotated[Number | None, Field(gt=0, lt=1)] = None
    """The same of distillation, by how far the model is off.

    None is for `distillation_rate`."""
    distill_optimizer: Rule = "adamw"
    """Distillation: adamw, or muon, which learns more of each token and takes more time.

    Muon is for matrices, with AdamW for the rest: better at equal tokens, with more arithmetic per step, the more the
    wider the matrices and the fewer the tokens of a step."""
    train: Train = "attention"
    """What distillation changes: attention, norms (and attention) or all."""
    feature_weight: Annotated[Number, Field(ge=0)] = 0.0
    """Distillation: weight of matching hidden states, beside the distributions.

    Of one minus the cosine between hidden states of the two models."""
    feature_layers: Annotated[Whole, Field(ge=0)] = 4
    """Distillation: how many layers' hidden states are matched, evenly spread."""
    self_generated: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Training: fraction of the windows that the source samples itself."""
    repeats: Annotated[Number, Field(ge=0, le=1)] = 0.0
    """Training: fraction of the first windows in which passages come again; falls to none.

    It falls linearly over the steps of one length, within whose windows the repeats lie. What a small cache loses most
    on is what it has read before. With `memory_limit`, twice the hidden states on disk."""
    token_noise: Annotated[Number, Field(ge=0, lt=1)] = 0.0
    """Distillation: fraction of a window's tokens that are replaced by others of the text, anew in each step.

    The source says what follows those, too, so that a text may be gone through many times and is new each time."""
    checkpoint_every: Annotated[Whole, Field(ge=1)] = 100
    """Training: steps between two checkpoints, where there is a directory for them."""
    evaluate_every: Annotated[Whole, Field(ge=0)] = 0
    """Training: steps between two looks at held-out windows; a twelfth of a stage if 0."""
    patience: Annotated[Whole, Field(ge=0)] = 0
    """Training: looks without a better one after which a stage ends; 0 for none.

    Where the start is good, the loss rises until the rate has fallen, so a patient run ends better than an impatient
    one."""
    memory_limit: Annotated[Whole | None, Field(ge=1), BeforeValidator(_bytes), Flag(str)] = None
    """Fitting: memory for weights and optimiser, such as 20GiB; layers are then fitted in turn.

    In bytes, or as text with a unit. Hidden states are then kept on disk. None is for no limit."""
    activation_checkpointing: Switch = False
    """Distillation: keep no activations, compute them again."""
    torch_compile: Switch | None = None
    """Training: layers through torch.compile; unless told, on a GPU and for runs long enough."""
    cuda_graphs: Switch = False
    """Training: each step's passes as one launch, on one CUDA GPU.

    For small models, whose kernels are shorter than their launches. What cannot be captured is refused."""

    @field_validator("short_seq_len")
    @classmethod
    def _shorter(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value >= (longest := int(info.data.get("seq_len", value + 1))):
            raise ValueError(f"must be below seq_len ({longest}), got {value}")
        return value

    @field_validator("accumulation")
    @classmethod
    def _parts_of_a_batch(cls, value: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size", value)
        if value > batch_size:
            raise ValueError(f"must be at most batch_size ({batch_size}), got {value}")
        return value

    def lengths(self, longest: int) -> list[int]:
        """Tokens per window of every step, fitting first, where windows have `longest` tokens."""
        found = []
        for steps in (self.fit_steps, self.distill_steps):
            short = 0 if self.short_seq_len is None else round(self.short_share * steps)
            found += [min(self.short_seq_len or longest, longest)] * short + [longest] * (steps - short)
        return found

    @property
    def steps(self) -> int:
        """Of both stages."""
        return self.fit_steps + self.distill_steps


def parse_bytes(text: str) -> int:
    """Read a size such as "20GiB", "800MB" or a number of bytes; both forms of unit are powers of 1,024.

    Raises:
        UsageError: it is no size above 0.

    >>> parse_bytes("1.5GiB")
    1610612736
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:iB|B)?\s*", text, re.IGNORECASE)
    size = int(float(found[1]) * 2 ** _EXPONENTS[found[2].upper()]) if found else 0
    if size < 1:
        raise UsageError(f"memory limit {text!r} is no size; give one such as 20GiB")
    return size

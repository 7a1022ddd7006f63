"""Keyword arguments of the public functions, for type checkers; `attnedit.options` has what they mean and default to.

A test holds each to the field of its name, so that none can be forgotten or differ.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from os import PathLike
from typing import Any, Literal, ParamSpec, TypedDict, TypeVar, get_type_hints

import torch
from transformers import PreTrainedTokenizerBase

from attnedit.compiler.data.window_sources import TextSource
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.processors import Processor
from attnedit.compiler.progress import Progress
from attnedit.options import CompileOptions
from attnedit.passes.budget import Allocation
from attnedit.passes.calibration.options import Rule, Train
from attnedit.passes.gateswa.options import FullLayers

P = ParamSpec("P")
R = TypeVar("R")
FOR_CHECKPOINTS = "is for reading a checkpoint, and the model is live; leave it out"


class DataArguments(TypedDict, total=False):
    """Of every function."""

    calibration: TextSource
    tokenizer: PreTrainedTokenizerBase | None
    processor: Processor | None
    seed: int
    verify: bool
    progress: Progress | None


class AttentionArguments(DataArguments, total=False):
    """Of compilations, live or layer by layer."""

    kv_budget: float | None
    window: int | None
    full_layers: FullLayers
    gate: str | None
    sinks: str | None
    allocation: Allocation
    calibration_tokens: int | None
    calibration_length: int | None
    alternations: int
    device: str | torch.device | None
    capture_cache: bool


class CheckpointArguments(AttentionArguments, total=False):
    """Of `attnedit.compile_checkpoint`."""

    dtype: torch.dtype | str
    revision: str | None
    trust_remote_code: bool
    overwrite: bool


class TrainingArguments(TypedDict, total=False):
    """Of training."""

    fit_steps: int
    distill_steps: int
    batch_size: int
    seq_len: int
    short_seq_len: int | None
    short_share: float
    accumulation: int
    fit_learning_rate: float | None
    distill_learning_rate: float | None
    distill_optimizer: Rule
    train: Train
    feature_weight: float
    feature_layers: int
    self_generated: float
    repeats: float
    token_noise: float
    checkpoint_every: int
    evaluate_every: int
    patience: int
    memory_limit: int | str | None
    activation_checkpointing: bool
    torch_compile: bool | None
    cuda_graphs: bool
    run_directory: str | PathLike[str] | None


class CalibrateArguments(DataArguments, TrainingArguments, total=False):
    """Of `attnedit.calibrate`."""


class CompileArguments(AttentionArguments, TrainingArguments, total=False):
    """Of `attnedit.compile` and `attnedit.rewrite`."""

    profile: str | None
    kernel_dims: bool
    engine: str | None
    in_place: bool
    partial: bool
    fuel: int | None
    dump_graphs: str | PathLike[str] | None


class OnnxArguments(TypedDict, total=False):
    """Of ``result.export("onnx", ...)``."""

    flavor: str
    cache: Literal["dynamic", "static"]
    dtype: str | torch.dtype | None
    quantize: str | None
    opset: int | None
    batch_size: int | None
    seq_len: int | None
    capacity: int | None
    progress: Progress | None


class HFArguments(TypedDict, total=False):
    """Of ``result.export("hf", ...)``."""

    profile: str | None
    kernel_dims: bool
    gguf: bool
    engine: str | None
    progress: Progress | None


class GGUFArguments(TypedDict, total=False):
    """Of ``result.export("gguf", ...)``."""

    dtype: str | None
    quantize: str | None
    engine: str | None
    progress: Progress | None


class NPUArguments(TypedDict, total=False):
    """Of ``result.export("npu", ...)``."""

    soc: str
    dtype: str | None
    batch_size: int | None
    capacity: int | None
    progress: Progress | None


def shown(kind: type, **defaults: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Show a function's keyword arguments one by one in its signature, as `help` prints it.

    Args:
        kind: the keyword arguments.
        **defaults: those that are not the fields'.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        own, hints = inspect.signature(function), get_type_hints(kind)
        fields = {name: field for name, field in CompileOptions.model_fields.items() if name in hints}
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in ({name: field.default for name, field in fields.items()} | defaults).items()
        ]
        named = [one for one in own.parameters.values() if one.kind is not one.VAR_KEYWORD]
        function.__signature__ = own.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]
        return function

    return decorate


def check_known(given: dict[str, Any], kind: type, why: str) -> None:
    """Refuse options that a function does not have, though another does.

    Raises:
        UsageError: one line that names the option and says why.
    """
    for name in given:
        if name in CompileOptions.model_fields and name not in get_type_hints(kind) and given[name] is not None:
            raise UsageError(f"{name} {why}")

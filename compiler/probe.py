"""One tiny forward of the live model: which modules run attention, with which arguments, and which avoid the interface.

The forward runs without cache or gradient on B=2, T=11; it works on meta models and in any dtype.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from attnedit.compiler.anchor import (
    PROBE,
    InterfaceCall,
    MaskWindow,
    attention_implementation,
    experts_implementation,
    listening,
    mask_window,
)
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.sites import RotarySource

BATCH, LENGTH = 2, 11  # two primes that no head count, group count or number of experts is likely to be at once

_SOFTMAX = ("_softmax", "softmax", "_safe_softmax")


@dataclass(frozen=True)
class AttentionCall:
    """One attention module as the probe saw it."""

    name: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: MaskWindow | None
    signature: str
    rotary: RotarySource | None


@dataclass
class _Frame:
    name: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: list[str]


@dataclass
class _Produced:
    """A tensor some module returned: which module, at which place of its output, called with what."""

    tensor: torch.Tensor
    name: str
    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _Recorder(TorchDispatchMode):
    """Keeps the stack of running modules, the aten ops of each, and every softmax outside the interface."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[_Frame] = []
        self.calls: list[tuple[_Frame, InterfaceCall]] = []
        self.bypassing: dict[str, str] = {}
        self.produced: dict[int, _Produced] = {}

    def enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.stack.append(_Frame(self.names.get(id(module), ""), module, args, kwargs, []))

    def leave(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        frame = self.stack.pop()
        # Only tuples: that is how rotary modules return (cos, sin).
        if isinstance(output, tuple):
            for index, item in enumerate(output):
                if isinstance(item, torch.Tensor):
                    self.produced[id(item)] = _Produced(item, frame.name, index, frame.args, frame.kwargs)

    def attention(self, call: InterfaceCall) -> None:
        frame = next((f for f in reversed(self.stack) if f.module is call.module), self.stack[-1])
        self.calls.append((frame, call))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # models with linear attention ask whether the padding mask is all ones, and it is
        output = func(*args, **(kwargs or {}))
        shown = [
            f"{tuple(a.shape)}" if isinstance(a, torch.Tensor) else repr(a)
            for a in pytree.tree_leaves((args, kwargs or {}))
            if isinstance(a, (torch.Tensor, int, float, bool, str, type(None), torch.dtype))
        ]
        for frame in self.stack:
            frame.trace.append(f"{name}({', '.join(shown)})")
        if self.stack and self._is_attention(name, output):
            frame = self.stack[-1]
            self.bypassing.setdefault(frame.name, f"{_line_of(frame.module)}, {name}")
        return output

    @staticmethod
    def _is_attention(name: str, output: Any) -> bool:
        if "scaled_dot_product" in name:
            return True
        # The softmax of a router is over experts; that of attention is over keys.
        return name in _SOFTMAX and isinstance(output, torch.Tensor) and tuple(output.shape[-2:]) == (LENGTH, LENGTH)


def _line_of(module: torch.nn.Module) -> str:
    """The source line that `module.forward` is executing right now."""
    frame = sys._getframe()
    source = inspect.getsourcefile(type(module))
    found = type(module).__name__
    while frame is not None:
        if frame.f_code.co_filename == source and frame.f_locals.get("self") is module:
            return f"{source.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return found


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off inside the block; every module's `training` flag is restored."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _check_model(model: torch.nn.Module) -> None:
    config = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(config, "get_text_config"):
        raise UsageError(f"{kind} is not a transformers model; load one with AutoModelForCausalLM.from_pretrained")
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{kind} is an encoder-decoder; only decoder-only language models are supported")
    text = config.get_text_config()
    if text is not config:
        tower = next((name for name, m in model.named_modules() if name and getattr(m, "config", None) is text), None)
        where = f"its text tower is {tower!r} ({type(text).__name__})" if tower else "its text tower was not found"
        raise CaptureError(f"{kind} is multimodal; {where}: pass a causal language model built from it instead")


def probe_inputs(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Arguments of the probe forward, on the device of the embedding; ids are valid for any vocabulary of 16 up."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    ids = torch.arange(3, 3 + LENGTH, device=device).repeat(BATCH, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = inspect.signature(model.forward).parameters
    if "position_ids" in parameters:
        # One row per sequence, so that cos and sin have the batch dimension padding gives them.
        inputs["position_ids"] = torch.arange(LENGTH, device=device).repeat(BATCH, 1)
    return {name: value for name, value in inputs.items() if name in parameters}


def discover(model: torch.nn.Module) -> list[AttentionCall]:
    """Find the attention modules of a live model.

    Args:
        model: a transformers causal language model, on any device (meta too) and in any dtype; left as it was.

    Returns:
        One entry per attention module, in the order they run.

    Raises:
        UsageError: not a transformers model.
        CaptureError: encoder-decoder, multimodal, no attention at all, or layers that cannot be captured (each
            is listed with its reason).
    """
    _check_model(model)
    recorder = _Recorder(model)
    handles = []
    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True))
            handles.append(module.register_forward_hook(recorder.leave))
        with (
            torch.no_grad(),
            evaluation_mode(model),
            attention_implementation(model, PROBE),
            listening(recorder.attention),
            contextlib.ExitStack() as stack,
        ):
            inputs = probe_inputs(model)
            if inputs["input_ids"].is_meta:
                # The default, grouped_mm, has a meta kernel for bfloat16 only.
                stack.enter_context(experts_implementation(model, "batched_mm"))
            stack.enter_context(recorder)
            model(**inputs, use_cache=False)
    except (RuntimeError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(
            f"{type(model).__name__}: a forward on {BATCH} x {LENGTH} tokens failed: {reason}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    _refuse_unsupported(model, recorder)
    return _attention_calls(recorder)


def _refuse_unsupported(model: torch.nn.Module, recorder: _Recorder) -> None:
    modules = dict(model.named_modules())
    problems = [
        (
            name,
            f"({type(modules[name]).__name__}): its attention runs at {where} and does not go through transformers' "
            "attention interface, so it cannot be traced",
        )
        for name, where in recorder.bypassing.items()
    ]
    seen: set[int] = set()
    for frame, call in recorder.calls:
        reason = call.problem
        if reason is None and id(frame.module) in seen:
            reason = "it calls the attention interface more than once"
        if reason is None and call.mask is None:
            reason = "no attention mask reaches the attention interface, so it may not be causal"
        if reason is not None:
            problems.append((frame.name, f"({type(frame.module).__name__}): {reason}"))
        seen.add(id(frame.module))
    if problems and hasattr(model.config, "attnedit"):
        names = ", ".join(name for name, _ in problems)
        raise CaptureError(
            f"{type(model).__name__}: attnedit has rewritten its attention already ({names}); give the model that it "
            f"was made from"
        )
    if problems:
        raise CaptureError(f"{type(model).__name__}: {by_reason(problems)}")
    if not recorder.calls:
        raise CaptureError(
            f"{type(model).__name__}: no attention site; no module runs softmax attention, so there is nothing to "
            f"convert: give a model with attention"
        )


def by_reason(problems: list[tuple[str, str]]) -> str:
    """One clause per reason with the layers it holds for.

    >>> by_reason([("h.0.attn", "(A): no"), ("h.1.attn", "(A): no"), ("h.2.attn", "(B): never")])
    'h.0.attn, h.1.attn (A): no; h.2.attn (B): never'
    """
    grouped: dict[str, list[str]] = {}
    for name, reason in problems:
        grouped.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} {reason}" for reason, names in grouped.items())


def _attention_calls(recorder: _Recorder) -> list[AttentionCall]:
    identities = _shared_identities([frame for frame, _ in recorder.calls])
    found = []
    for (frame, call), identity in zip(recorder.calls, identities, strict=True):
        rotary = _rotary_source(recorder, frame)
        signature = _signature(frame, call, identity, rotary)
        window = mask_window(call.mask)
        found.append(AttentionCall(frame.name, frame.module, frame.args, frame.kwargs, window, signature, rotary))
    return found


def _bound(frame: _Frame) -> list[tuple[str, Any]]:
    leaves, _ = pytree.tree_flatten_with_path((frame.args, frame.kwargs))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves]


def _shared_identities(frames: list[_Frame]) -> list[dict[str, int]]:
    """Which tensor object each argument is, numbered by first appearance, where layers share them at all.

    Hidden states differ in every layer and say nothing; masks and cos/sin tell sliding from full layers.
    """
    seen: dict[str, dict[int, int]] = {}
    rows: list[dict[str, int]] = []
    for frame in frames:
        row = {}
        for path, leaf in _bound(frame):
            if isinstance(leaf, torch.Tensor):
                numbers = seen.setdefault(path, {})
                row[path] = numbers.setdefault(id(leaf), len(numbers))
        rows.append(row)
    private = {path for path, numbers in seen.items() if len(numbers) == sum(path in row for row in rows)}
    return [{path: number for path, number in row.items() if path not in private} for row in rows]


def _scalars(module: torch.nn.Module) -> list[tuple[str, str]]:
    plain = (bool, int, float, str, type(None), torch.dtype, torch.Size)
    return sorted(
        (name, repr(value))
        for name, value in vars(module).items()
        if (isinstance(value, plain) or (isinstance(value, tuple) and all(isinstance(v, plain) for v in value)))
        and name not in ("layer_idx", "training")
    )


def _signature(frame: _Frame, call: InterfaceCall, identity: dict[str, int], rotary: RotarySource | None) -> str:
    """Equal only where two modules run the same ops on the same shapes with the same settings and shared inputs."""
    module = frame.module
    parts: list[Any] = [
        [(name, type(child).__qualname__, _scalars(child)) for name, child in module.named_modules()],
        [(name, tuple(t.shape), str(t.dtype)) for name, t in module.state_dict(keep_vars=True).items()],
        [
            (path, (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, torch.Tensor) else repr(leaf))
            for path, leaf in _bound(frame)
        ],
        sorted(identity.items()),
        call.settings,
        mask_window(call.mask),
        rotary and (rotary.module, rotary.outputs, repr(rotary.args), repr(sorted(rotary.kwargs.items()))),
        # layer_idx may steer the forward through the configuration; the ops that ran show it.
        frame.trace,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _rotary_source(recorder: _Recorder, frame: _Frame) -> RotarySource | None:
    """The module that made the (cos, sin) pair this attention module was called with."""
    produced = [
        recorder.produced[id(leaf)]
        for _, leaf in _bound(frame)
        if isinstance(leaf, torch.Tensor) and id(leaf) in recorder.produced and leaf.dim() in (3, 4)
    ]
    by_call: dict[tuple[str, int], list[_Produced]] = {}
    for item in produced:
        by_call.setdefault((item.name, id(item.args)), []).append(item)
    for items in by_call.values():
        if len(items) == 2:
            first, second = items

            def mark(leaf: Any) -> Any:
                if isinstance(leaf, torch.Tensor):
                    return "hidden" if leaf.is_floating_point() else "positions"
                return leaf

            args, kwargs = pytree.tree_map(mark, (first.args, first.kwargs))
            return RotarySource(first.name, args, kwargs, (first.index, second.index))
    return None

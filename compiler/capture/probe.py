"""One tiny forward of the live model: which modules run attention, with which arguments, and which avoid the interface.

The forward runs without cache or gradient on B=2, T=11; it works on meta models and in any dtype.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from attnedit.compiler.capture.forwards import CachedCall, bound, cached_calls, probe_inputs, probing
from attnedit.compiler.capture.recorder import Attention, Frame, Produced, Recorder
from attnedit.compiler.capture.sites import RotarySource, by_reason
from attnedit.compiler.compatibility.torch_names import pytree
from attnedit.compiler.errors import CaptureError, UsageError
from attnedit.compiler.graph.anchor import (
    MaskWindow,
    listening,
    mask_window,
    recording_windows,
)
from attnedit.compiler.model_io.heads import is_multimodal, runner


@dataclass(frozen=True)
class AttentionCall:
    """One attention module as the probe saw it.

    `cached` is None where it calls the attention interface, `layer` (the cache slot) where it names none. `outer` is
    the module around it, which may hold the output projection.
    """

    name: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    mask: MaskWindow | None
    signature: str
    rotary: RotarySource | None
    cached: CachedCall | None = None
    layer: int | None = None
    outer: AttentionCall | None = None

    @property
    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Of the call that is traced: with tokens cached where the module writes its attention out."""
        traced = self if self.cached is None else self.cached
        return traced.args, dict(traced.kwargs)


def _check_model(model: torch.nn.Module) -> None:
    config = getattr(model, "config", None)
    kind = type(model).__name__
    if config is None or not hasattr(config, "get_text_config"):
        raise UsageError(f"{kind} is not a transformers model; load one with AutoModelForCausalLM.from_pretrained")
    if getattr(config, "is_encoder_decoder", False):
        raise CaptureError(f"{kind} is an encoder-decoder; only decoder-only language models are supported")


def discover(model: torch.nn.Module) -> tuple[list[AttentionCall], dict[str, str]]:
    """Find the attention modules of a live model.

    Args:
        model: a transformers causal language model, on any device (meta too) and in any dtype; left as it was. It sees
            text alone, so that of a model of several parts the text tower's attention is found.

    Returns:
        One entry per attention module, in the order they run; and those that are no sites by name, with the reason:
        what cannot be replaced alone (modules that attend to the keys of another one, and those whose keys others
        attend to), and attention of other kinds.

    Raises:
        UsageError: not a transformers model.
        CaptureError: encoder-decoder, or no attention that could be converted (each module is listed with
            its reason).
    """
    _check_model(model)
    recorder = Recorder(model)
    with probing(model), listening(recorder.called), recording_windows() as windows:
        inputs = probe_inputs(model)
        with recorder.watching(model):
            runner(model)(**inputs, use_cache=False)
    cached: dict[str, CachedCall] = {}
    if any(found.call is None for found in recorder.attention):
        cached = cached_calls(model)
    shared = _sharing(recorder.attention)
    found = [_located(attention, windows, cached) for attention in recorder.attention if attention not in shared]
    left = {**{attention.stack[-1].name: reason for attention, reason in shared.items()}, **_unsupported(model, found)}
    able = [one for one in found if one.frame.name not in left]
    if not able:
        raise CaptureError(f"{type(model).__name__}: {'; '.join(by_reason(left.items())) or _NONE}")
    return _attention_calls(recorder, able), left


_NONE = (
    "no attention site; no module runs softmax attention, so there is nothing to convert: give a model with attention"
)


def sees_ahead(model: torch.nn.Module) -> bool:
    """Whether tokens that stand for one image see each other both ways, by the masks of a forward that names such.

    Args:
        model: as for `discover`.

    Raises:
        CaptureError: the forward failed.
    """
    known = inspect.signature(model.forward).parameters.keys() & {"token_type_ids", "mm_token_type_ids"}
    if not known or not is_multimodal(model.config):  # type: ignore[arg-type]  # a transformers model has one
        return False
    with probing(model), recording_windows() as windows:
        inputs = probe_inputs(model)
        types = torch.zeros_like(inputs["input_ids"])
        types[:, 3:7] = 1
        model(**inputs, **dict.fromkeys(known, types), use_cache=False)
    return any(not window.regular for window in windows)


def _sharing(found: list[Attention]) -> dict[Attention, str]:
    """Attention over keys that several modules attend to, and what it shares."""
    by_key: dict[int, list[Attention]] = {}
    for attention in found:
        if attention.call is not None:
            by_key.setdefault(id(attention.call.key), []).append(attention)
    shared: dict[Attention, str] = {}
    for owner, *others in by_key.values():
        if any(other.stack[-1].module is not owner.stack[-1].module for other in others):
            kind = type(owner.stack[-1].module).__name__
            shared[owner] = f"({kind}): other layers attend to its keys and values, so it cannot be replaced alone"
            for other in others:
                shared[other] = f"({kind}): it attends to the keys and values of {owner.stack[-1].name}"
    return shared


@dataclass(frozen=True)
class _Located:
    """Attention and the module whose site it is."""

    frame: Frame
    mask: MaskWindow | None
    settings: tuple[Any, ...]
    problem: str | None
    cached: CachedCall | None = None
    layer: int | None = None
    outer: _Located | None = None


def _located(attention: Attention, windows: list[MaskWindow], cached: Mapping[str, CachedCall]) -> _Located:
    call = attention.call
    if call is not None:
        problem = call.problem
        if problem is None and call.mask is None:
            problem = "no attention mask reaches the attention interface, so it may not be causal"
        both = getattr(getattr(call.module, "config", None), "use_bidirectional_attention", None)
        if problem is None and both is True and getattr(call.module, "is_causal", True) is False:
            problem = "its configuration has use_bidirectional_attention, with which not every implementation is causal"
        layer = getattr(call.module, "layer_idx", None)
        if problem is None and "layer_idx" in attention.stack[-1].kwargs:
            problem = "its caller says which layer it is (layer_idx), so several layers share it"
        one = _Located(attention.stack[-1], mask_window(call.mask), call.settings, problem, layer=layer)
        return dataclasses.replace(one, outer=_around(one, attention.stack, None))
    frame = next((frame for frame in reversed(attention.stack) if frame.name in cached), None)
    if frame is None:
        return _Located(
            attention.stack[-1],
            None,
            (),
            f"its attention runs at {attention.place} and does not go through transformers' attention interface, and "
            f"no module around it is given a cache, so it cannot be traced",
        )
    masks = [mask_window(leaf) for _, leaf in bound(frame) if isinstance(leaf, torch.Tensor)]
    given = {mask for mask in masks if mask is not None} or set(windows)
    problem = "it is given several masks" if len(given) > 1 else None
    one = _Located(
        frame, next(iter(given), None), ("written out",), problem, cached[frame.name], cached[frame.name].layer
    )
    return dataclasses.replace(one, outer=_around(one, attention.stack, cached))


def _around(one: _Located, stack: list[Frame], cached: Mapping[str, CachedCall] | None) -> _Located | None:
    index = next(i for i, frame in enumerate(stack) if frame is one.frame)
    if index == 0 or (cached is not None and stack[index - 1].name not in cached):
        return None
    frame = stack[index - 1]
    return dataclasses.replace(one, frame=frame, cached=None if cached is None else cached[frame.name])


def _unsupported(model: torch.nn.Module, found: list[_Located]) -> dict[str, str]:
    """Why modules cannot be sites, by name.

    Raises:
        CaptureError: attnedit has rewritten them.
    """
    problems = []
    seen: set[int] = set()
    for one in found:
        reason = one.problem
        if reason is None and id(one.frame.module) in seen:
            reason = "it runs attention more than once"
        if reason is not None:
            problems.append((one.frame.name, f"({type(one.frame.module).__name__}): {reason}"))
        seen.add(id(one.frame.module))
    if problems and hasattr(model.config, "attnedit"):
        names = ", ".join(name for name, _ in problems)
        raise CaptureError(
            f"{type(model).__name__}: attnedit has rewritten its attention already ({names}); give the model that it "
            f"was made from"
        )
    return dict(problems)


def _attention_calls(recorder: Recorder, located: list[_Located]) -> list[AttentionCall]:
    outer = [one.outer for one in located if one.outer is not None]
    around = _attention_calls(recorder, outer) if len(outer) == len(located) else [None] * len(located)
    identities = _shared_identities([one.frame for one in located])
    found = []
    for one, identity, wider in zip(located, identities, around, strict=True):
        frame = one.frame
        rotary = _rotary_source(recorder, frame)
        signature = _signature(one, identity, rotary)
        call = AttentionCall(frame.name, frame.module, frame.args, frame.kwargs, one.mask, signature, rotary)
        found.append(dataclasses.replace(call, cached=one.cached, layer=one.layer, outer=wider))
    return found


def _shared_identities(frames: list[Frame]) -> list[dict[str, int]]:
    """Which tensor object each argument is, numbered by first appearance, where layers share them at all.

    Hidden states differ in every layer and say nothing; masks and cos/sin tell sliding from full layers.
    """
    seen: dict[str, dict[int, int]] = {}
    rows: list[dict[str, int]] = []
    for frame in frames:
        row = {}
        for path, leaf in bound(frame):
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


def _signature(one: _Located, identity: dict[str, int], rotary: RotarySource | None) -> str:
    """Equal only where two modules run the same ops on the same shapes with the same settings and shared inputs."""
    frame = one.frame
    module = frame.module
    persistent = set(module.state_dict(keep_vars=True))
    parts: list[Any] = [
        [(name, type(child).__qualname__, _scalars(child)) for name, child in module.named_modules()],
        [(name, tuple(t.shape), str(t.dtype)) for name, t in module.state_dict(keep_vars=True).items()],
        [
            (path, (tuple(leaf.shape), str(leaf.dtype)) if isinstance(leaf, torch.Tensor) else repr(leaf))
            for path, leaf in bound(frame)
        ],
        sorted(identity.items()),
        # Buffers that are no weights are constants of the layer: windows of its own, tables of angles.
        [
            (name, tuple(buffer.shape), None if buffer.is_meta else float(buffer.double().sum()))
            for name, buffer in module.named_buffers()
            if name not in persistent
        ],
        one.settings,
        one.mask,
        rotary and (rotary.module, rotary.outputs, repr(rotary.args), repr(sorted(rotary.kwargs.items()))),
        # layer_idx may steer the forward through the configuration; the ops that ran show it.
        frame.trace,
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _rotary_source(recorder: Recorder, frame: Frame) -> RotarySource | None:
    """The module that made the (cos, sin) pair this attention module was called with."""
    produced = [
        recorder.produced[id(leaf)]
        for _, leaf in bound(frame)
        if isinstance(leaf, torch.Tensor) and id(leaf) in recorder.produced and leaf.dim() in (3, 4)
    ]
    by_call: dict[tuple[str, int], list[Produced]] = {}
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

"""The op `attnedit::attention` and the transformers attention backends that record it or emit it.

Shapes: B batch, T query length, S key length, H query heads, G key/value heads, d head size, dv value head size.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

from attnedit.compiler.compatibility.caches import CACHE_NAMES
from attnedit.compiler.compatibility.transformers_names import ATTENTION_FIELD, EXPERTS_FIELD
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.masks import causal, masked

PROBE = "attnedit_probe"
ANCHOR = "attnedit_anchor"
_WINDOW = "_attnedit_window"

# Keyword arguments of the attention interface that do not change what an inference forward computes.
_IGNORED = frozenset(
    {
        *(
            "dropout",
            "position_ids",
            "cache_position",
            "use_cache",
            *CACHE_NAMES,
            "position_embeddings",
            "layer_idx",
        ),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
        *("deterministic", "target_dtype", "num_items_in_batch", "implementation", "seq_idx"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
)


def reference_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    window: int | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Attention as the eager implementations of transformers compute it, softmax in float32 (float64 stays).

    Args:
        query: [B, H, T, d].
        key: [B, G, S, d], G divides H.
        value: [B, G, S, dv].
        mask: additive float or boolean (True: attend) [B or 1, 1 or H, T, S], padding [B, S], or None for causal.
        scale: factor on the logits.
        softcap: logits become softcap * tanh(logits / softcap).
        sinks: [H], a logit per head that takes probability and gives nothing.
        window: used only where the mask is not itself a full one: keys further back than this are not seen.
        dropout: rate at which attention weights are dropped.

    Returns:
        [B, T, H, dv], contiguous.
    """
    batch, heads, length, _ = query.shape
    groups, total = key.shape[1], key.shape[2]
    if heads != groups:
        key = key.repeat_interleave(heads // groups, dim=1)
        value = value.repeat_interleave(heads // groups, dim=1)
    logits = torch.matmul(query, key.transpose(2, 3)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None or mask.dim() == 2:
        visible = causal(length, total, total - length, window, query.device)
        if mask is not None:
            visible = visible & mask[:, None, None, :].to(torch.bool)
        logits = masked(logits, visible)
    elif mask.dtype == torch.bool:
        logits = masked(logits, mask[..., :total])
    else:
        logits = logits + mask[..., :total]
    if sinks is not None:
        column = sinks.to(logits.dtype).reshape(1, heads, 1, 1).expand(batch, heads, length, 1)
        logits = torch.cat([logits, column], dim=-1)
    precise = torch.float64 if logits.dtype == torch.float64 else torch.float32
    weights = torch.softmax(logits, dim=-1, dtype=precise).to(value.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout:
        weights = torch.nn.functional.dropout(weights, dropout)
    return torch.matmul(weights, value).transpose(1, 2).contiguous()


@torch.library.custom_op("attnedit::attention", mutates_args=())
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int | None,
    layer: int,
) -> torch.Tensor:
    """The anchor: `reference_attention` as one graph node; `layer` names the cache slot. Returns [B, T, H, dv]."""
    return reference_attention(q, k, v, mask, scale, softcap, sinks, window)


@attention.register_fake
def _attention_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    window: int | None,
    layer: int,
) -> torch.Tensor:
    return v.new_empty((q.shape[0], q.shape[2], q.shape[1], v.shape[3]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    q, k, v, mask, scale, softcap, sinks, window, _ = inputs
    ctx.save_for_backward(q, k, v, mask, sinks)
    ctx.constants = (scale, softcap, window)


def _attention_backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    saved: tuple[torch.Tensor | None, ...] = ctx.saved_tensors
    scale, softcap, window = ctx.constants
    needs = [ctx.needs_input_grad[i] for i in (0, 1, 2, 3, 6)]
    with torch.enable_grad():
        # The logits are not saved: recomputing them costs less than holding [B, H, T, S] for every layer.
        fresh = [
            None if t is None else t.detach().requires_grad_(needed) for t, needed in zip(saved, needs, strict=True)
        ]
        q, k, v, mask, sinks = fresh
        if q is None or k is None or v is None:
            raise RuntimeError("attnedit::attention saved no query, key or value")
        output = reference_attention(q, k, v, mask, scale, softcap, sinks, window)
        wanted = [t for t, needed in zip(fresh, needs, strict=True) if t is not None and needed]
        grads = iter(torch.autograd.grad(output, wanted, grad))
    dq, dk, dv, dmask, dsinks = (
        next(grads) if needed and t is not None else None for t, needed in zip(fresh, needs, strict=True)
    )
    return dq, dk, dv, dmask, None, None, dsinks, None, None


attention.register_autograd(_attention_backward, setup_context=_setup_context)


@dataclass(frozen=True)
class InterfaceCall:
    """One call of the attention interface: who called, with which tensors and settings."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    sinks: torch.Tensor | None
    settings: tuple[tuple[str, float | int | bool | None], ...]
    problem: str | None


_listeners: ContextVar[tuple[Callable[[InterfaceCall], None], ...]] = ContextVar("attnedit_listeners", default=())


@contextlib.contextmanager
def listening(listener: Callable[[InterfaceCall], None]) -> Iterator[None]:
    """Call `listener` for each call that reaches the probe backend inside the block."""
    token = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(token)


def _unsupported(kwargs: dict[str, Any]) -> str | None:
    if kwargs.get("is_causal") is False:
        return "its attention is not causal (is_causal=False)"
    unknown = sorted(k for k, v in kwargs.items() if v is not None and v is not False and k not in _IGNORED)
    unknown = [name for name in unknown if name != "is_causal"]
    if unknown:
        return f"it passes {', '.join(unknown)} to the attention interface, which the anchor does not know"
    return None


def _interface(answer: Callable[[InterfaceCall], torch.Tensor]) -> Callable[..., tuple[torch.Tensor, None]]:
    """`answer` as transformers calls an attention function."""

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        settings = (
            ("scaling", scaling),
            ("softcap", softcap),
            ("window", sliding_window),
            ("sinks", s_aux is not None),
        )
        problem = _unsupported(kwargs)
        return answer(InterfaceCall(module, query, key, value, attention_mask, s_aux, settings, problem)), None

    return forward


def _probe(call: InterfaceCall) -> torch.Tensor:
    for listener in _listeners.get():
        listener(call)
    batch, heads, length, _ = call.query.shape
    return call.value.new_zeros((batch, length, heads, call.value.shape[3]))


def _anchor(call: InterfaceCall) -> torch.Tensor:
    if call.problem:
        raise CaptureError(f"{type(call.module).__name__}: {call.problem}")
    settings: dict[str, Any] = dict(call.settings)
    scale = float(call.query.shape[-1] ** -0.5 if settings["scaling"] is None else settings["scaling"])
    layer = getattr(call.module, "layer_idx", None)
    output: torch.Tensor = attention(
        call.query,
        call.key,
        call.value,
        call.mask,
        scale,
        settings["softcap"],
        call.sinks,
        settings["window"],
        -1 if layer is None else int(layer),
    )
    return output


@dataclass(frozen=True)
class MaskWindow:
    """What a mask function lets a late query see: `window` keys, every key before it (None), or something else."""

    window: int | None
    regular: bool


def _measure(mask_function: Callable[..., torch.Tensor], local_size: int | None) -> MaskWindow:
    """Ask an index-based mask function what queries well past the window see (on CPU, so meta models work too)."""
    far = 3 * (local_size or 64) + 1
    keys = torch.arange(far + 3)
    zero = torch.zeros((), dtype=torch.long)
    counts = []
    for query in (far, far + 1):
        seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(query), keys)).expand(keys.shape)
        if bool(seen[query + 1 :].any()):
            return MaskWindow(None, False)
        counts.append(int(seen.sum()))
        if not bool(seen[query + 1 - counts[-1] : query + 1].all()):
            return MaskWindow(None, False)
    if counts == [far + 1, far + 2]:
        return MaskWindow(None, True)
    return MaskWindow(counts[0], counts[0] == counts[1])


_windows: ContextVar[tuple[list[MaskWindow], ...]] = ContextVar("attnedit_windows", default=())


@contextlib.contextmanager
def recording_windows() -> Iterator[list[MaskWindow]]:
    """Collect the windows of all masks made under the probe backend inside the block."""
    found: list[MaskWindow] = []
    token = _windows.set((*_windows.get(), found))
    try:
        yield found
    finally:
        _windows.reset(token)


def _probe_mask(*args: Any, **kwargs: Any) -> torch.Tensor:
    mask = eager_mask(*args, **kwargs)
    function = kwargs.get("mask_function")
    if mask is not None and function is not None:
        # Read back by `mask_window`: the tensor itself is far too short to show a window of thousands.
        try:
            window = _measure(function, kwargs.get("local_size"))
        except (IndexError, RuntimeError):  # it goes by what it knows of the tokens that there are, such as images
            window = MaskWindow(None, False)
        setattr(mask, _WINDOW, window)
        for found in _windows.get():
            found.append(window)
    return mask


def mask_window(mask: torch.Tensor | None) -> MaskWindow | None:
    """The window of a mask made under the probe backend; None for a mask made in any other way."""
    found = getattr(mask, _WINDOW, None)
    return found if isinstance(found, MaskWindow) else None


AttentionInterface.register(PROBE, _interface(_probe))
AttentionInterface.register(ANCHOR, _interface(_anchor))
AttentionMaskInterface.register(PROBE, _probe_mask)
AttentionMaskInterface.register(ANCHOR, eager_mask)


def _configs(model: torch.nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    waiting = [getattr(module, "config", None) for module in model.modules()]
    while waiting:
        config = waiting.pop()
        if hasattr(config, ATTENTION_FIELD) and id(config) not in found:
            found[id(config)] = config
            waiting.extend(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))
    return list(found.values())


@contextlib.contextmanager
def _configured(model: torch.nn.Module, field: str, name: str) -> Iterator[None]:
    previous = [(config, getattr(config, field)) for config in _configs(model) if hasattr(config, field)]
    try:
        for config, _ in previous:
            setattr(config, field, name)
        yield
    finally:
        for config, value in previous:
            setattr(config, field, value)


def attention_implementation(model: torch.nn.Module, name: str) -> contextlib.AbstractContextManager[None]:
    """Inside the block every configuration of `model` names the attention implementation `name`; restored always."""
    return _configured(model, ATTENTION_FIELD, name)


def experts_implementation(model: torch.nn.Module, name: str) -> contextlib.AbstractContextManager[None]:
    """The same for the implementation of mixtures of experts."""
    return _configured(model, EXPERTS_FIELD, name)

"""What each attention of a live model is, rewritten or not, as far as kernels are concerned."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.compiler.errors import UsageError
from attnedit.compiler.graph.anchor import (
    PROBE,
    InterfaceCall,
    attention_implementation,
    experts_implementation,
    listening,
    mask_window,
)
from attnedit.targets.attention.module import AttentionModule, attention_modules
from attnedit.targets.runtime.decomposed import lowering_of
from attnedit.targets.runtime.npu.legalise import Surveyed
from attnedit.targets.runtime.tracing import kept_tensors, takes_positions


@torch.no_grad()
def survey(model: PreTrainedModel) -> list[Surveyed]:
    """Run two tokens, and describe the attention of every layer of the cache; a model on meta will do.

    Raises:
        UsageError: a layer's attention cannot be lowered: it keeps something else than keys and values, does not go
            through transformers' attention interface, sees a pattern that is neither causal nor a window, or has a bias
            or a window in a mask of its own.
    """
    if not takes_positions(model):
        raise UsageError(f"{type(model).__name__} takes no position_ids, which rows of different lengths need")
    rewritten = {module.config.layer_idx: module for _, module in attention_modules(model)}
    lowerings = {layer: lowering_of(module, "npu") for layer, module in rewritten.items()}
    found = {layer: lowering.describe(rewritten[layer].config) for layer, lowering in lowerings.items() if lowering}
    cache = DynamicCache(config=model.config)
    calls: dict[int, tuple[Surveyed, Tensor, Tensor]] = {}

    def listen(call: InterfaceCall) -> None:
        layer = getattr(call.module, "layer_idx", None)
        if layer is None or call.problem is not None:
            raise UsageError(f"{type(call.module).__name__}: {call.problem or 'its layer is not known'}")
        calls[int(layer)] = (_described(int(layer), call), call.key, call.value)

    ids = torch.zeros((1, 2), dtype=torch.int64, device=model.device)
    with ExitStack() as stack:
        stack.enter_context(attention_implementation(model, PROBE))
        stack.enter_context(experts_implementation(model, "batched_mm"))
        stack.enter_context(listening(listen))
        for module in rewritten.values():
            stack.callback(module.register_forward_pre_hook(_refuse_own_mask).remove)
        call: Any = model
        call(ids, **with_cache(model, cache))
    for index, layer in enumerate(cache.layers):
        if index in found:
            continue
        key, value = kept_tensors(model, index, layer, "the NPU export has no buffers")
        if index in rewritten:
            found[index] = _traced(rewritten[index], key, value)
            continue
        if index not in calls:
            raise UsageError(
                f"layer {index} of {type(model).__name__} does not go through transformers' attention interface; "
                "rewrite its attention first"
            )
        surveyed, seen_key, seen_value = calls[index]
        found[index] = surveyed if _same(key, seen_key) and _same(value, seen_value) else _held(surveyed, key, value)
    return [found[index] for index in sorted(found)]


def _traced(module: AttentionModule, key: Tensor, value: Tensor) -> Surveyed:
    """An attention whose kind has no lowering of its own, by what it cached of two tokens [1, heads, 2, size]."""
    config = module.config
    if key.shape[1] != value.shape[1]:
        raise UsageError(f"layer {config.layer_idx} caches two parts of {key.shape[1]} and {value.shape[1]} heads")
    sizes = (key.shape[1], key.shape[3], value.shape[3])
    window = getattr(config, "window", None)
    heads, size = config.num_attention_heads, config.head_dim
    return Surveyed(config.layer_idx, "traced", heads, key.shape[1], size, config.v_head_dim, window=window, held=sizes)


def _refuse_own_mask(module: AttentionModule, given: tuple[Any, ...]) -> None:
    """Refuse a mask that the layer made or changed, since what it says would be lost."""
    mask = given[list(inspect.signature(module.forward).parameters).index("attention_mask")]
    if isinstance(mask, Tensor) and mask_window(mask) is None:
        raise UsageError(
            f"layer {module.config.layer_idx} has a bias (ALiBi) or a window of its own in its mask, which the NPU "
            "export cannot hold; export it to hf with --profile remote"
        )


def _described(layer: int, call: InterfaceCall) -> Surveyed:
    settings = dict(call.settings)
    shown = mask_window(call.mask)
    if shown is None or not shown.regular:
        raise UsageError(f"layer {layer}: its mask is neither causal nor a sliding window")
    return Surveyed(
        layer,
        "full" if shown.window is None else "window",
        call.query.shape[1],
        call.key.shape[1],
        call.query.shape[3],
        call.value.shape[3],
        window=shown.window,
        virtual=int(bool(settings["sinks"])),
        softcap=settings["softcap"] is not None,
    )


def _same(cached: Tensor, seen: Tensor) -> bool:
    """Whether the attention reads the cache as it is (a layer that slides may keep one token less)."""
    kept = min(cached.shape[2], seen.shape[2])
    if cached.shape[1::2] != seen.shape[1::2]:
        return False
    return cached.is_meta or torch.equal(cached[:, :, -kept:], seen[:, :, -kept:])


def _held(surveyed: Surveyed, key: Tensor, value: Tensor) -> Surveyed:
    if surveyed.window is not None:
        raise UsageError(
            f"layer {surveyed.layer} makes keys under a window out of another cache, which is not supported"
        )
    return replace(surveyed, form="held", held=(key.shape[1], key.shape[3], value.shape[3]))

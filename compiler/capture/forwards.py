"""Forwards of a live model under the probe backend: over a whole prompt, or after tokens that are cached.

They run without gradient on a few tokens; they work on meta models and in any dtype.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from attnedit.compiler.capture.recorder import Frame, Recorder
from attnedit.compiler.compatibility.caches import cache_parameter, with_cache
from attnedit.compiler.compatibility.torch_names import own_buffers, pytree
from attnedit.compiler.compatibility.transformers_names import supports_sdpa
from attnedit.compiler.errors import CaptureError, first_line
from attnedit.compiler.graph.anchor import PROBE, attention_implementation, experts_implementation
from attnedit.compiler.graph.modules import evaluation_mode
from attnedit.compiler.graph.spec import BATCH, LENGTH
from attnedit.compiler.model_io.heads import runner

PAST = 6  # tokens cached, where attention is probed with a cache


@dataclass(frozen=True)
class CachedCall:
    """How an attention module that writes its attention out is called with tokens cached, see `cached_calls`.

    Attributes:
        args: with the cache among them.
        kwargs: the same.
        keys: [B, G, P, d], as cached; only the shape means something.
        values: [B, G, P, dv].
        implementation: of attention, under which the module is read: the one transformers would choose.
        layer: cache slot.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    keys: torch.Tensor
    values: torch.Tensor
    implementation: str
    layer: int


def probe_inputs(model: torch.nn.Module, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """Arguments of the probe forward, on the device of the embedding; ids are valid for any vocabulary of 20 up."""
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    device = embedding.weight.device
    ids = 3 + torch.arange(length, device=device).repeat(BATCH, 1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    parameters = inspect.signature(runner(model).forward).parameters
    if "position_ids" in parameters:
        # One row per sequence, so that cos and sin have the batch dimension padding gives them.
        inputs["position_ids"] = torch.arange(length, device=device).repeat(BATCH, 1)
    return {name: value for name, value in inputs.items() if name in parameters}


@contextlib.contextmanager
def probing(model: torch.nn.Module) -> Iterator[None]:
    """For forwards of a live model under the probe backend; a failure becomes a CaptureError."""
    buffers = [(module, dict(own_buffers(module))) for module in model.modules()]
    try:
        with (
            torch.no_grad(),
            evaluation_mode(model),
            attention_implementation(model, PROBE),
            contextlib.ExitStack() as stack,
        ):
            if next(model.parameters()).is_meta:
                for module, tables in buffers:  # some mix them with what is computed
                    own_buffers(module).update({n: b if b is None else b.to("meta") for n, b in tables.items()})
                # The default, grouped_mm, has a meta kernel for bfloat16 only.
                stack.enter_context(experts_implementation(model, "batched_mm"))
            yield
    except (RuntimeError, ValueError, TypeError, LookupError, AssertionError) as error:
        raise CaptureError(
            f"{type(model).__name__}: a forward on {BATCH} x {LENGTH} tokens failed: {first_line(error)}"
        ) from error
    finally:
        for module, before in buffers:  # some move their tables to where the tokens are
            own_buffers(module).update(before)


class _RecordingCache(DynamicCache):
    """Remembers which module put what into it."""

    def __init__(self, recorder: Recorder, implementation: str) -> None:
        super().__init__()
        self.recorder = recorder
        self.implementation = implementation
        self.calls: dict[str, CachedCall] = {}

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Any:
        if self.recorder.stack and key_states.dim() == value_states.dim() == 4:
            keys, values = (x[:, :, :1].expand(-1, -1, PAST, -1) for x in (key_states, value_states))
            for frame in self.recorder.stack:
                if any(leaf is self for _, leaf in bound(frame)):
                    call = CachedCall(frame.args, dict(frame.kwargs), keys, values, self.implementation, layer_idx)
                    self.calls[frame.name] = call
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def cached_calls(model: torch.nn.Module) -> dict[str, CachedCall]:
    """Run a forward of LENGTH tokens after PAST cached ones; by name, the modules that update the cache or hold such.

    Empty where the model takes no cache.
    """
    run = runner(model)
    if cache_parameter(run) is None:
        return {}
    recorder = Recorder(model)
    cache = _RecordingCache(recorder, "sdpa" if supports_sdpa(model) else "eager")
    with probing(model):
        inputs = probe_inputs(model, PAST + LENGTH)
        first = {name: value[:, :PAST] for name, value in inputs.items()}
        run(**first, **with_cache(run, cache))
        rest = {name: value[:, PAST:] for name, value in inputs.items() if name != "attention_mask"}
        if "attention_mask" in inputs:
            rest["attention_mask"] = inputs["attention_mask"]
        with recorder.watching(model):
            run(**rest, **with_cache(run, cache))
    return cache.calls


def bound(frame: Frame) -> list[tuple[str, Any]]:
    """The leaves of a module's arguments by their paths."""
    leaves, _ = pytree.tree_flatten_with_path((frame.args, frame.kwargs))
    return [(pytree.keystr(path), leaf) for path, leaf in leaves]

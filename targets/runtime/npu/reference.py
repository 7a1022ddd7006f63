"""Reference implementations of the fused operators on CPU, registered where torch_npu has none.

They compute in float32 what the documentation of torch_npu says, quirks included: a mask is True where not to attend;
a single query without rotary part ignores ``sparse_mode`` and its tokens. A call that the kernels refuse is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from attnedit.compiler.compatibility.torch_names import has_kernel
from attnedit.compiler.errors import AttneditError
from attnedit.targets.runtime.npu import reference_attention as attention
from attnedit.targets.runtime.npu import reference_experts as experts
from attnedit.targets.runtime.npu.schema import real_operators, schemas


def rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Compute ``npu_rms_norm``: ``x / rms(x) * gamma``, and ``1 / rms(x)`` in float32 [.., 1]."""
    return _normalised(input, gamma.float(), epsilon, "npu_rms_norm", gamma)


def gemma_rms_norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Compute ``npu_gemma_rms_norm``: the same with ``1 + gamma``."""
    return _normalised(input, 1 + gamma.float(), epsilon, "npu_gemma_rms_norm", gamma)


def add_rms_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``npu_add_rms_norm``: the norm of ``x1 + x2``, ``1 / rms``, and the sum."""
    total = x1 + x2
    return (*_normalised(total, gamma.float(), epsilon, "npu_add_rms_norm", gamma), total)


def _normalised(x: Tensor, factor: Tensor, epsilon: float, name: str, gamma: Tensor) -> tuple[Tensor, Tensor]:
    if gamma.dtype != x.dtype or gamma.shape != x.shape[-gamma.dim() :]:
        raise AttneditError(f"{name}: gamma {gamma.dtype} {tuple(gamma.shape)} for {x.dtype} {tuple(x.shape)}")
    inverse = (x.float().square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (x.float() * inverse * factor).to(x.dtype), inverse


def rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    """Compute ``npu_rotary_mul`` of [B, N, S, D] with cosines and sines [B or 1, 1, S, D]."""
    if rotate is not None or rotary_mode not in ("half", "interleave"):
        raise AttneditError(f"npu_rotary_mul: the reference does not know rotary_mode {rotary_mode!r} with a matrix")
    size = input.shape[-1]
    if input.dim() != 4 or r1.dim() != 4 or size % 2 or size >= 896 or r1.shape != r2.shape or r1.shape[-1] != size:
        raise AttneditError(f"npu_rotary_mul: {tuple(input.shape)} turned by {tuple(r1.shape)}, {tuple(r2.shape)}")
    x = input.float()
    if rotary_mode == "half":
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat((-second, first), dim=-1)
    else:
        turned = torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    return (x * r1.float() + turned * r2.float()).to(input.dtype)


def swiglu(input: Tensor, dim: int = -1) -> Tensor:
    """Compute ``npu_swiglu``: the first half's silu times the second half."""
    gate, up = input.float().chunk(2, dim=dim)
    return (torch.nn.functional.silu(gate) * up).to(input.dtype)


def scatter_pages(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    """Compute ``npu_scatter_pa_kv_cache`` of tokens [R, G, D] into pages [blocks, block, G, D], mode "Norm"."""
    name = "npu_scatter_pa_kv_cache"
    if cache_mode not in (None, "Norm") or compress_lens is not None or seq_lens is not None:
        raise AttneditError(f"{name}: the reference does not know cache_mode {cache_mode}")
    if slot_mapping.dtype not in (torch.int32, torch.int64) or len({x.dtype for x in (key, value, key_cache)}) > 1:
        raise AttneditError(f"{name}: {key.dtype} tokens at {slot_mapping.dtype} slots of {key_cache.dtype}")
    for cache_, new in ((key_cache, key), (value_cache, value)):
        if cache_.shape[2:] != new.shape[1:] or len(slot_mapping) != len(new):
            raise AttneditError(f"{name}: {tuple(new.shape)} at {len(slot_mapping)} slots of {tuple(cache_.shape)}")
        cache_.view(-1, *cache_.shape[2:])[slot_mapping.long()] = new


def scatter_update(input: Tensor, indices: Tensor, updates: Tensor, axis: int) -> Tensor:
    """Compute ``scatter_update_``: row b of the updates goes to place ``indices[b]`` of `axis` of row b."""
    if indices.dim() != 1 or input.dim() != updates.dim() or input.dtype != updates.dtype:
        raise AttneditError(f"scatter_update_: {tuple(updates.shape)} at {tuple(indices.shape)}")
    for row, place in enumerate(indices.tolist()):
        input[row].narrow(axis % input.dim() - 1, place, updates.shape[axis]).copy_(updates[row])
    return input


def scatter_rows(input: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """Compute ``npu_scatter_nd_update_`` of rows: ``input[indices[i, 0]] = updates[i]``."""
    if indices.dim() != 2 or indices.shape[1] != 1 or indices.dtype not in (torch.int32, torch.int64):
        raise AttneditError(f"npu_scatter_nd_update_: indices {indices.dtype} {tuple(indices.shape)}")
    input[indices[:, 0].long()] = updates
    return input


def _nothing(*others: Any, **options: Any) -> None:
    return None


def _same(input: Tensor, *others: Any, **options: Any) -> Tensor:
    return input


REFERENCES: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None]] = {
    "npu_add_rms_norm": (add_rms_norm, add_rms_norm),
    "npu_fused_infer_attention_score_v2": (attention.infer, attention.infer_shapes),
    "npu_fusion_attention": (attention.train, None),
    "npu_gemma_rms_norm": (gemma_rms_norm, gemma_rms_norm),
    "npu_grouped_matmul": (experts.grouped_matmul, experts.grouped_matmul_shapes),
    "npu_moe_finalize_routing": (experts.combine, experts.combine),
    "npu_moe_gating_top_k_softmax": (experts.gate_softmax, experts.gate_softmax),
    "npu_moe_init_routing_v2": (experts.route, experts.route_shapes),
    "npu_rms_norm": (rms_norm, rms_norm),
    "npu_rotary_mul": (rotary_mul, rotary_mul),
    "npu_scatter_nd_update_": (scatter_rows, _same),
    "npu_scatter_pa_kv_cache": (scatter_pages, _nothing),
    "npu_swiglu": (swiglu, swiglu),
    "scatter_update_": (scatter_update, _same),
}
"""Operator -> implementation and shapes, of which an implementation that reads no values tells by itself; None where
autograd is to follow the implementation."""


@cache
def register() -> tuple[str, ...]:
    """Register the references of all operators that nothing else registered; safe to call often.

    Where torch_npu registered them, which has no kernels for the CPU, the references become just those: an export on an
    Ascend host is checked as anywhere else. Schemas, shape functions and the NPU's kernels are torch_npu's then.

    Returns:
        The operators that are ours now. Empty where torch_npu is imported.
    """
    real = real_operators()
    absent = sorted(set(schemas()) - real)
    for name in sorted(real):
        compute, shapes = REFERENCES[name]
        if shapes is not None and not has_kernel(f"npu::{name}", "CPU"):
            _libraries.append(torch.library.Library("npu", "IMPL"))
            _libraries[-1].impl(name, compute, "CPU")
    if absent:
        _libraries.append(torch.library.Library("npu", "FRAGMENT"))
    for name in absent:
        compute, shapes = REFERENCES[name]
        _libraries[-1].define(schemas()[name])
        if shapes is None:
            _libraries[-1].impl(name, compute, "CompositeImplicitAutograd")
        else:
            _libraries[-1].impl(name, compute, "CPU")
            _libraries[-1].impl(name, shapes, "Meta")
    return tuple(absent)


_libraries: list[torch.library.Library] = []

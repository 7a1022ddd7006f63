"""One decode step of latent attention in one kernel: when it applies, in what blocks, and the operator itself.

Absorbed attention reads the latent twice in plain torch, once for the logits and once for the output, and its
logits too. `attnedit::latent_decode` reads it once. Fused kernels of others stop at head sizes of 256, or know one
latent size only.

Shapes: B batch, S cached tokens, H heads, r latent, 2s rotary values.
"""

from __future__ import annotations

import functools
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Blocks", "choose_blocks", "choose_splits", "decodes_fused", "latent_decode"]

MIN_SHARE = 256
"""Cached tokens below which one split is not divided further."""
RESERVED = 4096
"""Bytes of shared memory left to the compiler: reductions, barriers, converted tiles."""


@dataclass(frozen=True)
class Blocks:
    """How the work of one program is cut.

    Attributes:
        heads: query heads of one program, a power of two of at least 16.
        tokens: cached tokens per tile.
        warps: of one program.
        stages: tiles in flight.
        resident: how many programs share one processor.
    """

    heads: int
    tokens: int
    warps: int
    stages: int
    resident: int


def choose_blocks(heads: int, rank: int, rope: int, shared_memory: int) -> Blocks | None:
    """Say how a program works, or None where no tile fits into its memory.

    Few warps with many registers each do best: they hold the sum over keys, 64 KiB of floats for 32 heads of 512
    values (docs/notebook/2026-11-gpu-decode.md).

    Args:
        heads: H.
        rank: r.
        rope: 2 s.
        shared_memory: bytes that the programs of one processor may have.
    """
    block = min(32, _power(heads))
    held = block * _power(rank)
    if held > 32 * 1024:
        return None
    tokens, warps = (32, 4) if held <= 32 * 512 else (16, 8)
    columns = _power(rank) + (_power(rope) if rope else 0)
    reserved = RESERVED if warps == 4 else RESERVED + 2 * block * columns
    for stages in (3, 2):
        size = 2 * stages * tokens * columns + reserved
        if size <= shared_memory:
            resident = 2 if warps == 4 and 2 * size <= shared_memory else 1
            return Blocks(block, tokens, warps, stages, resident)
    return None


def choose_splits(programs: int, keys: int, places: int) -> int:
    """Say into how many parts the sequence is cut, so that the last round of programs leaves few places idle.

    Args:
        programs: without splits: batch times blocks of heads.
        keys: S.
        places: how many programs run at a time.
    """
    most = max(1, min(-(-keys // MIN_SHARE), -(-places // programs) * 2))

    def busy(splits: int) -> float:
        rounds = programs * splits / places
        return rounds / math.ceil(rounds)

    # Fewest among those within a twentieth of the best: every part costs a start and a sum.
    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.95 * best)


def decodes_fused(query: Tensor | None, query_rope: Tensor | None, latent: Tensor, mask: Tensor | None) -> bool:
    """Say whether `latent_decode` takes a step of one query per sequence; plain torch does the others.

    It does on an NVIDIA GPU since Hopper, with triton, in fp16 and bf16, where no gradient is asked for, the mask is
    the same for all heads, and a tile fits into shared memory.

    Args:
        query: [B, H, 1, r] or None.
        query_rope: [B, H, 1, 2 s] or None.
        latent: [B, S, r].
        mask: None or [B or 1, 1 or H, 1, S].
    """
    some = query if query is not None else query_rope
    if some is None or some.shape[2] != 1 or latent.dtype not in (torch.float16, torch.bfloat16):
        return False
    if mask is not None and mask.shape[1] != 1:
        return False
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (query, query_rope, latent)):
        return False
    rope = 0 if query_rope is None else query_rope.shape[-1]
    return (
        _runs_on(latent.device)
        and _blocks(_heads(query, query_rope), latent.shape[-1], rope, latent.device) is not None
    )


def latent_decode(
    query: Tensor | None,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None = None,
    length: Tensor | None = None,
) -> Tensor:
    """Attend with one absorbed query per sequence: softmax(query . latent + query_rope . slots) latent.

    Args:
        query: [B, H, r], scaled; None where the latent gives no logits.
        query_rope: [B, H, 2 s], scaled; None without slots.
        latent: [B, S, r], fp16 or bf16.
        slots: [B, S, 2 s].
        mask: None, bool [B or 1, S] with True where to attend, or floats to add to the logits.
        length: int64, one element on the device: only so many keys are filled. None where all are.

    Returns:
        [B, H, r] in the dtype of the latent; zeros for a query that may attend to nothing.
    """
    result: Tensor = torch.ops.attnedit.latent_decode(query, query_rope, latent, slots, mask, length)
    return result


def _heads(query: Tensor | None, query_rope: Tensor | None) -> int:
    either = query if query is not None else query_rope
    if either is None:
        raise AssertionError("MLAConfig allows no attention without keys")
    return either.shape[1]


def _launch(
    query: Tensor | None,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    rope = 0 if query_rope is None else query_rope.shape[-1]
    blocks = _blocks(_heads(query, query_rope), latent.shape[-1], rope, latent.device)
    if blocks is None:
        raise AssertionError("decodes_fused said so")
    with torch.cuda.device_of(latent):  # triton launches on the current device
        return run_kernels(query, query_rope, latent, slots, mask, length, blocks)


def run_kernels(
    query: Tensor | None,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    blocks: Blocks,
    splits: int | None = None,
) -> Tensor:
    """Run `latent_decode` in the given blocks and number of splits (chosen where None)."""
    from attnedit.targets.attention.mla.decode_kernels import attend_split, sum_splits

    batch, heads = latent.shape[0], _heads(query, query_rope)
    keys, rank = latent.shape[1:]
    rope = 0 if query_rope is None else query_rope.shape[-1]
    query, query_rope = (None if x is None else x.contiguous() for x in (query, query_rope))
    latent, slots = _by_rows(latent), _by_rows(slots)
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "add"
    if mask is not None:
        mask = mask.contiguous().view(torch.int8) if kind == "bool" else mask.contiguous()
    programs = batch * -(-heads // blocks.heads)
    if splits is None:
        splits = choose_splits(programs, keys, blocks.resident * _processors(latent.device))
    context = torch.empty((batch, heads, rank), dtype=latent.dtype, device=latent.device)
    parts = context if splits == 1 else context.new_empty((batch, splits, heads, rank), dtype=torch.float32)
    mass = context.new_empty((batch, splits, heads), dtype=torch.float32)
    attend_split[(programs, splits)](
        latent if query is None else query,
        latent if query_rope is None else query_rope,
        latent,
        slots,
        latent if mask is None else mask,
        latent if length is None else length,
        parts,
        mass,
        keys,
        heads,
        splits,
        0 if mask is None or mask.shape[0] == 1 else mask.shape[1],
        RANK=rank,
        ROPE=rope,
        LATENT_ROW=latent.stride(1),
        SLOT_ROW=slots.stride(1) if rope else 0,
        NOPE=query is not None,
        MASK=kind,
        LENGTH=length is not None,
        BLOCK_R=_power(rank),
        BLOCK_S=_power(rope) if rope else 16,
        BLOCK_H=blocks.heads,
        BLOCK_N=blocks.tokens,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
        num_stages=blocks.stages,
    )
    if splits > 1:
        many = _power(splits)
        wide = max(16, min(128, 8192 // many))
        sum_splits[(batch * heads, -(-rank // wide))](
            parts, mass, context, heads, splits, RANK=rank, SPLITS=many, BLOCK_R=wide
        )
    return context


def _by_rows(x: Tensor) -> Tensor:
    """[B, S, .] as the kernel walks it: columns side by side, sequences a whole number of rows apart."""
    regular = x.shape[-1] == 0 or (x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.contiguous()


def _power(size: int) -> int:
    """The least power of two that holds a size and that a matrix product takes."""
    return max(16, 1 << (size - 1).bit_length())


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _runs_on(device: torch.device) -> bool:
    """Whether triton kernels run there: a GPU of NVIDIA's since Hopper, or any processor under triton's interpreter."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return False
    if device.type == "cuda":
        return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)
    return device.type == "cpu" and _interpreted()


@functools.cache
def _blocks(heads: int, rank: int, rope: int, device: torch.device) -> Blocks | None:
    if device.type != "cuda":
        return choose_blocks(heads, rank, rope, 1 << 20)
    properties: Any = torch.cuda.get_device_properties(device)  # its type lacks the attribute
    return choose_blocks(heads, rank, rope, properties.shared_memory_per_block_optin)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _fake(
    query: Tensor | None,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
) -> Tensor:
    return latent.new_empty((latent.shape[0], _heads(query, query_rope), latent.shape[2]))


# A copy of this file may be loaded beside it, from a checkpoint with code.
if not hasattr(torch.ops.attnedit, "latent_decode"):
    _OPERATOR = torch.library.custom_op("attnedit::latent_decode", _launch, mutates_args=())
    _OPERATOR.register_fake(_fake)

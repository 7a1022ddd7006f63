"""One decode step of latent attention in one kernel: when it applies, which kernel, and the operator itself.

Absorbed attention reads the latent twice in plain torch, once for the logits and once for the output, and its
logits too. `attnedit::latent_decode` reads it once: on Hopper in a kernel whose warps have roles, elsewhere, and for
caches that the copy engine does not take, in one of plain triton. Fused kernels of others stop at head sizes of 256, or
know one latent size only.

Shapes: B batch, S cached tokens, H heads, r latent, 2s rotary values.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from attnedit.targets.attention.mla.decode_sizes import Blocks, Roles, choose_blocks, choose_roles, choose_splits
from attnedit.targets.attention.triton_support import learns, power, runs_on

__all__ = ["attend_parts", "by_rows", "choose_cut", "decodes_fused", "fits", "latent_decode"]

REGISTERS = 160
"""Of a thread that weighs the latent, in the kernel with roles: sums of half of 1,024 columns, and some more."""


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
    if (mask is not None and mask.shape[1] != 1) or learns(query, query_rope, latent):
        return False
    rope = 0 if query_rope is None else query_rope.shape[-1]
    return fits(_heads(query, query_rope), latent.shape[-1], rope, latent.device)


def fits(heads: int, rank: int, rope: int, device: torch.device) -> bool:
    """Whether a kernel runs there that takes such a latent."""
    return runs_on(device) and _blocks(heads, rank, rope, device) is not None


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
        latent: [B, S, r], fp16 or bf16; finite also in places that are not filled, which are weighed with 0.
        slots: [B, S, 2 s], likewise.
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
    latent, slots = by_rows(latent), by_rows(slots)
    with torch.cuda.device_of(latent):  # triton launches on the current device
        return run_kernels(query, query_rope, latent, slots, mask, length, choose_cut(query, query_rope, latent, slots))


def choose_cut(query: Tensor | None, query_rope: Tensor | None, latent: Tensor, slots: Tensor) -> Blocks | Roles:
    """Say which kernel takes a step that `decodes_fused` said one does, and how it is cut; caches by rows."""
    rope = 0 if query_rope is None else query_rope.shape[-1]
    sizes = (_heads(query, query_rope), latent.shape[-1], rope, latent.device)
    roles = None if query is None else hopper_roles(*sizes)  # logits of slots alone are too rare to have been tried
    copied = roles is not None and _copies(latent, roles.tokens) and (not rope or _copies(slots, roles.tokens))
    cut: Blocks | Roles | None = roles if copied else _blocks(*sizes)
    if cut is None:
        raise AssertionError("decodes_fused said so")
    return cut


def run_kernels(
    query: Tensor | None,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    cut: Blocks | Roles,
    splits: int | None = None,
) -> Tensor:
    """Run `latent_decode` cut in a given way, into a number of parts of the sequence (chosen where None)."""
    parts, mass = attend_parts(query, query_rope, by_rows(latent), by_rows(slots), mask, length, cut, splits)
    return sum_parts(parts, mass, latent.dtype)


def sum_parts(parts: Tensor, mass: Tensor, dtype: torch.dtype) -> Tensor:
    """Put together what `attend_parts` returns: [B, H, r] in a dtype."""
    from attnedit.targets.attention.mla.decode_kernels import sum_splits

    batch, splits, heads, rank = parts.shape
    if splits == 1:
        return parts[:, 0]
    context = torch.empty((batch, heads, rank), dtype=dtype, device=parts.device)
    many = power(splits)
    wide = max(16, min(128, 8192 // many))
    sum_splits[(batch * heads, -(-rank // wide))](
        parts, mass, context, heads, splits, RANK=rank, SPLITS=many, BLOCK_R=wide
    )
    return context


def attend_parts(
    query: Tensor | None,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    cut: Blocks | Roles,
    splits: int | None = None,
    most: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend with each part of the sequence alone.

    Args:
        query: as of `latent_decode`, like `query_rope`, `mask` and `length`.
        query_rope: [B, H, 2s].
        latent: [B, S, r], by rows.
        slots: [B, S, 2s], likewise.
        mask: None or [B or 1, S].
        length: filled keys, or None.
        cut: of the work.
        splits: n; chosen where None.
        most: parts; they are then in the dtype of the latent, as the only one is.

    Returns:
        The mean of each part [B, n, H, r], in float32 where there are several, and the logarithm to the base of 2 of
        its sum of exponentials, float32 [B, n, H].
    """
    from attnedit.targets.attention.mla.decode_kernels import attend_split

    batch, heads = latent.shape[0], _heads(query, query_rope)
    keys, rank = latent.shape[1:]
    rope = 0 if query_rope is None else query_rope.shape[-1]
    query, query_rope = (x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (query, query_rope))
    kind = "none" if mask is None else "bool" if mask.dtype == torch.bool else "add"
    if mask is not None:
        mask = mask.contiguous().view(torch.int8) if kind == "bool" else mask.contiguous()
    programs = batch * -(-heads // cut.heads)
    if splits is None:
        splits = choose_splits(programs, keys, cut.resident * processors(latent.device), cut.tokens)
    splits = min(splits, most or splits)
    dtype = latent.dtype if splits == 1 or most else torch.float32
    parts = torch.empty((batch, splits, heads, rank), dtype=dtype, device=latent.device)
    mass = parts.new_empty((batch, splits, heads), dtype=torch.float32)
    common: dict[str, Any] = {
        "query": latent if query is None else query,
        "query_rope": latent if query_rope is None else query_rope,
        "mask": latent if mask is None else mask,
        "length": latent if length is None else length,
        "context": parts,
        "mass": mass,
        "keys": keys,
        "heads": heads,
        "splits": splits,
        "mask_row": 0 if mask is None or mask.shape[0] == 1 else mask.shape[1],
        "query_batch": 0 if query is None else query.stride(0),
        "query_head": 0 if query is None else query.stride(1),
        "rope_batch": 0 if query_rope is None else query_rope.stride(0),
        "rope_head": 0 if query_rope is None else query_rope.stride(1),
        "RANK": rank,
        "ROPE": rope,
        "MASK": kind,
        "LENGTH": length is not None,
        "BLOCK_H": cut.heads,
        "BLOCK_N": cut.tokens,
    }
    if isinstance(cut, Roles):
        attend_in_roles((programs, splits), latent, slots if rope else latent, cut, common)
    else:
        attend_split[(programs, splits)](
            latent=latent,
            slots=slots,
            **common,
            NOPE=query is not None,
            LATENT_ROW=latent.stride(1),
            SLOT_ROW=slots.stride(1) if rope else 0,
            BLOCK_R=power(rank),
            BLOCK_S=power(rope) if rope else 16,
            STAGES=cut.stages,
            num_warps=cut.warps,
            num_stages=cut.stages,
        )
    return parts, mass


def attend_in_roles(grid: tuple[int, int], latent: Tensor, slots: Tensor, cut: Roles, common: dict[str, Any]) -> None:
    """Launch the kernel with roles over latent [B, S, r] and slots [B, S, 2s], or the latent again without slots.

    Over pages [blocks, tokens of a block, r + 2s], which are both, where `common` says so (`PAGE` and what goes with
    it).
    """
    from attnedit.targets.attention.mla.decode_hopper import WIDTH, attend_split, described

    attend_split[grid](
        described(latent, cut.tokens),
        described(slots, cut.tokens),
        **{"table": latent, "table_row": 0, "page_rows": 0, "PAGE": 0, "SLOT": 0, **common},
        CR=-(-common["RANK"] // WIDTH.value),
        CS=-(-common["ROPE"] // WIDTH.value),
        TILES=cut.tiles,
        REGISTERS=REGISTERS,
        num_warps=4,
        maxnreg=128,
    )


def by_rows(x: Tensor) -> Tensor:
    """[B, S, .] as the kernel walks it: columns side by side, sequences a whole number of rows apart."""
    regular = x.shape[-1] == 0 or (x.stride(2) == 1 and x.stride(0) == x.shape[1] * x.stride(1))
    return x if regular else x.contiguous()


def _copies(x: Tensor, tokens: int) -> bool:
    """Whether the copy engine may bring tiles of a tensor [B, S, .]: rows begin at multiples of 16 bytes.

    And no tile reaches into the next sequence: what is not finite there would spoil this one.
    """
    batch, keys = x.shape[:2]
    aligned = x.data_ptr() % 16 == 0 and x.stride(1) * x.element_size() % 16 == 0
    return aligned and 0 < batch * keys < 1 << 31 and (batch == 1 or keys % tokens == 0)


@functools.cache
def _blocks(heads: int, rank: int, rope: int, device: torch.device) -> Blocks | None:
    return choose_blocks(heads, rank, rope, _shared_memory(device))


@functools.cache
def hopper_roles(heads: int, rank: int, rope: int, device: torch.device) -> Roles | None:
    """The cut of the kernel with roles: on Hopper, whose matrix unit it is made for, and where triton has gluon."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return None
    try:
        from attnedit.targets.attention.mla import decode_hopper  # noqa: F401
    except ImportError:  # gluon is there since triton 3.4, under names that may change
        return None
    return choose_roles(heads, rank, rope, _shared_memory(device))


def _shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return 1 << 20
    properties: Any = torch.cuda.get_device_properties(device)  # its type lacks the attribute
    size: int = properties.shared_memory_per_block_optin
    return size


@functools.cache
def processors(device: torch.device) -> int:
    """How many a device has."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _fake(query: Tensor | None, query_rope: Tensor | None, latent: Tensor, *_: object) -> Tensor:
    return latent.new_empty((latent.shape[0], _heads(query, query_rope), latent.shape[2]))


# A copy of this file may be loaded beside it, from a checkpoint with code.
if not hasattr(torch.ops.attnedit, "latent_decode"):
    _OPERATOR = torch.library.custom_op("attnedit::latent_decode", _launch, mutates_args=())
    _OPERATOR.register_fake(_fake)

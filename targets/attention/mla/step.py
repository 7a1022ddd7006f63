"""What surrounds the decode kernel of latent attention, in few launches for a few sequences: when, and the operators.

One token of one sequence is a chain of small products: the latent and its slots, the query taken down to the latent and
turned, the mean raised again. `attnedit::latent_inputs` makes all of the first in one launch, and
`attnedit::latent_decode_raised` sums and raises in another. Many sequences fill the card with torch's own products.

Shapes: B batch, S cached tokens, H heads, E size of the states, d query size, dv value size, r latent, s slots.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnedit.compiler.compatibility.live import is_plain_linear
from attnedit.compiler.compatibility.torch_names import exporting
from attnedit.targets.attention.kernels import kernel_for
from attnedit.targets.attention.mla.decode import attend_parts, by_rows, choose_cut, fits
from attnedit.targets.attention.triton_support import learns, power

__all__ = ["latent_decode_raised", "latent_inputs", "surrounded"]

MOST_SEQUENCES = 32
"""Beyond them torch's products are as fast: the card is busy with more than weights."""
MOST_SIZE = 256
"""Of a query, and of its rotary values: beyond it a product leaves the chip's registers."""
MOST_ROWS = 256
"""Splits of all sequences that one program raises."""
COLUMNS, STATES, RAISED = 16, 256, 64
"""What a program of `latent_inputs` makes: columns of the cache, from so many states at a time; columns of a query."""


def surrounded(
    query: Tensor,
    states: Tensor,
    mask: Tensor | None,
    kv: nn.Linear,
    up: nn.Linear,
    rope_weight: Tensor | None,
) -> bool:
    """Say whether a step takes these operators: half precision, a few sequences, and no gradient is asked for.

    Args:
        query: [B, H, T, d].
        states: [B, T, E].
        mask: None, [B or 1, 1 or H, 1, S] or [B, S].
        kv: projects states to the latent and its slots.
        up: projects the latent to keys and values.
        rope_weight: [H, 2s, d]; None without slots.
    """
    batch, heads, length, size = query.shape
    if length != 1 or batch > MOST_SEQUENCES or size > MOST_SIZE or exporting():
        return False
    if not (is_plain_linear(kv) and is_plain_linear(up)) or (
        mask is not None and mask.dim() == 4 and mask.shape[1] > 1
    ):
        return False
    given = [x for x in (query, states, kv.weight, kv.bias, up.weight, rope_weight) if x is not None]
    if query.dtype not in (torch.float16, torch.bfloat16) or any(x.dtype != query.dtype for x in given):
        return False
    if learns(*given):
        return False
    rope = 0 if rope_weight is None else rope_weight.shape[1]
    return kernel_for(query) is None and rope <= MOST_SIZE and fits(heads, up.weight.shape[1], rope, query.device)


def latent_inputs(
    query: Tensor,
    states: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor | None,
    up_weight: Tensor,
    rope_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that one token's attention over the latent begins with.

    Args:
        query: [B, H, d], before rotation and scale; fp16 or bf16, as all others.
        states: [B, E].
        kv_weight: [r + 2s, E], rows as those of `MLA.kv_a_proj_with_mqa`.
        kv_bias: [r + 2s] or None.
        up_weight: [H (d + dv), r], rows as those of `MLA.kv_b_proj`.
        rope_weight: [H, 2s, d]; None without slots.
        cos: [B or 1, s]; None without slots.
        sin: likewise.
        scale: of the logits.

    Returns:
        Queries [B, H, r] and [B, H, 2s], both scaled and the second turned; the latent [B, r], and its slots [B, 2s],
        turned.
    """
    result: tuple[Tensor, Tensor, Tensor, Tensor] = torch.ops.attnedit.latent_inputs(
        query, states, kv_weight, kv_bias, up_weight, rope_weight, cos, sin, scale
    )
    return result


def latent_decode_raised(
    query: Tensor,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    up_weight: Tensor,
    size: int,
) -> Tensor:
    """`latent_decode`, and its result raised to values of `size`: [B, H, dv] by the last rows of each head's weight.

    Args:
        query: as of `latent_decode`; never None.
        query_rope: as there, like `latent`, `slots`, `mask` and `length`.
        latent: [B, S, r].
        slots: [B, S, 2s].
        mask: None or [B or 1, S].
        length: filled keys, or None.
        up_weight: [H (d + dv), r].
        size: dv.
    """
    result: Tensor = torch.ops.attnedit.latent_decode_raised(
        query, query_rope, latent, slots, mask, length, up_weight, size
    )
    return result


def _inputs(
    query: Tensor,
    states: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor | None,
    up_weight: Tensor,
    rope_weight: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from attnedit.targets.attention.mla.step_kernels import before_step

    batch, heads, size = query.shape
    made = _inputs_like(query, states, kv_weight, kv_bias, up_weight, rope_weight)
    rank, slots = up_weight.shape[1], 0 if rope_weight is None else rope_weight.shape[1] // 2
    query, states = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, states))
    # Of a table that all share, and of one sequence, no second row is read.
    row = 0 if cos is None or cos.shape[0] == 1 else slots
    cos, sin = (query if x is None else x.contiguous() for x in (cos, sin))
    programs = -(-rank // COLUMNS) + -(-slots // COLUMNS) + heads * (-(-rank // RAISED) + (slots > 0))
    with torch.cuda.device_of(query):  # triton launches on the current device
        before_step[(programs,)](
            query,
            states,
            kv_weight.contiguous(),
            query if kv_bias is None else kv_bias,
            up_weight.contiguous(),
            query if rope_weight is None else rope_weight.contiguous(),
            cos,
            sin,
            *made,
            scale,
            batch,
            heads,
            *query.stride()[:2],
            states.stride(0),
            row,
            RANK=rank,
            SLOTS=slots,
            D=size,
            UP=up_weight.shape[0] // heads,
            E=states.shape[1],
            BIAS=kv_bias is not None,
            BLOCK_B=power(batch),
            BLOCK_D=power(size),
            BLOCK_E=STATES,
            BLOCK_R=RAISED,
            BLOCK_S=power(max(1, slots)),
            BLOCK_C=COLUMNS,
            num_warps=4,
            num_stages=3,
        )
    return made


def _inputs_like(
    query: Tensor,
    states: Tensor,
    kv_weight: Tensor,
    kv_bias: Tensor | None,
    up_weight: Tensor,
    rope_weight: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads = query.shape[:2]
    rank, rope = up_weight.shape[1], 0 if rope_weight is None else rope_weight.shape[1]
    sizes = ((batch, heads, rank), (batch, heads, rope), (batch, rank), (batch, rope))
    down, rotary, latent, slots = (query.new_empty(size) for size in sizes)
    return down, rotary, latent, slots


def _raised(
    query: Tensor,
    query_rope: Tensor | None,
    latent: Tensor,
    slots: Tensor,
    mask: Tensor | None,
    length: Tensor | None,
    up_weight: Tensor,
    size: int,
) -> Tensor:
    from attnedit.targets.attention.mla.step_kernels import after_step

    batch, heads, rank = query.shape
    sequences = 1 << (batch - 1).bit_length()
    latent, slots = by_rows(latent), by_rows(slots)
    with torch.cuda.device_of(latent):  # triton launches on the current device
        cut = choose_cut(query, query_rope, latent, slots)
        given = (query, query_rope, latent, slots, mask, length, cut)
        parts, mass = attend_parts(*given, most=MOST_ROWS // sequences)
        splits = max(1 << (parts.shape[1] - 1).bit_length(), 16 // sequences)
        rows = sequences * splits
        wide = 32 if rows <= 64 else 64
        out = latent.new_empty((batch, heads, size))
        after_step[(heads, -(-size // wide))](
            parts,
            mass,
            up_weight.contiguous(),
            out,
            batch,
            heads,
            parts.shape[1],
            RANK=rank,
            DV=size,
            UP=up_weight.shape[0] // heads,
            BLOCK_B=sequences,
            SPLITS=splits,
            BLOCK_R=64,
            BLOCK_V=wide,
            num_warps=4 if rows <= 128 else 8,
            num_stages=3,
        )
    return out


def _raised_like(query: Tensor, query_rope: Tensor | None, latent: Tensor, *others: Any) -> Tensor:
    return latent.new_empty((*query.shape[:2], others[-1]))


# A copy of this file may be loaded beside it, from a checkpoint with code.
if not hasattr(torch.ops.attnedit, "latent_inputs"):
    _INPUTS = torch.library.custom_op("attnedit::latent_inputs", _inputs, mutates_args=())
    _INPUTS.register_fake(_inputs_like)
    _RAISED = torch.library.custom_op("attnedit::latent_decode_raised", _raised, mutates_args=())
    _RAISED.register_fake(_raised_like)

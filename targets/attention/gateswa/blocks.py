"""All blocks of a prefill through sliding-window attention at once, in a fused kernel.

Queries are cut into blocks, and every block is a row of one call of torch's attention: with the columns that some query
of it sees, and the sink slots. The work is linear in the length, and no logits are held.

Shapes: B batch, T new tokens, H heads, G key/value heads, n sink slots, C columns, N blocks of b queries, d query and
key size, dv value size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.view import View
from attnedit.targets.attention.kernels import Virtual, with_virtual_keys

HELD_BYTES = 1 << 28
"""Keys, values and masks that are copied for one call, roughly: longer prefills take several."""


def attend_in_blocks(query: Tensor, view: View, config: GateSWAConfig, virtual: Virtual, block: int) -> Tensor:
    """Attend with all queries to a view without masks.

    Args:
        query: [B, H, T, d], rotated.
        view: of the keys; `near`, `far` and `documents` are None.
        config: of the attention, whose window shows.
        virtual: logits [H] of keys without a token, and their values [G, dv] or None for 0.
        block: b.

    Returns:
        [B, T, H, dv].
    """
    batch, _, length, _ = query.shape
    slots, window = view.slots.shape[1], config.sliding_window
    count = -(-length // block)
    # Block j sees columns j b - W + 1 to j b + b - 1, counted from the first query's; the first may not be there.
    left, right = window - 1 - view.before, count * block - length
    keys, values = (_columns(x[:, :, slots:], left, right) for x in (view.keys, view.values))
    columns = view.columns[max(0, -left) :]
    columns = F.pad(columns, (max(0, left), right), value=FUTURE)
    query = F.pad(query, (0, 0, 0, right))
    width = window - 1 + block
    held = batch * (width + slots) * (keys[..., 0].shape[1] * (keys.shape[3] + values.shape[3]) + block)
    share = count if torch.compiler.is_compiling() else max(1, HELD_BYTES // (held * keys.element_size()))
    out = []
    for first in range(0, count, share):
        last = min(first + share, count)
        low, high = first * block, last * block
        position = (torch.arange(low, high, device=query.device) + view.past).unflatten(0, (-1, block))
        seen = _seen(position, columns[low : high + window - 1].unfold(0, width, block), view.slots, window)
        held_keys, held_values = (
            _blocked(x[:, :, low : high + window - 1], own[:, :, :slots], width, block)
            for x, own in ((keys, view.keys), (values, view.values))
        )
        out.append(_attend(query[:, :, low:high], held_keys, held_values, seen, config.scale, virtual))
    return (out[0] if len(out) == 1 else torch.cat(out, dim=1))[:, :length]


FUTURE = torch.iinfo(torch.long).max // 2
"""Position of a column that is not there: after every query."""


def _columns(x: Tensor, left: int, right: int) -> Tensor:
    """Cut or pad [B, G, C, .] before, and pad it behind."""
    return F.pad(x[:, :, max(0, -left) :], (0, 0, max(0, left), right))


def _blocked(x: Tensor, slots: Tensor, width: int, block: int) -> Tensor:
    """[B, G, W - 1 + N b, .] as overlapping blocks after the slots [B, G, n, .]: [B, G, N, n + width, .]."""
    parts = x.unfold(2, width, block).transpose(-1, -2)
    if not slots.shape[2]:
        return parts
    return torch.cat((slots[:, :, None].expand(-1, -1, parts.shape[2], -1, -1), parts), dim=3)


def _seen(position: Tensor, columns: Tensor, slots: Tensor, window: int) -> Tensor:
    """Mask [B or 1, N, b, n + width] of positions [N, b], columns [N, width] and slots [B, n]."""
    behind = position[:, :, None] - columns[:, None]
    # Queries beyond the last see what follows it, so that no row is empty.
    near = ((behind >= 0) & (behind < window))[None]
    near = near | ~near.any(-1, keepdim=True)
    if not slots.shape[1]:
        return near
    far = position[None, :, :, None] - slots[:, None, None] >= window
    return torch.cat((far, near.expand(far.shape[0], -1, -1, -1)), dim=-1)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    seen: Tensor,
    scale: float,
    virtual: Virtual,
) -> Tensor:
    """Attend with [B, H, N b, d] to [B, G, N, S, .] under [B or 1, N, b, S]; returns [B, N b, H, dv]."""
    batch, groups, count, _, size = values.shape
    heads, block = query.shape[1], seen.shape[2]
    # Blocks are rows of a batch.
    query = query.unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)
    keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (keys, values))
    mask = seen.expand(batch, -1, -1, -1).flatten(0, 1)[:, None]
    if virtual:
        query, keys, values, mask = with_virtual_keys(query, keys, values, mask, scale, virtual)
    # The heads of a group stand side by side as more queries: fused kernels under a mask take no shared keys.
    query = query.unflatten(1, (groups, -1)).flatten(2, 3)
    mask = mask.repeat(1, 1, heads // groups, 1)
    wide = -(-max(query.shape[-1], size) // 8) * 8
    query, keys, values = (F.pad(x, (0, wide - x.shape[-1])) for x in (query, keys, values))
    # The kernel reads masks in whole vectors.
    rows = -keys.shape[2] % 8
    keys, values, mask = (
        F.pad(keys, (0, 0, 0, rows)),
        F.pad(values, (0, 0, 0, rows)),
        F.pad(mask, (0, rows), value=False),
    )
    out = F.scaled_dot_product_attention(query, keys, values, mask, scale=scale)[..., :size]
    out = out.unflatten(2, (heads // groups, block)).flatten(1, 2)
    result: Tensor = out.unflatten(0, (batch, count)).permute(0, 1, 3, 2, 4).flatten(1, 2)
    return result

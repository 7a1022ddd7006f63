"""References of mixtures of experts: gating, routing, grouped products, and bringing rows back together.

Shapes: R tokens, E experts, k experts per token, D size of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnedit.compiler.errors import AttneditError
from attnedit.targets.runtime.npu.limits import grouped_matmul_refusal


def gate_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``npu_moe_gating_top_k_softmax`` of logits [R, E]: softmax, then the k largest.

    Returns:
        Weights [R, k], experts int32 [R, k], and the rows' places in [k, R] as int32 [R, k].
    """
    if finished is not None or not 0 < k <= min(x.shape[-1], 1024):
        raise AttneditError(f"npu_moe_gating_top_k_softmax: finished {finished is not None}, k {k} of {x.shape[-1]}")
    weights, chosen = x.float().softmax(dim=-1).topk(k, dim=-1)
    rows = x.shape[0]
    of_row, of_choice = (torch.arange(count, dtype=torch.int32, device=x.device) for count in (rows, k))
    place = of_row[:, None] + rows * of_choice
    return weights.to(x.dtype), chosen.int(), place


def route(
    x: Tensor,
    expert_idx: Tensor,
    *,
    scale: Tensor | None = None,
    offset: Tensor | None = None,
    active_num: int = -1,
    expert_capacity: int = -1,
    expert_num: int = -1,
    drop_pad_mode: int = 0,
    expert_tokens_num_type: int = 0,
    expert_tokens_num_flag: bool = False,
    quant_mode: int = -1,
    active_expert_range: Sequence[int] = (),
    row_idx_type: int = 0,
    x_dtype: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute ``npu_moe_init_routing_v2``: tokens [R, D] sorted by the experts [R, k] that they go to.

    Known are all tokens (`active_num` -1) and experts (`active_expert_range` [0, E]), counted for each expert
    (`expert_tokens_num_type` 1), without quantisation. `row_idx_type` 0 asks for the sorted row that every (token,
    choice) went to, 1 for the reverse.

    Returns:
        [R k, D]; int32 [R k]; int64 [E]; an empty tensor.
    """
    whole = list(active_expert_range) == [0, expert_num] and active_num in (-1, 0)
    plain = scale is None and offset is None and quant_mode == -1 and drop_pad_mode == 0 and x_dtype is None
    if not whole or not plain or expert_tokens_num_type != 1 or not expert_tokens_num_flag or expert_num < 1:
        raise AttneditError("npu_moe_init_routing_v2: the reference knows all experts, counted, without quantisation")
    if expert_idx.dtype != torch.int32:
        raise AttneditError(f"npu_moe_init_routing_v2: expert_idx is {expert_idx.dtype}, not int32")
    flat = expert_idx.flatten().long()
    order = flat.argsort(stable=True)
    place = order if row_idx_type == 1 else torch.empty_like(order).scatter(0, order, torch.arange(len(order)))
    counts = torch.bincount(flat, minlength=expert_num)
    return x[order // expert_idx.shape[1]], place.int(), counts, x.new_empty(0, dtype=torch.float32)


def route_shapes(
    x: Tensor, expert_idx: Tensor, *, expert_num: int = -1, **options: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Shapes of `route`."""
    rows = expert_idx.shape[0] * expert_idx.shape[1]
    return (
        x.new_empty((rows, x.shape[1])),
        x.new_empty((rows,), dtype=torch.int32),
        x.new_empty((expert_num,), dtype=torch.int64),
        x.new_empty((rows,), dtype=torch.float32),
    )


def grouped_matmul(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    *,
    bias: Sequence[Tensor] | None = None,
    group_list: Tensor | None = None,
    split_item: int | None = 0,
    group_type: int | None = None,
    group_list_type: int | None = 0,
    **others: Any,
) -> list[Tensor]:
    """Compute ``npu_grouped_matmul`` of one tensor of sorted rows [R, D] with weights [E, D, O]: one of [R, O].

    `group_list` has the rows of each expert, int64 [E], or with `group_list_type` 0 their running sum.
    """
    if any(value is not None and value != 0 for value in others.values()):
        raise AttneditError("npu_grouped_matmul: the reference knows no quantisation and no activation")
    if len(x) != 1 or len(weight) != 1 or split_item not in (2, 3) or group_type != 0 or group_list is None:
        raise AttneditError("npu_grouped_matmul: the reference knows one tensor of rows, grouped by a list")
    if group_list.dtype != torch.int64 or x[0].dtype != weight[0].dtype:
        raise AttneditError(f"npu_grouped_matmul: {x[0].dtype}, {weight[0].dtype}, group_list {group_list.dtype}")
    if refusal := grouped_matmul_refusal(weight[0].shape[1], weight[0].shape[2]):
        raise AttneditError(f"npu_grouped_matmul: {refusal}")
    counts = group_list if group_list_type == 1 else group_list.diff(prepend=group_list.new_zeros(1))
    parts = []
    for index, rows in enumerate(x[0].split([int(count) for count in counts])):
        product = rows.float() @ weight[0][index].float()
        parts.append(product if bias is None else product + bias[0][index].float())
    return [torch.cat(parts).to(x[0].dtype)]


def grouped_matmul_shapes(x: Sequence[Tensor], weight: Sequence[Tensor], **options: Any) -> list[Tensor]:
    """Shapes of `grouped_matmul`."""
    return [x[0].new_empty((x[0].shape[0], weight[0].shape[-1]))]


def combine(
    expanded_permuted_rows: Tensor,
    skip1: Tensor | None,
    skip2: Tensor | None,
    bias: Tensor | None,
    scales: Tensor | None,
    expanded_src_to_dst_row: Tensor,
    export_for_source_row: Tensor | None,
    drop_pad_mode: int | None = 0,
    k: int | None = 1,
) -> Tensor:
    """Compute ``npu_moe_finalize_routing``: the weighted sum [R, D] of each token's rows [R k, D], by `scales` [R, k].

    Row ``i + j R`` of `expanded_src_to_dst_row` says where choice j of token i lies. Biases and rows to skip are
    not modelled; `k` and `export_for_source_row` are read only with those.
    """
    if skip1 is not None or skip2 is not None or bias is not None or scales is None or drop_pad_mode != 0:
        raise AttneditError("npu_moe_finalize_routing: the reference knows weights alone")
    if expanded_src_to_dst_row.dtype != torch.int32 or scales.dtype != expanded_permuted_rows.dtype:
        raise AttneditError(f"npu_moe_finalize_routing: {expanded_src_to_dst_row.dtype} rows, {scales.dtype} weights")
    rows = expanded_permuted_rows[expanded_src_to_dst_row.long()].float()
    rows = rows.unflatten(0, (scales.shape[1], scales.shape[0]))
    out: Tensor = (rows * scales.float().T[..., None]).sum(0).to(expanded_permuted_rows.dtype)
    return out

"""Mixtures of experts by grouped products, as transformers' experts interface wants them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from attnedit.compiler.compatibility.transformers_names import apply_gate, has_default_gate
from attnedit.compiler.errors import AttneditError
from attnedit.targets.runtime.npu.limits import grouped_matmul_refusal

EXPERTS = "attnedit_npu"
"""Name of the experts implementation, to transformers."""

ops = torch.ops.npu


def npu_experts(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Send tokens to their experts, sorted, and bring them back; returns [R, D].

    Args:
        module: transformers' module of all experts, with weights [E, out, in], or [E, in, out] where ``is_transposed``.
        hidden_states: [R, D].
        top_k_index: experts of each token, [R, k].
        top_k_weights: their weights, [R, k].

    Raises:
        AttneditError: the experts have something that grouped products do not compute.
    """
    # Earlier versions of transformers have no experts that end in a norm, and no such name.
    if getattr(module, "has_post_expert_norm", False) or not module.has_gate:
        raise AttneditError(f"{type(module).__name__} has experts without a gate or with a norm of their own")
    rows, _, counts, _ = routed = ops.npu_moe_init_routing_v2(
        hidden_states.contiguous(),
        top_k_index.to(torch.int32),
        expert_num=module.num_experts,
        active_expert_range=[0, module.num_experts],
        expert_tokens_num_type=1,
        expert_tokens_num_flag=True,
    )
    up = _grouped(rows, module, "gate_up_proj", counts)
    down = _grouped(_gated(module, up), module, "down_proj", counts)
    # Routing numbers (token, choice) by token, and combining reads them by choice.
    places = routed[1].view(top_k_index.shape).t().flatten()
    out: Tensor = ops.npu_moe_finalize_routing(
        down, None, None, None, top_k_weights.to(down.dtype).contiguous(), places, None
    )
    return out


def _grouped(rows: Tensor, module: Any, name: str, counts: Tensor) -> Tensor:
    """Rows [R, in], sorted by expert, times each expert's weight."""
    weight = getattr(module, name)
    weight = weight if module.is_transposed else weight.transpose(1, 2)
    if refusal := grouped_matmul_refusal(weight.shape[1], weight.shape[2]):
        raise AttneditError(f"{type(module).__name__}.{name}: {refusal}")
    bias = [getattr(module, f"{name}_bias")] if module.has_bias else None
    out: Tensor = ops.npu_grouped_matmul(
        [rows], [weight], bias=bias, group_list=counts, split_item=2, group_type=0, group_list_type=1
    )[0]
    return out


def _gated(module: Any, up: Tensor) -> Tensor:
    """The gate of the experts: fused where it is silu of the first half, the module's own elsewhere."""
    silu = isinstance(getattr(module, "act_fn", None), torch.nn.SiLU | SiLUActivation)
    if module.is_concatenated and silu and has_default_gate(module):
        gated: Tensor = ops.npu_swiglu(up)
        return gated
    own: Tensor = apply_gate(module, up)
    return own


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, npu_experts)

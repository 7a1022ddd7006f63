"""From a live model to two exported programs, a prompt's and a token's, that call ``torch.ops.npu``.

Shapes: B batch, T new tokens, M blocks per row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from attnedit.compiler.compatibility.caches import with_cache
from attnedit.targets.runtime.eager import share_copy
from attnedit.targets.runtime.npu.attention import NPU, lower
from attnedit.targets.runtime.npu.cache import Step, calling, current_step, npu_cache
from attnedit.targets.runtime.npu.experts import EXPERTS
from attnedit.targets.runtime.npu.fuse import fuse
from attnedit.targets.runtime.npu.legalise import LayerPlan
from attnedit.targets.runtime.npu.limits import BLOCK, MASK
from attnedit.targets.runtime.npu.simplify import drop_assertions
from attnedit.targets.runtime.tracing import traceable

Phase = Literal["prefill", "decode"]
PHASES: tuple[Phase, ...] = ("prefill", "decode")

TRACED_LENGTH = 11
"""Tokens of the prompt that is traced; any number from 2 to the capacity may come later."""


@dataclass(frozen=True)
class Sizes:
    """What is fixed in both programs.

    Attributes:
        batch: B.
        blocks: M, blocks of every row's paged buffers.
    """

    batch: int
    blocks: int

    @property
    def capacity(self) -> int:
        """Tokens that a row may have."""
        return self.blocks * BLOCK


class _CachedModel(nn.Module):
    """A model as a function of tensors and numbers: inputs of a phase to logits, with caches written in place."""

    triangle: Tensor

    def __init__(self, model: PreTrainedModel, plans: Sequence[LayerPlan], phase: Phase) -> None:
        super().__init__()
        self.model, self.plans, self.phase = model, tuple(plans), phase
        self.register_buffer("triangle", torch.ones((MASK, MASK), dtype=torch.bool).triu(1))

    def forward(
        self,
        input_ids: Tensor,
        lengths: Tensor,
        block_table: Tensor,
        caches: dict[str, Tensor],
        counts: list[int] | None = None,
    ) -> Tensor:
        if self.phase == "prefill":
            step = Step.of_prompt(input_ids, lengths, block_table, self.triangle)
        else:
            step = Step.of_token(lengths, counts or (), block_table, self.triangle)
        cache: Any = npu_cache(self.plans, caches)
        call: Any = self.model
        positions = step.positions.expand(input_ids.shape[0], -1)
        with calling(step, cache):
            out = call(input_ids=input_ids, position_ids=positions, **with_cache(self.model, cache))
        logits: Tensor = out.logits
        return logits


def inputs(plans: Sequence[LayerPlan], sizes: Sizes, phase: Phase, dtype: torch.dtype) -> dict[str, Any]:
    """Make inputs of a phase: empty caches, rows of one token (prefill: right after) or two, identity block tables."""
    length = TRACED_LENGTH if phase == "prefill" else 1
    made: dict[str, Any] = {
        "input_ids": torch.ones((sizes.batch, length), dtype=torch.int64),
        "lengths": torch.full((sizes.batch,), max(length, 2)),
        "block_table": torch.arange(sizes.batch * sizes.blocks, dtype=torch.int32).view(sizes.batch, sizes.blocks),
        "caches": {name: torch.zeros(shape, dtype=dtype) for name, shape in cache_shapes(plans, sizes).items()},
    }
    if phase == "decode":
        made["counts"] = [2] * sizes.batch
    return made


def cache_shapes(plans: Sequence[LayerPlan], sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of every buffer by name."""
    return {name: shape for plan in plans for name, shape in plan.caches(sizes.batch, sizes.blocks).items()}


def export_program(
    model: PreTrainedModel, plans: Sequence[LayerPlan], sizes: Sizes, phase: Phase, *, fused: bool = True
) -> ExportedProgram:
    """Trace one phase of a model, which is left as it was.

    Returns:
        A program of ``input_ids`` [B, T] (T is free in prefill, 1 in decode), ``lengths`` int64 [B], ``block_table``
        int32 [B, M], ``caches`` and, in decode, ``counts`` (the lengths again, as numbers), to logits [B, 1, V] of
        each row's last token.

    Raises:
        AttneditError: torch could not trace it.
    """
    copy = share_copy(model)
    lower(copy, list(plans))
    example = inputs(plans, sizes, phase, copy.dtype)
    shapes: dict[str, Any] = {name: None for name in example}
    shapes["caches"] = dict.fromkeys(example["caches"])
    if phase == "prefill":
        shapes["input_ids"] = {1: Dim.AUTO(min=2, max=sizes.capacity)}
        _last_tokens_only(copy)
    else:
        shapes["counts"] = [Dim.DYNAMIC] * sizes.batch
    with traceable(copy, NPU, EXPERTS if fused else "batched_mm", "the NPU"):
        wrapper = _CachedModel(copy, plans, phase).eval()
        traced = torch.export.export(wrapper, (), example, dynamic_shapes=shapes, strict=False)
        module = fuse(traced, fused)
        final = torch.export.export(module, (), example, dynamic_shapes=shapes, strict=False)
        drop_assertions(final.graph)
        final.graph_module.recompile()
        return final


def _last_tokens_only(model: PreTrainedModel) -> None:
    """Give the output projection each row's last real token alone: a prompt's other logits are not needed."""
    head: Any = model.get_output_embeddings()

    def pick(module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor]:
        (hidden,) = given
        last = (current_step().lengths - 1)[:, None, None].expand(-1, 1, hidden.shape[-1])
        return (hidden.gather(1, last),)

    head.register_forward_pre_hook(pick)


def operators(programs: Mapping[Phase, ExportedProgram]) -> dict[str, dict[str, int]]:
    """Count the fused operators of each phase."""
    counted: dict[str, dict[str, int]] = {}
    for phase, program in programs.items():
        found = counted.setdefault(phase, {})
        for node in program.graph.nodes:
            if node.op == "call_function" and str(node.target).startswith("npu."):
                name = str(node.target).split(".")[1]
                found[name] = found.get(name, 0) + 1
    return counted

"""What an exported directory says of itself: ``attnedit-npu.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnedit.compiler.reporting.report import ranges
from attnedit.targets.runtime.npu.legalise import PLAIN
from attnedit.targets.runtime.npu.run_npu import FORMAT_KEY, FORMAT_VERSION, MANIFEST_FILE


@dataclass(frozen=True)
class Manifest:
    """Description of an exported model.

    Attributes:
        source: name of the source model's class.
        dtype: of weights and caches.
        soc: system on chip whose limits decided.
        torch_npu: version whose schemas the programs call.
        batch: rows.
        blocks: blocks of each row in paged buffers.
        block_size: tokens per block.
        vocab_size: V, the last axis of the logits.
        max_positions: positions the model has; None where its configuration names none.
        eos_token_id: tokens that end a text.
        pad_token_id: what fills up finished rows.
        caches: shape of every buffer.
        programs: "prefill" and "decode": their files.
        operators: fused operators of each program, with their number.
        decisions: of the legaliser, two for each layer.
        aliases: weights that are other weights.
        checks: comparisons with the live model, on the reference operators, in float32.
        rounded_checks: the same in `dtype`; root mean squares.
        executed_on_npu: whether any of this ran on an NPU. This exporter has none.
    """

    source: str
    dtype: str
    soc: str
    torch_npu: str
    batch: int
    blocks: int
    block_size: int
    vocab_size: int
    max_positions: int | None
    eos_token_id: list[int]
    pad_token_id: int
    caches: dict[str, list[int]]
    programs: dict[str, str]
    operators: dict[str, dict[str, int]]
    decisions: list[dict[str, Any]]
    aliases: dict[str, str] = field(default_factory=dict)
    checks: list[dict[str, Any]] = field(default_factory=list)
    rounded_checks: list[dict[str, Any]] = field(default_factory=list)
    executed_on_npu: bool = False

    @property
    def summary(self) -> list[str]:
        """The legaliser's decisions in words, alike ones together."""
        layers: dict[tuple[Any, ...], list[int]] = {}
        for decision in self.decisions:
            key = tuple(decision[name] for name in ("phase", "kernel", "reason", "work", "cached", "needed"))
            layers.setdefault(key, []).append(decision["layer"])
        return [
            f"layers {ranges(found)}, {phase}: {'plain products' if kernel == PLAIN else 'fused'}, {reason}; "
            f"{work:g} times the work, {cached} values cached per token of {needed} needed"
            for (phase, kernel, reason, work, cached, needed), found in layers.items()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {FORMAT_KEY: FORMAT_VERSION, **asdict(self)}

    def write(self, directory: Path) -> None:
        """Write the file into a directory."""
        (directory / MANIFEST_FILE).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

"""Before anything is exported: which attentions of a model fused kernels run, and what would have to change."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rich.table import Table
from transformers import PreTrainedModel

from attnedit.compiler.model_io.heads import check_text_alone
from attnedit.compiler.reporting.report import ranges
from attnedit.targets.runtime.npu.legalise import PLAIN, Decision, LayerPlan, Surveyed, advice, legalise
from attnedit.targets.runtime.npu.limits import SOCS
from attnedit.targets.runtime.npu.survey import survey
from attnedit.targets.runtime.staging import check_choice


def inspect(model: PreTrainedModel, *, soc: str = "910b", dtype: str | None = None) -> dict[str, Any]:
    """Ask the legaliser about every attention of a model.

    Args:
        model: rewritten or not; on meta is enough.
        soc: "910b", "910_93" or "310p".
        dtype: "bfloat16" or "float16"; the chip's best unless told.

    Returns:
        JSON values: ``soc``, ``dtype``, ``fallbacks`` (phases of layers that no fused kernel runs), and ``kinds``:
        alike layers with their two decisions, and the sizes with which latent attention there stays fused.

    Raises:
        UsageError: no such chip or dtype, or an attention cannot be lowered at all.
    """
    check_choice("--soc", soc, SOCS)
    chip = SOCS[soc]
    chosen = chip.dtypes[0] if dtype is None else dtype
    check_choice("--dtype", chosen, chip.dtypes)
    check_text_alone(model.config, type(model).__name__, "an NPU export")
    kinds: dict[Surveyed, list[LayerPlan]] = {}
    for surveyed in survey(model):
        kinds.setdefault(replace(surveyed, layer=0), []).append(legalise(surveyed, chip, chosen))
    plans = [plan for group in kinds.values() for plan in group]
    return {
        "soc": soc,
        "dtype": chosen,
        "fallbacks": sum(not decision.fused for plan in plans for decision in (plan.prefill, plan.decode)),
        "kinds": [
            {
                "layers": [plan.surveyed.layer for plan in group],
                "attention": surveyed.form,
                "prefill": _facts(group[0].prefill),
                "decode": _facts(group[0].decode),
                "latent_sizes": advice(surveyed, chip),
            }
            for surveyed, group in kinds.items()
        ],
    }


def _facts(decision: Decision) -> dict[str, Any]:
    return {name: value for name, value in decision.to_dict().items() if name not in ("layer", "phase")}


def table(found: dict[str, Any]) -> Table:
    """Show what `inspect` found."""
    shown = Table(title=f"Ascend {found['soc']}, {found['dtype']}: {found['fallbacks']} fallbacks")
    for column in ("layers", "attention", "phase", "kernel", "why", "work", "cached values", "latent sizes that fit"):
        shown.add_column(column)
    for kind in found["kinds"]:
        for phase in ("prefill", "decode"):
            decision = kind[phase]
            cached = f"{decision['cached']} (needs {decision['needed']})"
            first = phase == "prefill"
            shown.add_row(
                ranges(kind["layers"]) if first else "",
                kind["attention"] if first else "",
                phase,
                "matmul" if decision["kernel"] == PLAIN else "fused",
                decision["reason"],
                f"{decision['work']:g}x",
                cached if phase == "decode" else "",
                kind["latent_sizes"] if first else "",
            )
    return shown

"""What a compilation did, layer by layer: a table to read and JSON to keep."""

from __future__ import annotations

import io
import resource
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import BaseModel, Field, field_validator
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from attnedit.compiler.capture.sites import by_reason
from attnedit.compiler.formats import FORMAT_KEY, check_format
from attnedit.compiler.reporting.records import (
    KVCurve,
    KVUsage,
    LayerReport,
    LossCurve,
    PipelineStage,
    RuleReport,
    SiteGraphs,
    StageReport,
    Verification,
)

FORMAT_VERSION = 1
"""Of reports as JSON. Fields with a default are added without a new one."""


class Report(BaseModel):
    """Everything a compilation has to say about itself.

    Attributes:
        format_version: of its JSON; see `from_json`.
        attnedit_version: that compiled the model; empty in reports that did not say.
        source: name of the source model.
        target: what its attention became.
        sites_matched: attention sites found.
        sites_rewritten: of those, how many were replaced.
        layers: one row per site.
        rules: what each rewrite did, in order.
        verification: contracts checked, with their errors.
        kv_budget_asked: as given; None where none was.
        kv_budget_achieved: cached values per token and layer of the result, as a fraction of the source's.
        kv_bytes_before: bytes per token over all layers at ``context_length``.
        kv_bytes_after: the same of the result.
        context_length: the length that layers with a window are averaged over.
        calibration: where the data came from.
        calibration_tokens: how many were used.
        calibration_length: tokens of the longest windows that the closed form was fitted on; None where nothing was.
        calibration_windows: how many of each length.
        training_length: tokens of the windows that it was trained on; None where it was not.
        seconds: per stage, in order.
        peak_memory_bytes: of the process, at the end.
        gpu_memory_bytes: tensors of the process on all CUDA GPUs, at most; None where it used none.
        full_layers: layers that kept every token in the cache, where others got a window; None elsewhere.
        pipeline: what each stage did, in order.
        stages: of training.
        perplexity: on held-out calibration windows: "source", "start" (no training yet), and after "fit" and "distill".
        recipe: what was asked for, with choices that were measured; see `attnedit.recipe.Recipe`.
        notes: what the user should know.
        license: of the source, as its model card says; None if not known.
        kv_curve: memory of the cache against the length of the context; None in reports of earlier versions.
        loss_curve: loss over position, last measured; None where nothing was fitted, or by a quick job.
        left: attention of other kinds and layers without any, by module: why each stays as it is.
        graphs: before and after, of each kind of attention module.
    """

    format_version: int = FORMAT_VERSION
    attnedit_version: str = ""
    source: str
    target: str
    sites_matched: int
    sites_rewritten: int
    layers: list[LayerReport]
    rules: list[RuleReport] = Field(default_factory=list)
    verification: list[Verification] = Field(default_factory=list)
    kv_budget_asked: float | None = None
    kv_budget_achieved: float
    kv_bytes_before: float
    kv_bytes_after: float
    context_length: int
    calibration: str = ""
    calibration_tokens: int = 0
    calibration_length: int | None = None
    calibration_windows: str = ""
    training_length: int | None = None
    seconds: dict[str, float] = Field(default_factory=dict)
    peak_memory_bytes: int = 0
    gpu_memory_bytes: int | None = None
    full_layers: list[int] | None = None
    pipeline: list[PipelineStage] = Field(default_factory=list)
    stages: list[StageReport] = Field(default_factory=list)
    perplexity: dict[str, float] = Field(default_factory=dict)
    recipe: dict[str, Any] = Field(default_factory=dict)
    notes: list[str] = Field(default_factory=list)
    license: str | None = None
    kv_curve: KVCurve | None = None
    loss_curve: LossCurve | None = None
    left: dict[str, str] = Field(default_factory=dict)
    graphs: list[SiteGraphs] = Field(default_factory=list)

    @field_validator("format_version")
    @classmethod
    def _known(cls, version: int) -> int:
        check_format({FORMAT_KEY: version}, FORMAT_VERSION, "the report")
        return version

    def to_json(self) -> str:
        """The whole report as one JSON object, graphs included.

        Returns:
            Text that `from_json` reads; numbers that are not finite become null.
        """
        return self.model_dump_json()

    def to_dict(self) -> dict[str, Any]:
        """The same as plain Python values, without the graphs: what ``--json`` prints.

        Returns:
            JSON values by field.
        """
        return self.model_dump(mode="json", exclude={"graphs"})

    def to_html(self) -> str:
        """A page for browsers: figures, plots per layer, memory, and the graphs as drawings.

        Returns:
            One HTML document that needs no other file.
        """
        from attnedit.compiler.reporting.report_html import report_html  # imports matplotlib's and jinja's machinery

        return report_html(self)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """Read what `to_json` wrote, in this version or an earlier one.

        Args:
            text: one JSON object.

        Returns:
            The report; what it does not say has its default.

        Raises:
            pydantic.ValidationError: it is something else.
            UsageError: it has a format that this version does not know.
        """
        return cls.model_validate_json(text)

    def __rich__(self) -> RenderableType:
        return Group(self._table(), Text(self._summary()))

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=110, color_system=None)
        with console.capture() as captured:
            console.print(self)
        return captured.get().rstrip()

    def columns(self) -> dict[str, list[str]]:
        """Figures per layer as text, by heading; those that say nothing are left out."""
        columns: dict[str, list[str]] = {
            "rank": [_number(row.kv_lora_rank) for row in self.layers],
            "rotary": [_number(row.qk_rope_head_dim) for row in self.layers],
            "window": [_number(row.sliding_window) for row in self.layers],
            **{
                name.replace("_", " "): [_listed(row.figures.get(name)) for row in self.layers]
                for name in dict.fromkeys(name for row in self.layers for name in row.figures)
            },
            "loss": ["-" if row.loss_increase is None else f"{row.loss_increase:.4f}" for row in self.layers],
            "values before": [f"{row.values_before:g}" for row in self.layers],
            "after": [f"{row.values_after:g}" for row in self.layers],
            "energy kept": ["-" if row.energy_kept is None else f"{row.energy_kept:.2%}" for row in self.layers],
            "output error": ["-" if row.output_error is None else f"{row.output_error:.2e}" for row in self.layers],
        }
        unused = {"window", "loss"} if self.full_layers is None else {"rank", "rotary", "energy kept", "loss"}
        if not any(row.kv_lora_rank for row in self.layers):
            unused |= {"rank", "rotary", "energy kept"}
        return {name: cells for name, cells in columns.items() if name not in unused or set(cells) - {"-"}}

    def _table(self) -> Table:
        table = Table(title=f"{self.source} to {self.target}: {self.sites_rewritten} of {self.sites_matched} sites")
        table.add_column("layer", justify="right")
        table.add_column("attention")
        table.add_column("becomes")
        shown = self.columns()
        for heading in shown:
            table.add_column(heading, justify="right")
        for index, row in enumerate(self.layers):
            table.add_row(str(row.layer), row.name, row.kind, *(cells[index] for cells in shown.values()))
        return table

    def _summary(self) -> str:
        asked = "" if self.kv_budget_asked is None else f" (asked {self.kv_budget_asked:.4g})"
        lines = [
            f"KV cache   {self.kv_bytes_before:,.0f} -> {self.kv_bytes_after:,.0f} bytes per token, "
            f"budget {self.kv_budget_achieved:.4g}{asked} at {self.context_length:,} tokens"
        ]
        if self.calibration:
            windows = f" in windows: {self.calibration_windows}" if self.calibration_windows else ""
            lines.append(f"calibrated {self.calibration_tokens:,} tokens of {self.calibration}{windows}")
        for done in self.stages:
            speed = done.tokens / max(done.seconds, 1e-9)
            rate = f" at rate {done.learning_rate:.2g}" if done.learning_rate else ""
            rate += f", lowered {done.backed_off} times for a layer that got worse" if done.backed_off else ""
            lines.append(
                f"trained    {done.name}: held-out loss {done.before:.4g} -> {done.best:.4g} (step {done.best_step} of "
                f"{done.steps}, {done.skipped} skipped){rate}, {done.tokens:,} tokens, {speed:,.0f} per second"
            )
        if self.perplexity:
            found = ", ".join(f"{when} {value:.2f}" for when, value in self.perplexity.items())
            lines.append(f"perplexity {found} on held-out windows")
        for rule in self.rules:
            place = f" ({rule.place})" if rule.place else ""
            counts = f"{rule.matched} matched, {rule.rewritten} rewritten"
            rejected = "".join(f", {count} rejected: {reason}" for reason, count in rule.rejected.items())
            missed = f", nearest miss: {rule.nearest_miss}" if rule.nearest_miss else ""
            lines.append(f"rule       {rule.name}{place}: {counts} in {rule.seconds:.1f} s{rejected}{missed}")
        lines += [f"left       {line}" for line in by_reason(self.left.items())]
        for check in self.verification:
            lines.append(f"verified   {check}")
        if self.seconds:
            stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in self.seconds.items())
            lines.append(f"seconds    {sum(self.seconds.values()):.1f}: {stages}")
        if self.peak_memory_bytes:
            lines.append(f"memory     {self.memory}")
        return "\n".join([*lines, *(f"note       {note}" for note in self.notes)])

    @property
    def memory(self) -> str:
        """What was used at most, in words."""
        gpu = "" if self.gpu_memory_bytes is None else f", {self.gpu_memory_bytes / 2**30:.2f} GiB on GPUs"
        return f"{self.peak_memory_bytes / 2**30:.2f} GiB at most{gpu}"


def used_memory() -> Mapping[str, Any]:
    """The fields of `Report` on memory."""
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else None
    allocated = None if gpus is None else sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus)
    return {"peak_memory_bytes": peak_memory_bytes(), "gpu_memory_bytes": allocated}


def kv_fields(before: KVUsage, after: KVUsage) -> Mapping[str, Any]:
    """The fields of `Report` that follow from two measured caches.

    >>> fields = kv_fields(KVUsage((4.0, 4.0), 32.0, 8), KVUsage((1.0, 3.0), 16.0, 8))
    >>> fields["kv_budget_achieved"], fields["kv_bytes_after"]
    (0.5, 16.0)
    """
    return {
        "kv_budget_achieved": after.values_per_token_layer / before.values_per_token_layer,
        "kv_bytes_before": before.bytes_per_token,
        "kv_bytes_after": after.bytes_per_token,
        "context_length": before.length,
    }


def peak_memory_bytes() -> int:
    """Largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)


def _listed(value: Any) -> str:
    """A figure of any kind; lists with commas."""
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else _number(value)


def ranges(layers: Sequence[int]) -> str:
    """Write layer numbers shortly.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    """
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and runs[-1][-1] == layer - 1:
            runs[-1][1:] = [layer]
        else:
            runs.append([layer])
    return ", ".join("-".join(map(str, run)) for run in runs)

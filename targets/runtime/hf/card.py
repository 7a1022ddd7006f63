"""The model card (README.md) of a directory: what was done to which model, what it cost, how to load it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import ModelCardData

from attnedit.compiler.model_io.licenses import CARD_FILE, source_license
from attnedit.compiler.reporting.report import Report
from attnedit.targets.attention.kinds import find_kind
from attnedit.targets.runtime.eager.checkpoint import HTML_FILE, REPORT_FILE

__all__ = ["CARD_FILE", "NATIVE", "OURS", "REMOTE", "model_card", "write_about"]

PAPER = "https://arxiv.org/abs/2604.05688"

NATIVE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")"""
REMOTE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory", trust_remote_code=True)"""
OURS = """import attnedit

result = attnedit.load("path/to/this/directory")
result.model  # a transformers model; after the import AutoModelForCausalLM loads the directory too"""


def write_about(report: Report | None, directory: Path, *, loading: str, form: str, notes: Iterable[str]) -> None:
    """Write the report, where there is one, and the model card of an export; arguments as of `model_card`."""
    license = None
    if report is not None:
        license = report.license or source_license(report.source)
        (directory / REPORT_FILE).write_text(report.to_json() + "\n", encoding="utf-8")
        (directory / HTML_FILE).write_text(report.to_html(), encoding="utf-8")
    card = model_card(report, loading=loading, form=form, notes=notes, license=license)
    (directory / CARD_FILE).write_text(card, encoding="utf-8")


def model_card(
    report: Report | None,
    *,
    loading: str = OURS,
    form: str | None = None,
    notes: Iterable[str] = (),
    license: str | None = None,
) -> str:
    """Write a model card: YAML metadata as the Hugging Face Hub reads it, then Markdown.

    Args:
        report: of the compilation; None where it is not known.
        loading: Python that loads the directory.
        form: name of the class or kind of checkpoint; None for attnedit's own.
        notes: further sentences on this form.
        license: of the source, as the Hub names licences; None if not known.
    """
    source = "a source model" if report is None else _display_name(report.source)
    return "\n".join(
        [
            _metadata(report, license),
            "",
            f"# {source}, {_method(report)}",
            "",
            _what_was_done(source, report),
            "",
            *(_figures(report) if report is not None else ()),
            "## How to load it",
            "",
            *([f"The files hold a {form}.", ""] if form else ()),
            "```python",
            loading,
            "```",
            "",
            *(f"- {note}" for note in notes),
            *([""] if notes else ()),
            "## Licence",
            "",
            _licence(source, license),
            "",
        ]
    )


def _display_name(source: str) -> str:
    return Path(source).name if Path(source).expanduser().exists() else source


def _method(report: Report | None) -> str:
    if report is None:
        return "another attention"
    named = ((target, find_kind(target)) for target in report.target.split("+"))
    return " and ".join(target if kind is None else kind.title for target, kind in named)


def _what_was_done(source: str, report: Report | None) -> str:
    if report is not None and any(rule.place for rule in report.rules):
        return f"[attnedit]({PAPER}) has rewritten the attention of {source} in this model: {_method(report)}."
    return (
        f"[attnedit]({PAPER}) has replaced the attention of {source} in this model by {_method(report)}, which "
        "needs a smaller key/value cache."
    )


def _metadata(report: Report | None, license: str | None) -> str:
    source = "" if report is None else report.source
    on_hub = source.count("/") == 1 and not Path(source).expanduser().exists()
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        license=license,
        base_model=source if on_hub else None,
        tags=["attnedit", *(report.target.split("+") if report is not None else ())],
    )
    return f"---\n{data.to_yaml()}\n---"


def _figures(report: Report) -> list[str]:
    """Budget, data and measurements as the report has them."""
    asked = "" if report.kv_budget_asked is None else f" (asked for: {report.kv_budget_asked:.4g})"
    rows: dict[str, str] = {
        "layers rewritten": f"{report.sites_rewritten} of {report.sites_matched}",
        "key/value cache": f"{report.kv_bytes_before:,.0f} -> {report.kv_bytes_after:,.0f} bytes per token at "
        f"{report.context_length:,} tokens",
        "cached values, of the source's": f"{report.kv_budget_achieved:.4g}{asked}",
        "calibration data": f"{report.calibration_tokens:,} tokens of {_display_name(report.calibration)}"
        + (f" in windows: {report.calibration_windows}" if report.calibration_windows else "")
        if report.calibration
        else "none needed",
    }
    for stage in report.stages:
        rows[f"training: {stage.name}"] = (
            f"{stage.steps:,} steps, {stage.tokens:,} tokens; held-out loss {stage.before:.4g} -> {stage.best:.4g}"
        )
    if report.training_length is not None:
        rows["longest text trained on"] = f"{report.training_length:,} tokens"
    if report.perplexity:
        rows["perplexity on held-out calibration text"] = _listed(report.perplexity)
    for check in report.verification:
        largest = "value" if "new values" in check.what else "logit"
        error = "" if check.error is None else f", off by {check.error:.1e} of the largest {largest}"
        rows[f"verified: {check.what}"] = f"{check.contract}{error}"
    lines = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    if not report.perplexity:
        lines += ["Quality was not measured: `attnedit eval` compares this model with its source on any text.", ""]
    return lines + [f"- {note}" for note in report.notes] + ([""] if report.notes else [])


def _listed(values: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.2f}" for name, value in values.items())


def _licence(source: str, license: str | None) -> str:
    if license is None:
        return f"The weights are derived from {source} and stand under its licence, which attnedit could not find out."
    return f"The weights are derived from {source} and stand under its licence: {license}."

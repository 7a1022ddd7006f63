"""What a compilation gives back."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NewType, Unpack, overload

import torch
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from attnedit.arguments import GGUFArguments, HFArguments, NPUArguments, OnnxArguments
from attnedit.compiler.capture.capture import capture_model
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.licenses import source_license
from attnedit.compiler.model_io.models import READING_ERRORS
from attnedit.compiler.model_io.processors import Processor, holds_processor
from attnedit.compiler.reporting.report import Report
from attnedit.compiler.rewriting.registry import RUNTIMES, registered
from attnedit.compiler.rewriting.registry import load as load_entry
from attnedit.recipe import RECIPE_FILE, Recipe
from attnedit.targets.runtime.eager import load_model, save
from attnedit.targets.runtime.eager.checkpoint import HTML_FILE, REPORT_FILE
from attnedit.targets.runtime.engines import tried
from attnedit.targets.runtime.hf.card import CARD_FILE, model_card

if TYPE_CHECKING:  # importing them takes the packages of every runtime
    from attnedit.targets.runtime.gguf.export import GGUFManifest
    from attnedit.targets.runtime.hf.export import HFManifest
    from attnedit.targets.runtime.npu.manifest import Manifest as NPUManifest
    from attnedit.targets.runtime.onnx.manifest import Manifest as OnnxManifest

Runtime = NewType("Runtime", str)
"""The name of a runtime that another package registers."""
BUILT_IN = {name: f"attnedit.targets.runtime.{name}:export" for name in ("gguf", "hf", "npu", "onnx")}


@dataclass
class CompileResult:
    """A rewritten model and what is known of it.

    Attributes:
        model: a live transformers model; `generate`, PEFT, accelerate and `save_pretrained` work on it.
        report: what matched, what was rewritten and how exactly, KV bytes before and after.
        tokenizer: saved with the model; None if none was given.
        files: saved with the model, such as the log of its training.
        processor: of a vision-language model, or the directory of one; saved with the model too.
    """

    model: PreTrainedModel
    report: Report
    tokenizer: PreTrainedTokenizerBase | None = None
    files: list[Path] = field(default_factory=list, repr=False)
    processor: Processor | None = None
    _graph: torch.fx.GraphModule | None = field(default=None, repr=False)

    @property
    def graph(self) -> torch.fx.GraphModule:
        """The rewritten model as one FX graph without cache, captured at the first use.

        Its `forward(input_ids, attention_mask)` takes int64 [B, T] twice (the mask is 1 for tokens and 0 for padding)
        and returns logits [B, T, V] in the model's dtype; without a language-model head the last hidden states
        [B, T, D].

        Raises:
            CaptureError: torch.export could not trace the model.
        """
        if self._graph is None:
            self._graph = capture_model(self.model)
        return self._graph

    def save(self, directory: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write weights, configuration, tokenizer, chat template, generation config, report, recipe and model card.

        The report is there as JSON, and as an HTML page to look at. The directory appears complete or not at all, after
        it was read back; docs/formats.md lists its files.

        Args:
            directory: where to; made with its parents.
            overwrite: replace what attnedit wrote there before. A directory with anything else is never replaced.

        Returns:
            The directory, as an absolute path.

        Raises:
            UsageError: the directory is not empty (unless `overwrite`), or cannot be written; or the model cannot be
                saved, for instance because its weights are quantised.
            AttneditError: writing failed, or what was written does not load; what was there before still is.

        Example:
            >>> result.save("qwen3-mla")  # doctest: +SKIP
            >>> attnedit.load("qwen3-mla").model.generate(**prompt)  # doctest: +SKIP
        """
        report, texts = with_license(self.report)
        files: dict[str, str | Path] = {**{file.name: file for file in self.files}, **texts}
        given: dict[str, Any] = {"overwrite": overwrite, "report": report.to_json(), "files": files}
        given["processor"] = self.processor
        return save(self.model, directory, self.tokenizer, **given)

    @overload
    def export(
        self, runtime: Literal["onnx"], directory: str | os.PathLike[str], **options: Unpack[OnnxArguments]
    ) -> OnnxManifest: ...

    @overload
    def export(
        self, runtime: Literal["hf"], directory: str | os.PathLike[str], **options: Unpack[HFArguments]
    ) -> HFManifest: ...

    @overload
    def export(
        self, runtime: Literal["gguf"], directory: str | os.PathLike[str], **options: Unpack[GGUFArguments]
    ) -> GGUFManifest: ...

    @overload
    def export(
        self, runtime: Literal["npu"], directory: str | os.PathLike[str], **options: Unpack[NPUArguments]
    ) -> NPUManifest: ...

    @overload
    def export(self, runtime: Runtime, directory: str | os.PathLike[str], **options: object) -> object: ...

    @overload
    def export(self, runtime: str, directory: str | os.PathLike[str]) -> object: ...

    def export(self, runtime: str, directory: str | os.PathLike[str], **options: object) -> object:
        """Lower to another runtime: "onnx", "hf", "gguf", "npu", or a name among the entry points `attnedit.runtimes`.

        Args:
            runtime: its name. For a type checker, `Runtime` marks the name of another package's, which may have any
                options.
            directory: where to; missing or empty. For "gguf" a new .gguf file as well.
            **options: of the runtime; see `attnedit.targets.runtime.onnx.export`,
                `attnedit.targets.runtime.hf.export`, `attnedit.targets.runtime.gguf.export` and
                `attnedit.targets.runtime.npu.export`.

        Returns:
            The manifest of what was written, with the comparisons that it passed in ``checks``. Of another package's
            runtime: what its function returns.

        Raises:
            UsageError: no runtime of that name is installed, it lacks a package, or an option makes no sense.
            VerificationError: what was written computes something else than the live model.

        Example:
            >>> result.export("onnx", "qwen3-onnx", dtype="float16").checks  # doctest: +SKIP
        """
        return find_runtime(runtime)(self, directory, **options)


def with_license(report: Report) -> tuple[Report, dict[str, str]]:
    """The report with its source's licence, and the texts that go beside it by file name: recipe, card and page."""
    license = report.license or source_license(report.source)
    report = report.model_copy(update={"license": license})
    texts = {CARD_FILE: model_card(report, license=license, notes=[tried("saved")]), HTML_FILE: report.to_html()}
    if report.recipe:
        texts[RECIPE_FILE] = Recipe.model_validate(report.recipe).to_yaml()
    return report, texts


def find_runtime(name: str) -> Callable[..., Any]:
    """Return the export function of a runtime: ``export(result, directory, **options)``.

    Raises:
        UsageError: no runtime of that name is installed, it lacks a package, or two packages register one name.
    """
    export: Callable[..., Any] = load_entry(_entry(name), "export to")
    return export


def _entry(name: str) -> EntryPoint:
    """Find a runtime; raises UsageError where there is none of that name."""
    known = registered(RUNTIMES, BUILT_IN)
    if name not in known:
        raise UsageError(f"no runtime {name!r} to export to; installed: {', '.join(sorted(known))}")
    return known[name]


def find_inspection(name: str) -> Any:
    """Return the module of a runtime, which says in advance what the runtime would make of a model.

    The module that holds its export function has ``inspect(model, **options)``, which returns JSON values, and
    ``table(values)``, which returns them for rich to print.

    Raises:
        UsageError: no runtime of that name is installed, it lacks a package, or it has no such functions.
    """
    find_runtime(name)
    module = sys.modules[_entry(name).module]
    if not hasattr(module, "inspect"):
        raise UsageError(f"the runtime {name} has nothing to inspect in advance")
    return module


def load(directory: str | os.PathLike[str], *, trust_remote_code: bool = False) -> CompileResult:
    """Read what `CompileResult.save`, ``attnedit compile`` or `attnedit.compile_checkpoint` wrote.

    Args:
        directory: a local directory.
        trust_remote_code: run the modelling code that is there, where the source came with code of its own.

    Returns:
        The model in evaluation mode, in the dtype it was saved in and on the CPU, with its report, and its tokenizer
        where one was saved.

    Raises:
        UsageError: nothing there, not an attnedit model, damaged, of a format that this version does not know, or with
            code that is not trusted.
        VerificationError: weights are missing or left over.

    Example:
        >>> result = attnedit.load("qwen3-mla")  # doctest: +SKIP
        >>> print(result.report)  # doctest: +SKIP
    """
    path = Path(directory).expanduser()
    model = load_model(path, trust_remote_code=trust_remote_code)
    report = read_report(path)
    processor = path if holds_processor(path) else None
    return CompileResult(model, report, _read_tokenizer(path, model.config, trust_remote_code), processor=processor)


def _read_tokenizer(path: Path, config: PreTrainedConfig, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if not (path / "tokenizer_config.json").exists():
        return None
    try:
        # Unset, transformers may ask on the terminal whether to run code.
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            path, config=config, local_files_only=True, trust_remote_code=trust_remote_code
        )
    except READING_ERRORS as error:
        raise UsageError(f"cannot read the tokenizer in {path}: {type(error).__name__}: {error}") from error
    return tokenizer


def read_report(directory: str | os.PathLike[str]) -> Report:
    """Read the report in a directory that `CompileResult.save` wrote.

    Raises:
        UsageError: there is none, or it is damaged.
    """
    file = Path(directory).expanduser() / REPORT_FILE
    if not file.exists():
        raise UsageError(
            f"{file.parent} has no {REPORT_FILE}: save_pretrained or a Trainer wrote it, not attnedit; load it with "
            "AutoModelForCausalLM after import attnedit, or copy the report there that the result was saved with"
        )
    try:
        return Report.from_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} cannot be read: {error}") from error

"""What an exported directory says of itself: ``attnedit-onnx.json``."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.compiler.formats import FORMAT_KEY, check_format
from attnedit.targets.runtime.onnx.cache import CacheForm, LayerCache

MANIFEST_FILE = "attnedit-onnx.json"
MODEL_FILE = "model.onnx"
PREFILL_FILE, DECODE_FILE = "prefill.onnx", "decode.onnx"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class FixedSizes:
    """Sizes of a model whose shapes are all numbers.

    Attributes:
        batch: B.
        sequence_length: T of the prefill graph; the decode graph has 1.
        capacity: tokens that the cache holds.

    Raises:
        UsageError: they are not positive, or a chunk of the prompt would fill the cache.
    """

    batch: int = 1
    sequence_length: int = 128
    capacity: int = 2048

    def __post_init__(self) -> None:
        """Refuse what cannot run."""
        if self.batch < 1 or self.sequence_length < 2 or self.capacity <= self.sequence_length:
            raise UsageError(
                f"batch {self.batch}, seq-len {self.sequence_length} and capacity {self.capacity} do not fit: give at "
                "least 1, at least 2, and more than seq-len"
            )

    def graphs(self) -> dict[str, int]:
        """Return the files, and the tokens that one call of each takes."""
        return {PREFILL_FILE: self.sequence_length, DECODE_FILE: 1}


@dataclass(frozen=True)
class Manifest:
    """Description of an exported model.

    Attributes:
        source: name of the source model's class.
        cache: "dynamic", "static" or "fixed".
        dtype: of weights and cache, "float32" or "float16".
        quantize: None, "int8" or "int4".
        opset: version of the ai.onnx operators.
        positions: whether there is an input ``position_ids``.
        vocab_size: V, the last axis of the logits.
        max_positions: positions the model has; None where its configuration names none.
        eos_token_id: tokens that end a text.
        pad_token_id: what fills up finished rows.
        layers: what each layer caches.
        checks: the comparisons with the source framework that the export passed, each with its deviation.
        flavor: "ort", "genai" or "atc".
        fixed: sizes of a model whose shapes are all numbers, in a file for prefill and one for decode.
    """

    source: str
    cache: CacheForm
    dtype: str
    quantize: str | None
    opset: int
    positions: bool
    vocab_size: int
    max_positions: int | None
    eos_token_id: list[int]
    pad_token_id: int
    layers: list[LayerCache]
    checks: list[dict[str, Any]] = field(default_factory=list)
    flavor: str = "ort"
    fixed: FixedSizes | None = None

    def write(self, directory: Path) -> None:
        """Write the file into a directory."""
        values = {FORMAT_KEY: FORMAT_VERSION, **asdict(self)}
        (directory / MANIFEST_FILE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, directory: Path) -> Manifest:
        """Read the file of a directory.

        Args:
            directory: what an export wrote.

        Returns:
            What it says of the model.

        Raises:
            UsageError: there is none, or not of this format.
        """
        file = directory / MANIFEST_FILE
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
            check_format(values, FORMAT_VERSION, str(file))
            del values[FORMAT_KEY]
            values["layers"] = [LayerCache(**layer) for layer in values["layers"]]
            values["fixed"] = None if values.get("fixed") is None else FixedSizes(**values["fixed"])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(f"{file} cannot be read: {error}; give a directory that attnedit export wrote") from error

"""Writing a GGUF, and holding what is in it against what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFType, GGUFWriter, Keys, LlamaFileType, quants
from torch import Tensor

from attnedit.compiler.errors import UsageError, VerificationError
from attnedit.targets.runtime.gguf.form import Form, largest

KINDS = {
    "float32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "float16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bfloat16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
ROUNDING = {"float32": 0.0, "float16": 2.0**-11, "bfloat16": 2.0**-8, "q8_0": 1 / 127}
"""What storing a value may change, as a fraction of the largest value in its row; of itself in floating point."""
SUBNORMAL = {"float16": 2.0**-25, "q8_0": 127 * 2.0**-25}
"""What float16 rounds off below its normal range: of a value, and of a scale times the largest integer."""
BLOCK = 32
"""Values that share a scale in q8_0."""
FLOAT16_MAX = float(np.finfo(np.float16).max)


def write_file(form: Form, keys: dict[str, Any], name: str, kind: str, file: Path) -> None:
    """Write a file: matrices in a kind of `KINDS`, vectors in float32.

    Matrices without whole blocks are float16 in place of q8_0.

    Raises:
        UsageError: a value is beyond float16.
    """
    wanted, file_type = KINDS[kind]
    writer = GGUFWriter(file, form.architecture)
    writer.add_type(GGUFType.MODEL)
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    for key, value in {**form.keys, **keys}.items():
        _add(writer, key, value)
    for title, tensor in form.tensors.items():
        stored = _kind_of(tensor, wanted)
        if stored == GGMLQuantizationType.F16 and largest(tensor) > FLOAT16_MAX:
            raise UsageError(
                f"{title} has values up to {largest(tensor):.3g}, beyond float16; give --dtype bfloat16 or float32"
            )
        values = np.ascontiguousarray(tensor.detach().cpu().float().numpy())
        if stored == GGMLQuantizationType.F32:
            writer.add_tensor(title, values)
        else:
            writer.add_tensor(title, quants.quantize(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _kind_of(tensor: Tensor, wanted: GGMLQuantizationType) -> GGMLQuantizationType:
    if tensor.ndim < 2:
        return GGMLQuantizationType.F32
    blocks = wanted != GGMLQuantizationType.Q8_0 or tensor.shape[-1] % BLOCK == 0
    return wanted if blocks else GGMLQuantizationType.F16


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


class Written:
    """A file that was written.

    Attributes:
        architecture: llama.cpp's name of it.
    """

    def __init__(self, file: Path) -> None:
        """Open it; tensors are read when they are asked for."""
        self._reader = GGUFReader(file)
        self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
        self.architecture: str = self._contents(Keys.General.ARCHITECTURE)

    def key(self, name: str) -> Any:
        """Return the value of a key, the architecture's name put in; None without."""
        return self._contents(name.format(arch=self.architecture))

    def _contents(self, name: str) -> Any:
        field = self._reader.get_field(name)
        return None if field is None else field.contents()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def tensor(self, name: str) -> Tensor:
        """Return a tensor as float32, in torch's order of dimensions."""
        stored = self._tensors[name]
        shape = tuple(int(size) for size in reversed(stored.shape))
        values = np.asarray(quants.dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        return torch.from_numpy(np.array(values)).reshape(shape)

    def names(self) -> set[str]:
        """Return the names of all tensors."""
        return set(self._tensors)


def check_file(form: Form, keys: dict[str, Any], kind: str, file: Path) -> Written:
    """Read a file back, and hold every key and every tensor against what was meant.

    Raises:
        VerificationError: something differs by more than storing rounds off.
    """
    written = Written(file)
    for key, value in {**form.keys, **keys}.items():
        found = written.key(key)
        same = np.float32(value) == np.float32(found) if isinstance(value, float) else found == value
        if not same:
            raise VerificationError(f"the written file has another {key}; nothing was kept")
    if missing := set(form.tensors) ^ written.names():
        raise VerificationError(f"the written file and the model differ in {min(missing)}; nothing was kept")
    wanted, _ = KINDS[kind]
    for name, tensor in form.tensors.items():
        stored = {kind: name for name, (kind, _) in KINDS.items()}[_kind_of(tensor, wanted)]
        meant, found = tensor.detach().cpu().float(), written.tensor(name)
        scale = meant.abs().amax(-1, keepdim=True) if stored == "q8_0" else meant.abs()
        bound = ROUNDING[stored] * scale + SUBNORMAL.get(stored, 0.0)
        if meant.shape != found.shape or not bool(((meant - found).abs() <= bound).all()):
            raise VerificationError(f"{name} was not stored as it was meant; nothing was kept")
    return written

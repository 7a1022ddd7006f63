"""A GGUF with its quantised matrices in float16, so that files of one precision are compared.

Run: python benchmarks/gguf_in_half.py SmolLM2-135M-Instruct.Q4_1.gguf source.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import gguf
import numpy as np

FILE_TYPE = "general.file_type"
MOSTLY_F16 = 1


def main() -> None:
    """Read, dequantise, write; keys and tensors keep their order."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    reader = gguf.GGUFReader(options.file)
    writer = gguf.GGUFWriter(options.out, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", "general.quantization_version"):
            continue
        value = MOSTLY_F16 if field.name == FILE_TYPE else field.contents()
        inner = field.types[1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, value, field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        data = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        # Norms stay: llama.cpp multiplies them in float32.
        writer.add_tensor(tensor.name, data.astype(np.float32 if data.ndim == 1 else np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()

"""Write both programs as AIR, for Ascend's offline compiler: ``python export_air.py --length 128 -o air``.

It runs on a host with torch_npu and CANN, beside the exported model; ``atc --framework=1 --model=FILE.air
--output=FILE --soc_version=...`` compiles what it writes. All sizes are numbers there: a prompt has `length` tokens,
and the rows' lengths are graph inputs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch


def example(manifest: Mapping[str, Any], phase: str, length: int, device: str) -> dict[str, Any]:
    """Make inputs of a phase: empty caches, and rows as long as they may be."""
    batch, blocks = manifest["batch"], manifest["blocks"]
    dtype = getattr(torch, manifest["dtype"])
    tokens = length if phase == "prefill" else 1
    whole = length if phase == "prefill" else blocks * manifest["block_size"]
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros((batch, tokens), dtype=torch.int64, device=device),
        "lengths": torch.full((batch,), whole, dtype=torch.int64, device=device),
        "block_table": torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks),
        "caches": {name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in manifest["caches"].items()},
    }
    if phase == "decode":
        inputs["counts"] = [whole] * batch
    return inputs


def main() -> None:
    """Read the command line, and write a directory for each program."""
    parser = argparse.ArgumentParser(description="Write both programs as AIR.")
    parser.add_argument("--length", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--device", default="npu:0")
    parser.add_argument("-o", "--output", type=Path, default=Path("air"))
    options = parser.parse_args()

    import torch_npu  # type: ignore[import-not-found]  # noqa: F401  # registers the device and torch.ops.npu
    import torchair  # type: ignore[import-not-found]
    from run_npu import NpuModel  # type: ignore[import-not-found]

    directory = Path(__file__).resolve().parent
    model = NpuModel.load(directory, options.device)
    manifest = json.loads((directory / "attnedit-npu.json").read_text(encoding="utf-8"))
    for phase, program in model.programs.items():
        folder = options.output / phase
        folder.mkdir(parents=True)
        # With dynamic=True the counts of decode stay inputs; with False they would be constants of the graph.
        torchair.dynamo_export(
            **example(manifest, phase, options.length, options.device),
            model=program,
            export_path=str(folder),
            dynamic=phase == "decode",
        )
        print(folder)


if __name__ == "__main__":
    main()

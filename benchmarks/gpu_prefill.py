"""Time to the first token on one GPU: prefill of whole layers, source and results side by side.

    python benchmarks/gpu_prefill.py --out gpu-prefill.json
    python benchmarks/gpu_prefill.py --tiny --out tiny.json     # a trial of the program, on a processor

Qwen3-8B's shape with random weights, bf16, four of its 36 layers (of which GateSWA keeps one full) and the head for the
last token. Times are medians by CUDA events, peaks what tensors took at most beside the weights.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu_models import TINY, Models, Shape
from gpu_timing import Report, median_seconds, peak_gb
from transformers import PreTrainedModel

SHAPE = replace(Shape(), layers=4, batches=(1, 8))
TARGETS = ["source", "MLA 512+64", "MLA 1/4", "MLA 1/2", "GateSWA", "GateSWA + MLA"]
REPEATS = 3
MOST_TOKENS = 1 << 18
"""Of all sequences together: 8 of 32,768."""


def prefill_seconds(model: PreTrainedModel, batch: int, length: int) -> float:
    """Median time of one pass over random prompts that leaves a cache and the logits of the last token."""
    ids = torch.randint(1, model.config.vocab_size, (batch, length), device=model.device)

    def step() -> Any:
        return model(ids, use_cache=True, logits_to_keep=1).logits

    if model.device.type != "cuda":
        return median_seconds(step, model.device.type, REPEATS)
    step()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return 1e-3 * statistics.median(times)


@torch.no_grad()
def main() -> None:
    """Run the cases in order of importance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu-prefill.json"))
    parser.add_argument("--seconds", type=float, default=1e9, help="stop when they are over")
    parser.add_argument("--compiled", action="store_true", help="layers through torch.compile, in static shapes")
    parser.add_argument("--lengths", type=lambda text: [int(x) for x in text.split(",")], help="of prompts")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes on a processor")
    options = parser.parse_args()
    shape = replace(TINY, batches=(1, 2)) if options.tiny else SHAPE
    report = Report(options.out, options.seconds, shape.device)
    models = Models(shape)
    for length in options.lengths or shape.lengths:
        for batch in shape.batches:
            if batch * length > MOST_TOKENS:
                continue
            for target in TARGETS:
                if report.left() < 5:
                    return
                model = models.make(*target.split(" ", 1)) if target.startswith("MLA") else models.make(target)
                weights = torch.cuda.memory_allocated() / 1e9 if shape.device == "cuda" else 0.0
                peak_gb(shape.device)
                step = torch.compile(model, dynamic=False) if options.compiled else model
                try:
                    seconds = prefill_seconds(step, batch, length)
                except RuntimeError as error:  # of memory, most of all
                    print("prefill", target, length, batch, str(error).splitlines()[0][:120], flush=True)
                    continue
                peak = peak_gb(shape.device) - weights
                case = {"name": target, "length": length, "batch": batch, "compiled": options.compiled}
                report.add("prefill", **case, ms=1e3 * seconds, peak_gb=peak)
                del model, step


if __name__ == "__main__":
    main()

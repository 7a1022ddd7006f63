"""Peak memory of attention-only distillation against two full copies of the model.

    python benchmarks/calibration_memory.py

A model of random weights (Llama, 8 layers, 1,024 wide, float32) on the CPU; each case runs in a process of its own and
prints its peak resident size above that of an idle process with the same libraries.
"""

from __future__ import annotations

import copy
import subprocess
import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import attnedit
from attnedit.compiler.reporting.report import peak_memory_bytes

CASES = ("source alone", "compiled", "attention only", "attention only, two copies", "all weights, two copies")
BATCH, LENGTH = 2, 128


def main(case: str) -> None:
    """Print the peak of one case, in MiB, and the source's own size."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    idle = peak_memory_bytes()
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=8,
        num_attention_heads=16,
        num_key_value_heads=4,
        vocab_size=8000,
        max_position_embeddings=1024,
    )
    source = LlamaForCausalLM(config).eval()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in source.parameters())
    windows = torch.randint(3, 8000, (8, LENGTH))
    if case != "source alone":
        teacher = copy.deepcopy(source) if "two copies" in case else source
        result = attnedit.compile(source, kv_budget=0.5, calibration=windows, alternations=0, verify=False)
        if "two copies" in case:
            result.model = copy.deepcopy(result.model)
            del source
        if case != "compiled":
            train = "all" if case.startswith("all") else "attention"
            sizes = {"distill_steps": 2, "batch_size": BATCH, "seq_len": LENGTH, "train": train}
            attnedit.calibrate(result, teacher, calibration=windows, verify=False, **sizes)
    print(f"{(peak_memory_bytes() - idle) / 2**20:.0f} {weights / 2**20:.0f}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(sys.argv[1])
    else:
        for name in CASES:
            done = subprocess.run([sys.executable, "-W", "ignore", __file__, name], capture_output=True, text=True)
            peak, weights = done.stdout.split()
            print(
                f"{name:30} {int(peak):6} MiB   {int(peak) / int(weights):.2f} times the source's weights", flush=True
            )

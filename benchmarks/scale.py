"""Time, memory and model FLOPs utilisation of compiling and training a large shape with random weights, on GPUs.

    python benchmarks/scale.py qwen3-8b
    python benchmarks/scale.py qwen3-30b-a3b --batch-size 4
    torchrun --nproc-per-node 2 benchmarks/scale.py qwen3-8b --quick
    accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 benchmarks/scale.py qwen3-8b --quick

Quality is not the question here: the weights are random. The last line is a JSON object; tokens and batches are of all
processes together.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections import defaultdict
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import attnedit
from attnedit.compiler.processes import processes
from attnedit.compiler.reporting.report import peak_memory_bytes

COMMON = {"head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-8b": (
        "qwen3",
        {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"num_attention_heads": 32, "num_key_value_heads": 8},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
    ),
    "tiny": (
        "qwen3",
        {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 512, "head_dim": 16}
        | {"num_attention_heads": 4, "num_key_value_heads": 2},
    ),
}
PEAK_FLOPS = 989e12
"""Of an H100 or H200 in dense bfloat16, by the datasheet."""


def random_model(name: str, layers: int | None, device: str) -> PreTrainedModel:
    """A model of this shape in bfloat16, made where it stays."""
    family, sizes = SHAPES[name]
    config = CONFIG_MAPPING[family](**{**COMMON, **sizes, **({"num_hidden_layers": layers} if layers else {})})
    torch.manual_seed(0)
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model.eval()


def step_flops(teacher: PreTrainedModel, student: PreTrainedModel, batch: int, length: int) -> dict[str, float]:
    """Floating-point operations that one step of each kind needs, by the usual count of 2 per weight and token.

    Fitting runs the source's body and, forwards and backwards, the new attention. Attention-only distillation runs both
    models, and backwards through the student: gradients of activations everywhere, of weights in attention alone.
    """
    config = teacher.config.get_text_config()
    share = getattr(config, "num_experts_per_tok", 1) / getattr(config, "num_experts", 1)
    sites = tuple(f"{name}." for name in student.config.attnedit["sites"])

    def active(model: PreTrainedModel) -> tuple[float, float, float]:
        attention = body = head = 0.0
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2 or "embed_tokens" in name:
                continue
            size = parameter.numel() * (share if ".experts." in name else 1.0)
            if name.startswith(sites):
                attention += size
            elif name.startswith("lm_head"):
                head += size
            else:
                body += size
        return attention, body, head

    tokens = batch * length
    pairs = 2 * config.num_hidden_layers * config.num_attention_heads * tokens * length / 2
    own, body, head = active(teacher)
    new, _, _ = active(student)
    inner = 2 * config.head_dim * pairs
    forward = 2 * tokens * (own + body) + inner
    student_inner = (3 * config.head_dim) * pairs
    student_forward = 2 * tokens * (new + body) + student_inner
    backward = 2 * tokens * (2 * new + body) + 2.5 * student_inner
    return {
        "fit": forward + 2 * tokens * 3 * new + 3.5 * student_inner,
        "distill": forward + student_forward + backward + 2 * tokens * head * 3,
    }


class Clock:
    """A progress callback that remembers when each step of each stage ended."""

    def __init__(self) -> None:
        self.ticks: dict[str, list[float]] = defaultdict(list)

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Note the time."""
        self.ticks[stage].append(time.perf_counter())

    def step_seconds(self, stage: str) -> float | None:
        """Median of the steps' times, without the first two, which warm up."""
        ticks = self.ticks.get(stage, [])
        gaps = [later - earlier for earlier, later in itertools.pairwise(ticks)][2:]
        return statistics.median(gaps) if gaps else None


def main() -> None:
    """Compile, train a few steps, print what it cost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--layers", type=int, help="in place of the shape's own number")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--kv-budget", type=float, default=0.28125, help="576 of 2,048 values for qwen3-8b")
    parser.add_argument("--calibration-tokens", type=int, default=16384)
    parser.add_argument("--calibration-length", type=int, default=1024, help="of each window of the closed form")
    parser.add_argument("--alternations", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--fit-steps", type=int, default=6)
    parser.add_argument("--distill-steps", type=int, default=6)
    parser.add_argument("--memory-limit", type=int, help="bytes, of layer-wise fitting")
    parser.add_argument(
        "--checkpointing", action="store_true", help="compute activations again in place of keeping them"
    )
    parser.add_argument("--no-compile", action="store_true", help="layers as they are, not through torch.compile")
    parser.add_argument("--quick", action="store_true", help="a start that costs little: the steps are the question")
    options = parser.parse_args()
    cuda = options.device.startswith("cuda")
    if processes().device is not None:
        options.device = str(processes().device)
    if options.quick:
        options.calibration_tokens, options.alternations = 2048, 0

    def show(figures: dict[str, Any]) -> None:
        if processes().main:
            print(json.dumps(figures), flush=True)

    began = time.perf_counter()
    teacher = random_model(options.shape, options.layers, options.device)
    made = time.perf_counter() - began
    vocabulary = teacher.config.vocab_size
    length = options.calibration_length
    windows = torch.randint(0, vocabulary, (max(1, options.calibration_tokens // length), length))
    clock = Clock()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = attnedit.compile(
        teacher,
        kv_budget=options.kv_budget,
        calibration=windows,
        calibration_tokens=windows.numel(),
        calibration_length=length,
        alternations=options.alternations,
        progress=clock,
    )
    figures: dict[str, Any] = {
        "shape": options.shape,
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "processes": processes().count,
        "in_parts": processes().sharded,
        "source_gib": round(sum(p.numel() * p.element_size() for p in teacher.parameters()) / 2**30, 2),
        "made_s": round(made, 1),
        "compile_s": round(time.perf_counter() - began, 1),
        "compile_stages_s": {name: round(value, 1) for name, value in result.report.seconds.items()},
    }
    if cuda:
        figures["compile_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
    show(figures)
    flops = step_flops(teacher, result.model, options.batch_size, options.seq_len)
    for stage, steps in (("fit", options.fit_steps), ("distill", options.distill_steps)):
        if not steps:
            continue
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        count = max(64, steps * options.batch_size)
        clock.ticks.clear()
        attnedit.calibrate(
            result,
            teacher,
            calibration=torch.randint(0, vocabulary, (count, options.seq_len)),
            verify=False,
            progress=clock,
            batch_size=options.batch_size,
            seq_len=options.seq_len,
            evaluate_every=steps,
            activation_checkpointing=options.checkpointing,
            torch_compile=not options.no_compile,
            memory_limit=options.memory_limit,
            **{f"{stage}_steps": steps},
        )
        if seconds := clock.step_seconds(stage):
            tokens = options.batch_size * options.seq_len
            figures |= {
                f"{stage}_step_s": round(seconds, 3),
                f"{stage}_tokens_per_s": round(tokens / seconds),
                f"{stage}_mfu": round(flops[stage] / seconds / PEAK_FLOPS / processes().count, 3),
            }
        if cuda:
            figures[f"{stage}_peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        show(figures)
    figures["host_peak_gib"] = round(peak_memory_bytes() / 2**30, 1)
    show(figures)


if __name__ == "__main__":
    main()

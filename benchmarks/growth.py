"""How cost grows: time and memory against layers, width, calibration tokens, length and batch, with exponents.

    python benchmarks/growth.py --json growth.json --plot growth.svg
    python benchmarks/growth.py closed-form --device cuda

Models are Llamas of random weights; each point is a process of its own, so that peak memory is its own. Along each axis
one size doubles and all else stays. The exponent of a cost is the slope of its logarithm over the size's, by least
squares over all points; "last" is that of the last doubling, where constants matter least.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from decode import cache_bytes, filled_cache, step
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import attnedit
from attnedit.compiler.reporting.report import peak_memory_bytes

VOCABULARY = 4096
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    """One point.

    Attributes:
        what: "closed-form", "training", "prefill" or "decode".
        target: "source", "mla" (half of the cache) or "gateswa" (a window of 512 in half of the layers).
        layers, width: of the model; heads are 64 wide, half as many key/value heads.
        tokens: of calibration, or of training.
        length: of each window, or of the context.
        batch: sequences side by side, for prefill and decode.
        device: of the model.
    """

    what: str
    target: str = "mla"
    layers: int = 4
    width: int = 256
    tokens: int = 32768
    length: int = 1024
    batch: int = 1
    device: str = "cpu"


AXES: dict[str, dict[str, Sequence[int]]] = {
    "closed-form": {
        "layers": (2, 4, 8, 16),
        "width": (128, 256, 512, 1024),
        "tokens": (16384, 32768, 65536, 131072),
        "length": (512, 1024, 2048, 4096, 8192),
    },
    "training": {
        "layers": (2, 4, 8, 16),
        "width": (128, 256, 512, 1024),
        "tokens": (16384, 32768, 65536),
        "length": (512, 1024, 2048, 4096, 8192),
    },
    "prefill": {"length": (512, 1024, 2048, 4096, 8192, 16384), "batch": (1, 2, 4, 8)},
    "decode": {"length": (512, 2048, 8192, 32768), "batch": (1, 2, 4, 8, 16)},
}
TARGETS = {"closed-form": ("mla", "gateswa"), "training": ("mla",)}
BOTH = ("source", "mla", "gateswa")


def source_model(case: Case) -> PreTrainedModel:
    """A Llama of random weights of this size."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=case.width,
        intermediate_size=4 * case.width,
        num_hidden_layers=case.layers,
        num_attention_heads=case.width // 64,
        num_key_value_heads=max(1, case.width // 128),
        head_dim=64,
        max_position_embeddings=65536,
    )
    return LlamaForCausalLM(config).eval().to(case.device)  # type: ignore[arg-type]


def rewritten(case: Case, windows: torch.Tensor, **more: Any) -> attnedit.CompileResult:
    """The model with other attention; layers of a window are listed, so that none is chosen by measuring."""
    window = {"window": 512, "full_layers": "every:2"} if case.target == "gateswa" else {"allocation": "even"}
    budget = {"kv_budget": 0.5} if case.target == "mla" else {}
    return attnedit.compile(
        source_model(case), case.target, calibration=windows, verify=False, **window, **budget, **more
    )


def measure(case: Case) -> dict[str, float]:
    """Seconds and MiB of one point: of the whole for compilations, of a step or a prefill for the others."""
    windows = torch.randint(0, VOCABULARY, (max(1, case.tokens // case.length), case.length))
    if case.what == "closed-form":
        idle = peak_memory_bytes()
        start = time.perf_counter()
        rewritten(case, windows)
        return {"seconds": time.perf_counter() - start, "MiB": (peak_memory_bytes() - idle) / MIB}
    if case.what == "training":
        idle = peak_memory_bytes()
        steps = {"seq_len": case.length, "batch_size": 1, "fit_steps": 2, "distill_steps": case.tokens // case.length}
        few = windows[: max(4, 4096 // case.length)]
        trained = rewritten(case, few, alternations=0, **steps).report.stages
        seconds = sum(stage.seconds for stage in trained if stage.name == "distill")
        return {"seconds": seconds, "MiB": (peak_memory_bytes() - idle) / MIB}
    short = windows[:1, :512].expand(4, -1).contiguous()
    model = source_model(case) if case.target == "source" else rewritten(case, short.repeat(1, 2), alternations=0).model
    ids = torch.randint(0, VOCABULARY, (case.batch, case.length), device=case.device)
    if case.what == "prefill":
        idle = peak_memory_bytes()
        with torch.inference_mode():
            seconds = [_timed(lambda: model(ids, use_cache=True, logits_to_keep=1)) for _ in range(3)]
        return {"seconds": statistics.median(seconds), "MiB": (peak_memory_bytes() - idle) / MIB}
    cache = filled_cache(model, case.length, ids[:, :1])
    times = [step(model, cache, ids[:, :1], case.length + number) for number in range(12)]
    return {"seconds": statistics.median(times[2:]), "MiB": cache_bytes(cache) / MIB}


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def exponents(sizes: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Slope of the logarithms over all points, and over the last two.

    >>> [round(each, 6) for each in exponents([1, 2, 4], [3, 12, 48])]
    [2.0, 2.0]
    """
    x, y = numpy.log(sizes), numpy.log(numpy.maximum(costs, 1e-9))
    return float(numpy.polyfit(x, y, 1)[0]), float((y[-1] - y[-2]) / (x[-1] - x[-2]))


def in_a_process(case: Case) -> dict[str, float]:
    """`measure` where nothing else was before."""
    command = [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{case}: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def series(what: str, axis: str, target: str, device: str, points: int | None) -> dict[str, Any]:
    """All points along one axis, with the exponents of both costs."""
    sizes = AXES[what][axis][:points]
    start = Case(what, target, device=device)
    cases = [dataclasses.replace(start, **{axis: size}) for size in sizes]
    if axis == "length" and what == "closed-form":  # as many tokens of each length
        cases = [dataclasses.replace(case, tokens=max(case.tokens, max(sizes))) for case in cases]
    found = [in_a_process(case) for case in cases]
    row: dict[str, Any] = {"what": what, "target": target, "axis": axis, "sizes": list(sizes)}
    for cost in ("seconds", "MiB"):
        row[cost] = [round(one[cost], 5) for one in found]
        row[f"{cost} exponent"], row[f"{cost} last"] = (round(each, 2) for each in exponents(sizes, row[cost]))
    return row


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| what | target | against | sizes | seconds | exponent (last) | MiB | exponent (last) |",
        "| --- | --- | --- | --- | --- | ---: | --- | ---: |",
    ]
    for row in rows:
        costs = [", ".join(f"{value:.3g}" for value in row[cost]) for cost in ("seconds", "MiB")]
        slopes = [f"{row[f'{cost} exponent']:.2f} ({row[f'{cost} last']:.2f})" for cost in ("seconds", "MiB")]
        sizes = ", ".join(f"{size:,}" for size in row["sizes"])
        cells = [row["what"], row["target"], row["axis"], sizes, costs[0], slopes[0], costs[1], slopes[1]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Log-log plots, one for each axis of each thing measured."""
    from matplotlib.figure import Figure

    places = list(dict.fromkeys((row["what"], row["axis"]) for row in rows))
    figure = Figure(figsize=(4 * len(places), 7), layout="constrained")
    axes = figure.subplots(2, len(places), squeeze=False)
    for column, place in enumerate(places):
        for line, cost in enumerate(("seconds", "MiB")):
            drawing = axes[line][column]
            for row in rows:
                if (row["what"], row["axis"]) == place:
                    label = f"{row['target']}, {row[f'{cost} exponent']:.2f}"
                    drawing.loglog(row["sizes"], row[cost], marker="o", label=label, base=2)
            drawing.set(title=place[0], xlabel=place[1], ylabel=cost)
            drawing.legend()
    figure.savefig(file)


def main() -> None:
    """Measure all series asked for, print the table, write JSON and plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    # argparse holds the empty list, too, against the choices.
    parser.add_argument("what", nargs="*", choices=[*AXES, []], help="all unless given")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--axis", choices=sorted({axis for axes in AXES.values() for axis in axes}), help="only this one"
    )
    parser.add_argument("--points", type=int, help="only so many of each axis, the smallest")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measure(Case(**json.loads(options.case)))))
        return
    rows = []
    for what in options.what or AXES:
        for axis in AXES[what] if options.axis is None else AXES[what].keys() & {options.axis}:
            for target in TARGETS.get(what, BOTH):
                rows.append(series(what, axis, target, options.device, options.points))
                print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(table(rows))
    if options.plot:
        plot(rows, options.plot)


if __name__ == "__main__":
    main()

"""Times of what runs on a GPU, and a place for results that survives being stopped."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class Report:
    """Results by part, saved after each case; knows how much time is left."""

    def __init__(self, out: Path, seconds: float, device: str) -> None:
        self.out, self.end = out, time.monotonic() + seconds
        name = torch.cuda.get_device_name() if device == "cuda" else device
        self.values: dict[str, Any] = {"device": name, "torch": torch.__version__}

    def left(self) -> float:
        """Seconds left."""
        return self.end - time.monotonic()

    def add(self, part: str, **values: Any) -> None:
        """Save one case and print it."""
        self.values.setdefault(part, []).append(values)
        self.out.write_text(json.dumps(self.values, indent=1))
        print(part, *(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in values.items()), flush=True)


def median_seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Median time of `work`: of replays of its CUDA graph, from CUDA events; by the clock on a processor."""
    if device != "cuda":
        times = []
        for _ in range(repeats + 1):
            begin = time.perf_counter()
            work()
            times.append(time.perf_counter() - begin)
        return statistics.median(times[1:])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    graph.replay()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, stop in events:
        start.record()
        graph.replay()
        stop.record()
    torch.cuda.synchronize()
    return 1e-3 * statistics.median(start.elapsed_time(stop) for start, stop in events)


def free_bytes(device: str) -> int:
    """Memory that could still be had; a gigabyte on a processor."""
    if device != "cuda":
        return 1 << 30
    torch.cuda.empty_cache()
    return int(torch.cuda.mem_get_info()[0])


def peak_gb(device: str) -> float:
    """The most memory that tensors took since the last call, in 10^9 bytes."""
    if device != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 1e9
    torch.cuda.reset_peak_memory_stats()
    return peak

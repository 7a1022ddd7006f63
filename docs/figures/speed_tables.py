"""Tables of speed, made of the raw results of ``benchmarks/gpu_*.py`` and ``llamacpp_decode.py``."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import linear_regression, median
from typing import Any

from cells import data, table

MODELS = ("source", "MLA", "GateSWA", "GateSWA + MLA")
PREFILLS = ("source", "MLA 512+64", "MLA 1/4", "MLA 1/2", "GateSWA", "GateSWA + MLA")


def layers(run: str = "gpu-decode") -> dict[tuple[int, int], dict[str, float]]:
    """Microseconds of one layer's forms by batch and cached tokens; "source" is the best of torch's kernels."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for case in data(run)["layer"]:
        times = found.setdefault((case["batch"], case["length"]), {})
        times[case["name"]] = case["us"]
        if case["name"].startswith("source"):
            times["source"] = min(times.get("source", case["us"]), case["us"])
    return dict(sorted(found.items()))


def kernels() -> str:
    """The kernel of latents against the source's best, with how many times as fast it is."""
    latents = {"MLA 1/2 (848 + 176)": "1/2", "MLA 512 + 64": "512+64", "MLA 1/4 (424 + 88)": "1/4"}
    rows = []
    for (batch, cached), times in layers().items():
        cells = [f"{batch} x {cached:,}", _us(times.get("source"))]
        for name in latents.values():
            own = times.get(f"MLA {name} kernel")
            cells.append(None if own is None else f"{_us(own)} ({times['source'] / own:.2f})")
        rows.append(cells)
    return table(["batch and cached tokens", "source's best", *latents], rows)


def one_layer() -> str:
    """One attention layer with all that surrounds the kernel, with how many times as fast it is."""
    forms = {"MLA 512 + 64": "MLA 512+64", "MLA 1/4": "MLA 1/4", "MLA 1/2": "MLA 1/2", "GateSWA 128": "GateSWA 128"}
    rows = []
    for (batch, cached), times in layers("gpu-step").items():
        cells = [f"{batch} x {cached:,}", _us(times["source"])]
        cells += [f"{_us(times[form])} ({times['source'] / times[form]:.2f})" for form in forms.values()]
        rows.append(cells)
    return table(["batch and cached tokens", "source's kernel", *forms], rows)


def model_cases() -> dict[int, dict[str, list[dict[str, Any]]]]:
    """Whole models by cached tokens and name: the largest batch first, then that of eight."""
    found: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for case in data("gpu-decode")["model"]:
        found.setdefault(case["length"], {}).setdefault(case["name"], []).append(case)
    return dict(sorted(found.items()))


def throughput() -> str:
    """Whole models: tokens per second of the largest batch that fits, and of eight sequences."""
    rows = []
    for cached, named in model_cases().items():
        base = named["source"][0]["tokens_per_s"]
        for name in MODELS:
            if name not in named:
                continue
            most, *eight = named[name]
            gain = f"{most['tokens_per_s'] / base:.1f}"
            few = round(eight[0]["tokens_per_s"]) if eight else None
            size = round(most["cache_mb"])
            rows.append([f"{cached:,} tokens, {name}", size, most["batch"], round(most["tokens_per_s"]), gain, few])
    head = ["cached", "MB a sequence", "largest batch", "tokens/s", "of the source", "tokens/s, batch 8"]
    return table(head, rows)


def vllm() -> str:
    """Whole models in vLLM: tokens per second at batches of 1, 8 and the largest, and the first token."""
    named = {model["name"]: model for model in data("vllm-throughput")["models"]}
    cases = {
        name: {(case["length"], case["batch"]): case["tokens_per_s"] for case in model["decode"]}
        for name, model in named.items()
    }
    first = {name: {case["length"]: case["ms"] for case in model["first_token"]} for name, model in named.items()}
    rows = []
    for cached in sorted({length for times in cases.values() for length, _ in times}):
        for name, times in cases.items():
            batches = [batch for length, batch in times if length == cached]
            if not batches:
                continue
            most = max(batches)
            ran = most > 8  # else the run was stopped before
            cells: list[Any] = [f"{cached:,} tokens, {name}"]
            cells += [None if (cached, few) not in times else round(times[cached, few]) for few in (1, 8)]
            cells += [most, round(times[cached, most])] if ran else [None, None]
            base = cases["source"]
            most_of_source = max(batch for length, batch in base if length == cached)
            gain = f"{times[cached, most] / base[cached, most_of_source]:.1f}" if ran else None
            ms = first[name].get(cached)
            rows.append([*cells, gain, None if ms is None else round(ms)])
    head = ["cached", "tokens/s, batch 1", "batch 8", "largest batch", "tokens/s", "of the source", "first token, ms"]
    return table(head, rows)


def small_batches() -> str:
    """Microseconds of a compiled layer at small batches, without the head, with how many times as fast it is."""
    cases = data("gpu-decode-compiled")["model"]
    found = by_name(cases, ("batch", "length"), "layer_us")
    rows = [beside(times, f"{batch} x {cached:,}", MODELS, faster=True) for (batch, cached), times in found.items()]
    return table(["batch and cached tokens", *MODELS], rows)


def first_token() -> str:
    """Prefill: milliseconds of four layers, with how many times as long they take."""
    found = by_name(data("gpu-prefill")["prefill"], ("length", "batch"), "ms")
    rows = [beside(times, f"{batch} x {length:,}", PREFILLS, faster=False) for (length, batch), times in found.items()]
    return table(["prompts", *PREFILLS], rows)


def by_name(cases: list[dict[str, Any]], keys: tuple[str, str], figure: str) -> dict[tuple[int, int], dict[str, float]]:
    """A figure of each form by its name, for each pair of keys in order."""
    found: dict[tuple[int, int], dict[str, float]] = {}
    for case in cases:
        found.setdefault((case[keys[0]], case[keys[1]]), {})[case["name"]] = case[figure]
    return dict(sorted(found.items()))


def beside(times: dict[str, float], label: str, names: tuple[str, ...], *, faster: bool) -> list[object]:
    """A row: the source's time, then those of the others with their ratio to it, or its to theirs if `faster`."""
    source = times["source"]
    cells: list[object] = [label, round(source)]
    for name in names[1:]:
        own = times.get(name)
        ratio = None if own is None else source / own if faster else own / source
        cells.append(None if own is None else f"{own:,.0f} ({ratio:.2f})")
    return cells


def prefills(figure: str = "ms") -> dict[tuple[str, int], dict[int, float]]:
    """A figure of prompts by name and batch, for each length."""
    found: dict[tuple[str, int], dict[int, float]] = {}
    for case in data("gpu-prefill")["prefill"]:
        found.setdefault((case["name"], case["batch"]), {})[case["length"]] = case[figure]
    return found


def exponent(values: dict[int, float]) -> float:
    """How a figure grows with what it is given for: the slope of a straight line through the logarithms."""
    x, y = [math.log(size) for size in values], [math.log(value) for value in values.values()]
    return linear_regression(x, y).slope


def growth() -> str:
    """Exponents of time and memory against length and batch."""
    long, few = layers(), layers("gpu-step")

    def decode(name: str, axis: int) -> str:
        if name == "GateSWA":  # the ring is as long as ever
            cases = [((1, 2048), (1, 8192), (1, 32768)), ((1, 2048), (8, 2048), (32, 2048))][1 - axis]
            return f"{exponent({case[axis]: few[case]['GateSWA 128'] for case in cases}):.2f}"
        cases = [((32, 8192), (32, 32768), (32, 131072)), ((1, 32768), (32, 32768), (128, 32768))][1 - axis]
        form = name if name == "source" else f"{name} kernel"
        return f"{exponent({case[axis]: long[case][form] for case in cases}):.2f}"

    rows = []
    for name in PREFILLS[:-1]:
        prompts = [
            f"{exponent({length: prefills(figure)[name, 1][length] for length in (8192, 32768, 131072)}):.2f}"
            for figure in ("ms", "peak_gb")
        ]
        rows.append([name, decode(name, 1), decode(name, 0), *prompts])
    head = ["", "decode, length", "decode, batch", "prompt, length", "prompt's memory, length"]
    return table(head, rows)


def llama_cpp() -> str:
    """llama.cpp on a CPU: the source's milliseconds a token, and the others' ratios to it, lowest and highest too."""
    files = data("llamacpp-decode")["files"]
    source = files["source"]
    rows = []
    for kind in ("decode", "prompt"):
        for name, rounds in files.items():
            # Rounds took turns, so each is held against the source's own round.
            ratios = {
                length: sorted(mine[kind] / its[kind] for mine, its in zip(rounds[length], source[length], strict=True))
                for length in source
            }
            times = [f"{median(one[kind] for one in source[length]):.1f}" for length in source]
            others = [f"{median(each):.2f} ({each[0]:.2f}–{each[-1]:.2f})" for each in ratios.values()]
            rows.append([f"{kind}: {name}, ms" if name == "source" else f"{kind}: {name}"])
            rows[-1] += times if name == "source" else others
    return table(["", *(f"{int(length):,} tokens" for length in source)], rows)


def _us(time: float | None) -> str | None:
    return None if time is None else f"{time:,.0f}" if time >= 100 else f"{time:.1f}"


SPEED_TABLES: list[Callable[[], str]] = [kernels, one_layer, throughput, small_batches, first_token, growth]
SPEED_TABLES += [llama_cpp, vllm]

"""Charts of the figures in ``docs/data``, and the badges of README."""

from __future__ import annotations

import re
import tomllib

from cells import DOCS, data
from drawing import BLUE, CHARACTER, FAINT, GREEN, ORANGE, SAND, Drawing, bars, curves
from result_tables import runs
from speed_tables import MODELS, PREFILLS, layers, model_cases, prefills

RANGES = ["0–1k", "1k–2k", "2k–4k", "4k–8k"]
LENGTHS = ["1k", "2k", "4k", "8k"]
SHORT = {
    "MLA 1/4, closed form": "MLA 1/4",
    "GateSWA and MLA 1/8, closed form": "both, 1/8",
    "MLA 1/2, closed form": "MLA 1/2",
    "MLA 1/4, trained at 4,096, then 8,192": "MLA 1/4, trained",
    "MLA 1/2, trained at 4,096, then 8,192": "MLA 1/2, trained",
    "GateSWA and MLA 1/8, trained at 4,096, then 8,192": "both, 1/8, trained",
}
"""What is drawn of the runs shown, by shorter names."""


def charts() -> dict[str, str]:
    """SVG by file name."""
    made = {"quality": quality(), "found": found(), "throughput": throughput(), "overview": overview()}
    made |= {"quality-qwen": quality_of_qwen(), "ruler": ruler(), "tasks": tasks(), "memory": memory(), "cost": cost()}
    made["badges"] = badges()
    made |= {"growth-decode": growth_of_decode(), "growth-prompt": growth_of_prompt()}
    made["growth-closed-form"] = growth_of_converting("closed-form", "Closed form of latents")
    made["growth-training"] = growth_of_converting("training", "Distillation of latents")
    return {f"{name}.svg": drawing.svg() for name, drawing in made.items()}


def quality() -> Drawing:
    """Perplexity over the source's, by position, beside TransMLA's."""
    shown = runs()
    series = [(SHORT[name], shown[name][0], "trained" in name) for name in SHORT]
    peer = data("long-context-peers")["runs"][0]
    series.append((peer["name"], peer["ratio"], False))
    ticks = [1, 1.1, 1.2, 1.35, 1.5, 1.75, 2]
    title = "SmolLM2: perplexity over the source's"
    return curves(title, RANGES, series, ticks, logarithmic=True, x_title="position in windows of 8,192 tokens")


def found() -> Drawing:
    """Facts found by length of the text."""
    shown = runs()
    series = [("source", [100 * one for one in data("long-context-smollm2")["source"]["found"]], True)]
    series += [
        (SHORT[name], [100 * one for one in shown[name][1]], "trained" in name)
        for name in SHORT
        if None not in shown[name][1]
    ]
    peer = data("long-context-peers")["runs"][0]
    series.append((peer["name"], [100 * one for one in peer["found"]], False))
    title = "SmolLM2: facts found, % (chance: 12.5)"
    return curves(title, LENGTHS, series, [0, 25, 50, 75, 100], x_title="length of the text, tokens")


def throughput() -> Drawing:
    """Tokens per second of the largest batch that fits."""
    groups: dict[int, list[tuple[str, float, str]]] = {}
    for cached, named in model_cases().items():
        base = named["source"][0]["tokens_per_s"]
        for name in MODELS:
            if name in named:
                most = named[name][0]
                gain = most["tokens_per_s"] / base
                groups.setdefault(cached, []).append((name, gain, f"{gain:.1f}x, batch {most['batch']}"))
    title = "Tokens per second over the source's, one H200"
    note = "Qwen3-8B's shape, random weights, the largest batch that fits"
    return bars(title, [(f"{cached:,} cached tokens", rows) for cached, rows in groups.items()], note=note)


def quality_of_qwen() -> Drawing:
    """Perplexity over the source's, by position, of the second real model."""
    figures = data("long-context-qwen")
    ranges = [f"{first // 1024}–{end // 1024}k" for first, end in figures["ranges"]]
    names = {"MLA 1/2, closed form": "MLA 1/2", "GateSWA and MLA 1/8, trained": "both, 1/8, trained"}
    labelled = [run for run in figures["runs"] if "label" in run]
    series = [(names.get(run["label"], run["label"]), run["ratio"], "trained" in run["label"]) for run in labelled]
    title = "Qwen2.5-Coder-0.5B: perplexity over the source's"
    ticks = [0.9, 1, 1.1, 1.2, 1.3]
    return curves(title, ranges, series, ticks, logarithmic=True, x_title="position in windows of 32,768 tokens")


def ruler() -> Drawing:
    """RULER of both real models, averages of 13 tasks."""
    groups = []
    for name, model in (("ruler-smollm2", "SmolLM2"), ("ruler-qwen", "Qwen2.5-Coder-0.5B")):
        figures = data(name)
        for place in (0, 1):
            rows = []
            for label, cells in figures["average"].items():
                middle, low, high = cells[place]
                rows.append((label.replace("GateSWA and MLA", "both,"), middle, f"{middle:g} ({low:g}–{high:g})"))
            groups.append((f"{model}, {figures['columns'][place]} tokens", rows))
    note = "Average of 13 tasks, 20 items each, with intervals of 95 %"
    return bars("RULER, % of what is asked for", groups, note=note)


def tasks() -> Drawing:
    """Short tasks: the average and the two that lose most."""
    figures = data("tasks-smollm2")
    columns = [column.split(" (")[0] for column in figures["columns"]]
    groups = []
    for heading, column in (("average of six tasks", "average"), ("HellaSwag", "HellaSwag"), ("LAMBADA", "LAMBADA")):
        place = columns.index(column)
        rows = []
        for label, cells in figures["figures"].items():
            middle, low, high = cells[place]
            short = SHORT.get(label, label)
            rows.append((short, middle, f"{middle:.1f} ({low:.1f}–{high:.1f})"))
        groups.append((heading, rows))
    note = "1,000 questions of each set or all there are, no worked examples, intervals of 95 %"
    return bars("SmolLM2: short tasks, % right", groups, note=note)


def memory() -> Drawing:
    """Memory of one sequence's cache."""
    groups: list[tuple[str, list[tuple[str, float, str]]]] = []
    for cached, named in model_cases().items():
        rows = []
        for name in MODELS:
            if name in named:
                most = named[name][0]
                end = f"{most['cache_mb']:,.0f} MB, {most['batch']} at once"
                rows.append((name, most["cache_mb"], end))
        groups.append((f"{cached:,} cached tokens", rows))
    note = "Qwen3-8B's shape, bfloat16; how many sequences fit on one H200 beside the weights (512 at most)"
    return bars("KV cache of one sequence", groups, note=note)


def cost() -> Drawing:
    """Time and memory of the same conversion by three converters."""
    names = {"attnedit": "SmolLM2, MLA 1/2, quick: 32,768 tokens, one round"}
    names |= {f"{name}": f"the same by {name} (run by us)" for name in ("TransMLA", "CARE")}
    found = {run["what"]: run for run in data("cost")["runs"]}
    groups = []
    for heading, key in (("time", "time"), ("memory", "memory")):
        ends = {name: found[what][key] for name, what in names.items()}
        groups.append((heading, [(name, float(end.split()[0]), end) for name, end in ends.items()]))
    title = "Half of SmolLM2's cache, two cores, closed form"
    note = "32,768 calibration tokens, from reading the model to saving; the other two run by us"
    return bars(title, groups, note=note, apart=True)


CACHED = {2048: "2,048", 8192: "8,192", 32768: "32,768", 131072: "131,072"}
"""Lengths a factor of four apart, by how they are written."""


def growth_of_decode() -> Drawing:
    """Microseconds of one step of a layer's attention against the length, both logarithmic."""
    forms = {"source": "source", "MLA 1/2 kernel": "MLA 1/2", "MLA 512+64 kernel": "MLA 512 + 64"}
    forms |= {"MLA 1/4 kernel": "MLA 1/4"}
    times = layers()
    series = [(name, [times[32, length][form] for length in CACHED], form == "source") for form, name in forms.items()]
    title = "Decode of 32 sequences, one layer's attention, µs (H200)"
    ticks = [30, 100, 300, 1000, 4000]
    return curves(title, list(CACHED.values()), series, ticks, logarithmic=True, x_title="cached tokens")


def growth_of_prompt() -> Drawing:
    """Milliseconds of a prompt against its length, both logarithmic."""
    times = prefills()
    series = [(name, [times[name, 1][length] for length in CACHED], name == "source") for name in PREFILLS]
    title = "One prompt through four layers, ms (H200)"
    ticks = [5, 10, 30, 100, 300, 1000, 4000]
    return curves(title, list(CACHED.values()), series, ticks, logarithmic=True, x_title="tokens of the prompt")


def growth_of_converting(what: str, shown: str) -> Drawing:
    """Time of the closed form or of training, over that of the smallest, against what doubles, both logarithmic."""
    rows = [row for row in data("growth-converting")["rows"] if (row["what"], row["target"]) == (what, "mla")]
    series = [(row["axis"], [each / row["seconds"][0] for each in row["seconds"]], False) for row in rows]
    steps = max(len(row["sizes"]) for row in rows)
    sizes = [f"{2**step} x" for step in range(steps)]
    title = f"{shown}: time over the smallest's (two cores)"
    return curves(title, sizes, series, [0.5, 1, 2, 4, 8, 16], logarithmic=True, x_title="size over the smallest")


def badges() -> Drawing:
    """What the project needs and promises, as its own files say."""
    settings = tomllib.loads((DOCS.parent / "pyproject.toml").read_text(encoding="utf-8"))
    project, tool = settings["project"], settings["tool"]
    needs = {re.split("[>=]", line)[0]: line.partition(">=")[2] for line in project["dependencies"]}
    shown = [("version", project["version"]), ("licence", project["license"])]
    shown += [("Python", project["requires-python"].removeprefix(">=") + "+")]
    shown += [(name, f"{needs[name]}+") for name in ("torch", "transformers")]
    shown += [("types", "mypy strict")] if tool["mypy"]["strict"] else []
    shown += [("lint", "ruff")] if "ruff" in tool else []
    step = 11 * CHARACTER
    ends = [(name, value, 12 + step * len(name), 12 + step * len(value)) for name, value in shown]
    title = ", ".join(" ".join(pair) for pair in shown)
    drawing = Drawing(title, sum(left + right + 6 for *_, left, right in ends) + 2, 24, size=11)
    x = 2.0
    for name, value, left, right in ends:
        drawing.box(x, 2, left, 20, name, fill=SAND, radius=2)
        drawing.box(x + left, 2, right, 20, value, fill=GREEN, radius=2)
        x += left + right + 6
    return drawing


def overview() -> Drawing:
    """What is left of a cache, and what that costs."""
    shown = runs()

    def worst(name: str) -> str:
        closed = max(shown[f"{name}, closed form"][0])
        trained = min(max(run[0]) for label, run in shown.items() if label.startswith(f"{name}, trained"))
        return f"{closed:.2f}; trained {trained:.2f}"

    rows = [
        ("source", 1.0, SAND, "1"),
        ("MLA, a half", 0.5, GREEN, worst("MLA 1/2")),
        ("MLA, a quarter", 0.25, BLUE, worst("MLA 1/4")),
        ("windows + MLA, an eighth", 0.125, ORANGE, worst("GateSWA and MLA 1/8")),
    ]
    drawing = Drawing("KV cache left, and perplexity over the source's in the worst range", 640, 206)
    drawing.text(10, 22, "SmolLM2 at 8,192 tokens", bold=True)
    drawing.text(190, 42, "KV cache", fill=FAINT)
    drawing.text(420, 42, "perplexity over the source's", fill=FAINT)
    for index, (name, share, fill, cost) in enumerate(rows):
        y = 52 + 32 * index
        drawing.text(180, y + 16, name, anchor="end")
        drawing.box(190, y + 3, 210 * share, 20, fill=fill, radius=2)
        drawing.text(420, y + 16, cost)
    drawing.text(
        10,
        194,
        "Single runs; perplexity of the worst range of positions, seen over whole windows.",
        fill=FAINT,
        size=11,
    )
    return drawing

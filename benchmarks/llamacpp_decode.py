"""Time that llama.cpp takes per token on this machine's processor, for GGUF files and numbers of cached tokens.

    PYTHON benchmarks/llamacpp_decode.py full.gguf mla.gguf windows.gguf --tokens 512,2048,8192 --json decode.json

Run by a Python with xllamacpp, which is all it needs (`make test-llamacpp` makes `.venv-llamacpp`). Every file is
served by a process of its own; rounds take turns, so that what else the machine does falls on all alike. Prints medians
of a table in Markdown: milliseconds per token of the first file, and the others' ratios to it, with the lowest and the
highest of the rounds. A file to compare with, of the source's own attention: `attnedit compile MODEL --target gateswa
--window CONTEXT --sinks none --engine llama.cpp`, whose windows hold the whole context.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import urllib.request
from pathlib import Path
from typing import Any

NEW = 32
"""Tokens that are decoded in a round."""


def main() -> None:
    """Serve, ask in turns, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="GGUF", help="the first is what the others are compared with"
    )
    parser.add_argument("--tokens", default="512,2048,8192", help="cached tokens, with commas")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, metavar="FILE", help="all rounds")
    options = parser.parse_args()
    lengths = [int(part) for part in options.tokens.split(",")]
    servers = [Served(file, max(lengths) + NEW + 1, options.threads) for file in options.files]
    found: dict[str, dict[str, list[dict[str, float]]]] = {str(file): {} for file in options.files}
    try:
        for length in lengths:
            for number in range(options.rounds):
                for file, server in zip(options.files, servers, strict=True):
                    print(f"{file}: {length} tokens, round {number + 1}", file=sys.stderr, flush=True)
                    found[str(file)].setdefault(str(length), []).append(server.times(length, number))
    finally:
        for server in servers:
            server.stop()
    if options.json:
        options.json.write_text(json.dumps({"threads": options.threads, "new": NEW, "files": found}, indent=1))
    for kind in ("decode", "prompt"):
        print(f"| {kind} | " + " | ".join(f"{length:,} tokens" for length in lengths) + " |")
        print("|---" * (len(lengths) + 1) + "|")
        first = found[str(options.files[0])]
        for file in options.files:
            cells = [cell(found[str(file)][str(length)], first[str(length)], kind) for length in lengths]
            print(f"| {file.stem} | " + " | ".join(cells) + " |")
        print()


def cell(rounds: list[dict[str, float]], first: list[dict[str, float]], kind: str) -> str:
    """Milliseconds per token of the first file, ratios of the others."""
    if rounds is first:
        return f"{statistics.median(times[kind] for times in rounds):.2f} ms"
    ratios = [mine[kind] / theirs[kind] for mine, theirs in zip(rounds, first, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


class Served:
    """A server of one file, in a process of its own."""

    def __init__(self, file: Path, context: int, threads: int) -> None:
        options = {"model": str(file), "n_ctx": -(-context // 256) * 256, "threads": threads}
        self._process = subprocess.Popen(
            [sys.executable, "-c", _SERVER, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        assert self._process.stdout is not None
        self._address = self._process.stdout.readline().strip()
        if not self._address.startswith("http"):
            sys.exit(f"{file}: llama.cpp did not load it")

    def times(self, length: int, number: int) -> dict[str, float]:
        """Milliseconds per token of a prompt that no earlier one begins like, and of the tokens after it."""
        ids = [1000 + (number * 7919 + place * 31) % 20000 for place in range(length)]
        body: dict[str, Any] = {
            "prompt": ids,
            "n_predict": NEW,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": False,
        }
        request = urllib.request.Request(
            f"{self._address}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=3600) as response:
            timings = json.load(response)["timings"]
        if timings["prompt_n"] != length or timings["predicted_n"] != NEW:
            sys.exit(f"{self._address}: {timings} is not a prompt of {length} tokens and {NEW} new ones")
        return {"decode": timings["predicted_per_token_ms"], "prompt": timings["prompt_per_token_ms"]}

    def stop(self) -> None:
        """End the process: it waits for its input to end."""
        self._process.communicate()


_SERVER = """
import json, sys, xllamacpp
options = json.loads(sys.argv[1])
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel = options["model"], options["n_ctx"], 1
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options["threads"]
params.n_ubatch = 256
params.n_ctx_checkpoints = 0
params.fit_params = False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


if __name__ == "__main__":
    main()

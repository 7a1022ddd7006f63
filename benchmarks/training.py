"""Quality after distillation: several targets compiled, trained and evaluated side by side, on one GPU or more.

    python benchmarks/training.py smollm2 --calibration calib.txt --text eval.txt --text other.txt --devices 2 -o runs

The source's own samples are made once. Then every case is compiled without training, trained, and evaluated before and
after, by the same commands that a user would type. What is finished is not done again: a run that was stopped goes on.
The last lines are a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

COMMAND = [sys.executable, "-c", "from attnedit.cli import main; raise SystemExit(main())"]
SAMPLE = """
import sys
from attnedit._calibrate import training_batches
from attnedit.compiler.model_io.models import load_source
from attnedit.options import CalibrateOptions
model, device, text, steps, batch_size, seq_len, share = sys.argv[1:]
source = load_source(model, device=device)
numbers = {"distill_steps": int(steps), "batch_size": int(batch_size), "seq_len": int(seq_len)}
options = CalibrateOptions(calibration=text, **numbers, self_generated=float(share))
training_batches(source.model, options, source.tokenizer)
"""
EVALUATE = """
import sys
from attnedit.compiler.data.token_windows import text_tokens
from attnedit.compiler.evaluation.evaluate import perplexity
from attnedit.compiler.model_io.models import load_source
model, device, windows, length, *texts = sys.argv[1:]
source, windows, length = load_source(model, device=device), int(windows), int(length)
for text in texts:
    tokens = text_tokens(text, source.tokenizer)
    most = min(windows, tokens.numel() // length)
    print(perplexity(source.model, tokens, seq_len=length, windows=most, batch=4).perplexity, flush=True)
"""


@dataclass(frozen=True)
class Case:
    """One result: how it is compiled, how it is trained, and how much of that is fitting."""

    compile: str
    train: str
    fitting: float = 0.25


CASES = {
    "MLA 1/2": Case("--kv-budget 0.5 --alternations 3", "--distill-learning-rate 0.0007 --feature-weight 1"),
    "MLA 1/4": Case(
        "--kv-budget 0.25 --allocation loss --alternations 3",
        "--distill-learning-rate 0.0015 --feature-weight 40 --feature-layers 30 --repeats 0.4",
    ),
    "MLA 1/8": Case(
        "--kv-budget 0.125 --allocation loss --alternations 4 --calibration-tokens 262144",
        "--distill-learning-rate 0.002 --feature-weight 40 --feature-layers 30 --repeats 0.7",
        fitting=0.125,
    ),
    "GateSWA": Case(
        "--target gateswa --window 128 --full-layers 8 --sinks none",
        "--distill-learning-rate 0.0007 --feature-weight 1",
    ),
    "GateSWA + MLA 1/8": Case(
        "--target gateswa+mla --window 128 --full-layers 8 --kv-budget 0.125 --alternations 3",
        "--distill-learning-rate 0.001 --feature-weight 40 --feature-layers 30 --repeats 0.4",
    ),
}


class Runs:
    """Commands on the devices of this machine, their output in files."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options, self.directory = options, Path(options.output)
        self.directory.mkdir(parents=True, exist_ok=True)
        self.began = time.monotonic()

    def path(self, case: str, stage: str) -> Path:
        """Where a result is saved."""
        return self.directory / f"{case.replace(' ', '').replace('/', '_')}-{stage}"

    def run(self, name: str, command: list[str], place: int) -> str:
        """Run one command on one device; returns what it printed on stdout."""
        environment = dict(os.environ)
        if self.options.device == "cuda":
            environment |= {"CUDA_VISIBLE_DEVICES": str(place % self.options.devices), "OMP_NUM_THREADS": "4"}
        with (self.directory / f"{name}.log").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
        state = "done" if done.returncode == 0 else f"failed, see {name}.log"
        print(f"{time.monotonic() - self.began:6.0f} s  {name}: {state}", flush=True)
        return done.stdout

    def sample(self) -> None:
        """Make the source's own samples, on the last device."""
        options = self.options
        numbers = (options.steps, options.batch_size, options.seq_len, options.self_generated)
        arguments = [options.model, options.device, options.calibration, *map(str, numbers)]
        self.run("samples", [sys.executable, "-c", SAMPLE, *arguments], options.devices - 1)

    def compile(self, case: str) -> None:
        """Compile without training, on the first device."""
        options, path = self.options, self.path(case, "start")
        if not path.exists():
            data = ["--calibration", options.calibration, "--device", options.device, "-o", str(path)]
            self.run(path.name, [*COMMAND, "compile", options.model, *CASES[case].compile.split(), *data], 0)

    def train(self, case: str, place: int) -> None:
        """Fit and distil what was compiled."""
        options, path = self.options, self.path(case, "trained")
        if (path / "config.json").exists():
            return
        command = [*COMMAND, "calibrate", str(self.path(case, "start")), "--teacher", options.model]
        fit_steps = round(options.steps * CASES[case].fitting)
        command += ["--calibration", options.calibration, "--device", options.device, "--checkpoint-every", "200"]
        command += ["--fit-steps", str(fit_steps), "--distill-steps", str(options.steps - fit_steps)]
        command += ["--batch-size", str(options.batch_size), "--seq-len", str(options.seq_len)]
        command += ["--self-generated", str(options.self_generated), "--train", "all", "--distill-optimizer", "muon"]
        command += [*CASES[case].train.split(), "-o", str(path)]
        self.run(path.name, command, place)

    def evaluate(self, model: str, name: str, place: int) -> list[float]:
        """Perplexity on every text, as far as it goes; not a number where there is none."""
        options = self.options
        arguments = [model, options.device, str(options.windows), str(options.seq_len), *options.text]
        printed = self.run(f"{name}-evaluated", [sys.executable, "-c", EVALUATE, *arguments], place).split()
        return [*map(float, printed), *[math.nan] * (len(options.text) - len(printed))]


def main() -> None:
    """Run all stages and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--text", action="append", required=True, help="to evaluate on; several times")
    parser.add_argument("--cases", help=f"with commas, of {', '.join(CASES)}", default=",".join(CASES))
    parser.add_argument("--steps", type=int, default=2400, help="of fitting and distillation together")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--self-generated", type=float, default=0.5)
    parser.add_argument("--windows", type=int, default=80)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--devices", type=int, default=1, help="how many GPUs")
    parser.add_argument("-o", "--output", required=True)
    options = parser.parse_args()
    runs, cases = Runs(options), options.cases.split(",")
    with ThreadPoolExecutor(2 * len(cases) + 2) as pool:
        started = [pool.submit(runs.sample)] if options.self_generated else []
        started += [pool.submit(runs.compile, case) for case in cases]
        for job in started:
            job.result()
        training = {case: pool.submit(runs.train, case, place) for place, case in enumerate(cases)}
        before = {"source": pool.submit(runs.evaluate, options.model, "source", 0)}
        for place, case in enumerate(cases):
            path = runs.path(case, "start")
            before[f"{case} one-shot"] = pool.submit(runs.evaluate, str(path), path.name, place)
        for job in training.values():
            job.result()
        after = {}
        for place, case in enumerate(cases):
            path = runs.path(case, "trained")
            after[f"{case} trained"] = pool.submit(runs.evaluate, str(path), path.name, place)
        figures = {name: job.result() for name, job in {**before, **after}.items()}
    print("| |" + "|".join(Path(text).stem for text in options.text) + "|")
    print("|---" * (len(options.text) + 1) + "|")
    for name, values in figures.items():
        shown = (f"{v:.2f} ({v / base:.3f})" for v, base in zip(values, figures["source"], strict=True))
        print(f"| {name} | {' | '.join(shown)} |")


if __name__ == "__main__":
    main()

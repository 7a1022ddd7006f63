"""What calibration leaves on disk while it runs: a checkpoint to go on from, a log, a plot of the losses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg", force=False)
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from attnedit.compiler.errors import AttneditError
from attnedit.compiler.files import replaced
from attnedit.compiler.formats import FORMAT_KEY, check_format
from attnedit.compiler.processes import processes
from attnedit.passes.calibration.parameters import snapshot

STATE_FILE = "calibration.pt"
LOG_FILE = "calibration.jsonl"
PLOT_FILE = "calibration.png"
FORMAT_VERSION = 1
"""Of `STATE_FILE`: stages by name."""


class Journal:
    """Checkpoints and log of one run.

    A checkpoint holds the last state of every stage that is over, and the state of the one at work; it is written
    beside the old one and then takes its name, so that a run killed at any point leaves a whole one. Without a
    directory nothing is kept.
    """

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self._stages: dict[str, dict[str, Any]] = {}
        if directory is None:
            return
        directory.mkdir(parents=True, exist_ok=True)
        self._file = directory / _state_file()
        file = self._file
        if file.exists():
            try:
                self._stages = torch.load(file, map_location="cpu", weights_only=True)
            except (OSError, RuntimeError, EOFError, ValueError) as error:
                raise AttneditError(f"{file} cannot be read ({type(error).__name__}); start again") from error
            check_format(self._stages, FORMAT_VERSION, str(file))
            self._stages.pop(FORMAT_KEY, None)
        self._cut_log()

    def resume(self, stage: str) -> dict[str, Any] | None:
        """What was saved of a stage: state, parameters, their sizes, optimiser (None when over), best.

        Raises:
            AttneditError: processes that hold parts of the weights left checkpoints of different steps.
        """
        saved = self._stages.get(stage)
        step = saved["state"]["step"] if saved else -1
        if processes().sharded and processes().add({"step": step})["step"] != step * processes().count:
            raise AttneditError(f"{self.directory}: the processes' checkpoints do not belong together; start again")
        return saved

    def checkpoint(
        self,
        state: Mapping[str, Any],
        parameters: Mapping[str, nn.Parameter],
        sizes: Mapping[str, float],
        optimiser: Mapping[str, Any] | None,
        best: Mapping[str, Tensor],
    ) -> None:
        """Save where the stage `state["name"]` is."""
        if self.directory is None or not (processes().main or processes().sharded):
            return
        saved = {
            "state": dict(state),
            "parameters": snapshot(parameters),
            "sizes": dict(sizes),
            "optimiser": optimiser,
            "best": dict(best),
        }
        self._stages[state["name"]] = saved
        with replaced(self._file) as part:
            torch.save({FORMAT_KEY: FORMAT_VERSION, **self._stages}, part)
            if processes().sharded:
                processes().wait()  # all parts of a checkpoint, or none

    def log(self, entry: Mapping[str, Any]) -> None:
        """Add a line of JSON."""
        if self.directory is not None and processes().main:
            with (self.directory / LOG_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(entry) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Everything logged; a last line that was cut short is left out."""
        if self.directory is None or not (self.directory / LOG_FILE).exists():
            return []
        found = []
        for line in (self.directory / LOG_FILE).read_text(encoding="utf-8").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def plot(self) -> None:
        """Draw training and held-out losses of every stage."""
        entries = self.entries()
        if self.directory is None or not entries or not processes().main:
            return
        stages = list(dict.fromkeys(entry["stage"] for entry in entries))
        figure = Figure(figsize=(5 * len(stages), 3.5), layout="constrained")
        for axis, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
            lines = [entry for entry in entries if entry["stage"] == stage]
            axis.plot([e["step"] for e in lines], [e["loss"] for e in lines], linewidth=0.8, label="training")
            looks = [entry for entry in lines if "held_out" in entry]
            axis.plot([e["step"] for e in looks], [e["held_out"] for e in looks], marker=".", label="held out")
            axis.set(title=stage, xlabel="step", ylabel="loss", yscale="log")
            axis.legend()
        figure.savefig(self.directory / PLOT_FILE, dpi=120)

    def _cut_log(self) -> None:
        """Drop what was logged after the checkpoint: it will be done again."""
        entries = self.entries()
        done = {name: saved["state"]["step"] for name, saved in self._stages.items()}
        kept = [entry for entry in entries if entry["step"] <= done.get(entry["stage"], 0)]
        if self.directory is not None and entries and processes().main:
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            (self.directory / LOG_FILE).write_text(text, encoding="utf-8")


def _state_file() -> str:
    """Of this process, if it has weights that no other has."""
    file = Path(STATE_FILE)
    return f"{file.stem}-{processes().rank}-of-{processes().count}{file.suffix}" if processes().sharded else STATE_FILE

"""The calibration pass: layer-wise fitting, then distillation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.errors import UsageError
from attnedit.compiler.evaluation.evaluate import perplexity
from attnedit.compiler.execution.stream import decoder_layers, replaced_forwards
from attnedit.compiler.model_io.heads import has_language_head
from attnedit.compiler.processes import processes
from attnedit.compiler.progress import Progress
from attnedit.passes.calibration.batches import Batches
from attnedit.passes.calibration.compiled import compiled, pieces, worthwhile
from attnedit.passes.calibration.cuda_graphs import Replayed
from attnedit.passes.calibration.distillation import Distillation, distillation_rate, summed_divergence
from attnedit.passes.calibration.fitting import HiddenStates, LayerFit, fitting_rate, groups, hidden_before
from attnedit.passes.calibration.journal import Journal
from attnedit.passes.calibration.optimiser import matrices
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.parameters import as_before, own_memory, trainable
from attnedit.passes.calibration.sharding import Models, spread
from attnedit.passes.calibration.state import StageState
from attnedit.passes.calibration.training import (
    Stage,
    mixed_precision,
    multiplies_half,
    run_stage,
    weighted_sum,
)

FIT, DISTILL = "fit", "distill"


@dataclass(frozen=True)
class Calibrated:
    """What calibration did.

    Attributes:
        stages: each with steps, tokens, losses and time.
        perplexity: on held-out windows, of "source", "start", and after each kind of stage, "fit" and "distill".
    """

    stages: list[StageState]
    perplexity: dict[str, float]


def calibrate(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sites: Sequence[AttentionSite],
    batches: Batches,
    options: CalibrationOptions,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """Train the rewritten attention of `student` in place.

    Args:
        student: the rewritten model in eval mode. What is trained gets memory of its own; the rest may be the
            teacher's.
        teacher: the live source in eval mode; not changed.
        sites: the teacher's attention sites that are rewritten in `student`.
        batches: of `options.fit_steps` and then `options.distill_steps` steps.
        options: see `CalibrationOptions`.
        directory: for checkpoints, log and plot, and to go on from; None for none.
        progress: see `attnedit.compiler.progress`.

    Raises:
        DivergedError: training broke down; the student has its best state.
    """
    _check_shares(options)
    journal = Journal(directory)
    names = [site.name for site in sites]
    attention = trainable(student, names, "attention")
    learned = {**attention, **(trainable(student, names, options.train) if options.distill_steps else {})}
    figures: dict[str, float] = {}
    stages: list[StageState] = []

    def look(when: str, model: PreTrainedModel) -> None:
        if not has_language_head(model):
            return
        with mixed_precision(teacher):
            length = batches.held_out.shape[1]
            found = perplexity(model, batches.held_out.flatten(), seq_len=length, windows=len(batches.held_out))
        figures[when] = found.perplexity

    look("source", teacher)
    look("start", student)
    with _only(student, learned), _only(teacher, {}):
        dtypes = own_memory(learned)
        processes().copy_from_main(parameter.data for parameter in learned.values())
        placed: AbstractContextManager[Models] = nullcontext((student, teacher, dict(learned)))
        if processes().sharded:
            placed = spread(student, teacher, sites, learned, half=multiplies_half(teacher))
        try:
            with placed as (new, old, weights):
                if options.fit_steps:
                    stages += _fit(new, old, sites, batches, options, journal, progress)
                    look(FIT, new)
                if options.distill_steps:
                    stages.append(_distill(new, old, sites, weights, batches, options, journal, progress))
                    look(DISTILL, new)
        finally:
            as_before(learned, dtypes)
    journal.plot()
    return Calibrated(stages, figures)


def _check_shares(options: CalibrationOptions) -> None:
    """Models in parts are put together by all processes at once, so all have to do the same."""
    count = processes().count * options.accumulation
    if processes().sharded and options.distill_steps and options.distill_optimizer == "muon":
        raise UsageError("Muon needs whole matrices, and weights are in parts; ask for distill_optimizer adamw")
    if processes().sharded and options.batch_size % count:
        raise UsageError(
            f"batch_size {options.batch_size} must be a multiple of processes times accumulation, {count}, where "
            "weights are in parts"
        )


def _fit(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sites: Sequence[AttentionSite],
    batches: Batches,
    options: CalibrationOptions,
    journal: Journal,
    progress: Progress | None,
) -> list[StageState]:
    """Fit the layers in as many turns as memory asks for, each a stage."""
    device = _device(teacher)
    own = {site.name: trainable(student, [site.name], "attention") for site in sites}
    sizes = {name: sum(p.numel() for p in parameters.values()) for name, parameters in own.items()}
    parts = groups(sites, sizes, options.memory_limit)
    if len(parts) > 1 and options.short_seq_len is not None:
        raise UsageError(
            f"memory_limit fits the layers in {len(parts)} turns, with hidden states of whole windows; give it more, "
            "or leave out short_seq_len"
        )
    states: list[StageState] = []
    # Between the pieces the source's attention shows what goes in and comes out.
    parts_of = pieces(decoder_layers(teacher, list(sites))[0]) + [student.get_submodule(site.name) for site in sites]
    fast = compiled(parts_of, worthwhile(options.torch_compile, device, options.fit_steps))
    own_directory = TemporaryDirectory(prefix="hidden-", dir=journal.directory) if len(parts) > 1 else nullcontext()
    with own_directory as scratch, fast:
        hidden: HiddenStates | None = None
        for number, group in enumerate(parts, 1):
            if scratch is not None and number > 1:
                hidden = hidden_before(teacher, sites, group[0], batches.windows, Path(scratch), options)
            name = FIT if len(parts) == 1 else f"{FIT} {number}/{len(parts)}"
            stage = _fit_stage(name, student, teacher, group, own, hidden, batches, options)
            states.append(run_stage(stage, options, journal, progress=progress))
    return states


def _fit_stage(
    name: str,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    group: list[AttentionSite],
    own: Mapping[str, Mapping[str, nn.Parameter]],
    hidden: HiddenStates | None,
    batches: Batches,
    options: CalibrationOptions,
) -> Stage:
    """The stage in which a group of layers learns.

    Args:
        name: of the stage.
        student: holds the new attention.
        teacher: the source.
        group: sites of the layers, in order.
        own: parameters of the new attention of every site, by the site's name.
        hidden: hidden states before the group's first layer; None for a group that starts at the first.
        batches: of the whole job.
        options: of the pass.
    """
    device = _device(teacher)
    students = {site.name: student.get_submodule(site.name) for site in group}
    learning, held = LayerFit(teacher, students, group, hidden), LayerFit(teacher, students, group)
    parameters = {place: p for site in group for place, p in own[site.name].items()}

    def losses_of(part: Tensor, rows: Tensor) -> Mapping[str, Tensor]:
        with mixed_precision(teacher):
            return learning.losses(part, rows, len(part) / options.batch_size)

    part_losses = Replayed(losses_of, list(parameters.values())) if options.cuda_graphs else losses_of

    def learn(step: int) -> Mapping[str, float]:
        both = batches[step], batches.order[step]
        parts = (processes().share(of_all).chunk(options.accumulation) for of_all in both)
        found = [
            (len(part) / options.batch_size, part_losses(part.to(device), rows))
            for part, rows in zip(*parts, strict=True)
        ]
        return _mean(weighted_sum(found))

    def evaluate() -> list[float]:
        found = []
        for share, part in _held_out(batches, options):
            with mixed_precision(teacher):
                found.append((share, held.losses(part.to(device))))
        losses = weighted_sum(found)
        return [losses.get(site.name, 0.0) for site in group]

    return Stage(
        name=name,
        parameters=parameters,
        parts=[list(own[site.name]) for site in group],
        steps=options.fit_steps,
        rate=_rate(options.fit_learning_rate, fitting_rate),
        tokens=batches.tokens,
        learn=learn,
        evaluate=evaluate,
        backs_off=True,
    )


def _distill(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sites: Sequence[AttentionSite],
    learned: Mapping[str, nn.Parameter],
    batches: Batches,
    options: CalibrationOptions,
    journal: Journal,
    progress: Progress | None,
) -> StageState:
    """Distil the whole model, as one stage."""
    device = _device(teacher)
    compared = _feature_layers(teacher, sites, options.feature_layers) if options.feature_weight else []
    compiling = worthwhile(options.torch_compile, device, options.distill_steps)
    divergence = torch.compile(summed_divergence, dynamic=False) if compiling else summed_divergence
    step_losses = Distillation(student, teacher, compared, divergence)

    def losses_of(part: Tensor, weight: Tensor) -> Mapping[str, Tensor]:
        with mixed_precision(teacher):
            share = len(part) / options.batch_size
            divergence, features = step_losses.losses(part, share, weight if compared else None)
        return {"loss": divergence, "features": features} if compared else {"loss": divergence}

    part_losses = Replayed(losses_of, list(learned.values())) if options.cuda_graphs else losses_of

    def learn(step: int) -> Mapping[str, float]:
        # The weak pull on hidden states helps early and only biases later on.
        weight = torch.tensor(options.feature_weight * (1 - step / options.distill_steps), device=device)
        windows = batches.noisy(options.fit_steps + step, options.token_noise)
        parts = processes().share(windows).chunk(options.accumulation)
        found = [(len(part) / options.batch_size, part_losses(part.to(device), weight)) for part in parts]
        return weighted_sum(found)

    @torch.no_grad()
    def evaluate() -> list[float]:
        found = []
        for share, part in _held_out(batches, options):
            with mixed_precision(teacher):
                found.append((share, {"loss": step_losses.losses(part.to(device))[0]}))
        return [weighted_sum(found).get("loss", 0.0)]

    stage = Stage(
        name=DISTILL,
        parameters=learned,
        parts=[list(learned)],
        steps=options.distill_steps,
        rate=_rate(options.distill_learning_rate, distillation_rate),
        tokens=lambda step: batches.tokens(options.fit_steps + step),
        learn=learn,
        evaluate=evaluate,
        orthogonal=matrices(student, learned) if options.distill_optimizer == "muon" else (),
    )
    layers = [layer for model in (teacher, student) for layer in decoder_layers(model, list(sites))[0]]
    # Weights in parts are put together by hooks around the pieces.
    whole = pieces(layers) if processes().sharded else layers
    with compiled(whole, compiling), _activation_checkpointing(student, sites, options.activation_checkpointing):
        return run_stage(stage, options, journal, progress=progress)


def _held_out(batches: Batches, options: CalibrationOptions) -> list[tuple[float, Tensor]]:
    """This process's held-out windows, in parts, each with its share of all; none where it has none.

    Where weights are in parts, all processes run equally often: what one has less than another it fills up with a
    window that counts for nothing.
    """
    size = max(1, options.batch_size // options.accumulation)
    count, rows = len(batches.held_out), processes().share(batches.held_out)
    parts = [(len(part) / count, part) for part in rows.split(size)] if len(rows) else []
    if processes().sharded:
        rounds = math.ceil(math.ceil(count / processes().count) / size)
        parts += [(0.0, batches.held_out[:1])] * (rounds - len(parts))
    return parts


def _rate(given: float | None, suggested: Callable[[float], float]) -> Callable[[float], float]:
    return suggested if given is None else lambda _: given


def _mean(losses: Mapping[str, float]) -> dict[str, float]:
    return {"loss": sum(losses.values()) / max(1, len(losses))}


def _feature_layers(teacher: PreTrainedModel, sites: Sequence[AttentionSite], count: int) -> list[str]:
    """Names of decoder layers evenly spread, the last among them."""
    layers, _ = decoder_layers(teacher, list(sites))
    names = {id(module): name for name, module in teacher.named_modules()}
    count = min(count, len(layers))
    return [names[id(layers[len(layers) * (index + 1) // count - 1])] for index in range(count)]


@contextmanager
def _only(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for these parameters alone while inside."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    chosen = {id(parameter) for parameter in parameters.values()}
    for parameter, _ in before:
        parameter.requires_grad_(id(parameter) in chosen)
    try:
        yield
    finally:
        for parameter, required in before:
            parameter.requires_grad_(required)


@contextmanager
def _activation_checkpointing(student: PreTrainedModel, sites: Sequence[AttentionSite], wanted: bool) -> Iterator[None]:
    """Each decoder layer keeps its input alone. Not transformers' own switch, which needs dropout switched on too."""
    layers = list(decoder_layers(student, list(sites))[0]) if wanted else []
    # Nothing is random here, and a CUDA graph may not read the state of random numbers.
    forwards = [partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False) for layer in layers]
    with replaced_forwards(layers, forwards):
        yield


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""Layer-wise teacher forcing: every rewritten attention learns the source attention's output on the source's input.

Layers are independent: no error passes from one to the next, so any group of them can be trained at a time (Attention
Editing, arXiv 2604.05688, layer-wise stage). While a batch goes through the source, each layer's loss and gradient are
computed when its attention is met, so that activations of one layer are held at a time.

Letters in shapes: B windows, T tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.stream import Walk, decoder_layers
from attnedit.passes.calibration.optimiser import half_power, suggested_rate
from attnedit.passes.calibration.options import CalibrationOptions
from attnedit.passes.calibration.training import mixed_precision

HIGHEST_RATE = 0.02
BYTES_PER_PARAMETER = 16
"""Float32 weight, gradient and two moments."""


class LayerFit:
    """Losses and gradients of a group of rewritten attention modules.

    Args:
        teacher: the live source in eval mode.
        students: rewritten attention modules by the site's name.
        sites: all sites of the teacher that `students` has, in order.
        hidden: hidden states before the group's first layer, on disk; None for a group that starts at the first.
    """

    def __init__(
        self,
        teacher: PreTrainedModel,
        students: Mapping[str, nn.Module],
        sites: Sequence[AttentionSite],
        hidden: HiddenStates | None = None,
    ) -> None:
        self._teacher, self._students, self._hidden = teacher, students, hidden
        self._layers, by_layer = decoder_layers(teacher, list(sites))
        self._first, self._last = min(by_layer), max(by_layer)

    def losses(self, ids: Tensor, rows: Tensor | None = None, scale: float | None = None) -> dict[str, Tensor]:
        """Squared error of each module's output as a fraction of the source output's power, mean over windows.

        Half of it is that of all tokens, and half that of the first one alone, since whole windows depend on it (an
        attention sink, which grows to thousands of times the others' size: arXiv 2309.17453, 2402.17762).

        Args:
            ids: token ids [B, T].
            rows: of `hidden` that belong to them [B].
            scale: accumulate gradients of the losses times this; None for none.

        Returns:
            Detached scalars by the site's name.
        """
        found: dict[str, Tensor] = {}

        def learn(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                wanted = first_output(output).detach().float()
                with torch.set_grad_enabled(scale is not None):
                    new = first_output(self._students[name](*args, **kwargs)).float()
                    wrong, power = (x.square().sum(-1) for x in (new - wanted, wanted))
                    of_all, of_first = (
                        wrong[:, :end].sum(1) / power[:, :end].sum(1).clamp(min=1e-20) for end in (None, 1)
                    )
                    loss = (of_all + of_first).mean() / 2
                    if scale is not None:
                        (loss * scale).backward()
                found[name] = loss.detach()

            return hook

        with torch.no_grad():
            walk = Walk(self._teacher, self._layers, ids)
            first = 0
            if self._hidden is not None and rows is not None:
                first = self._first
                walk.skip_to(first, self._hidden.read(rows))
            with hooked(self._teacher, {name: learn(name) for name in self._students}):
                for _ in range(first, self._last + 1):
                    walk.advance()
        return found


class HiddenStates:
    """Hidden states of all training windows before one layer [N, T, D], in a file; dtype and device as of `like`."""

    def __init__(self, path: Path, shape: tuple[int, int, int], like: Tensor) -> None:
        size = shape[0] * shape[1] * shape[2]
        self._states = torch.from_file(str(path), shared=True, size=size, dtype=like.dtype).view(shape)
        self._device = like.device

    def read(self, rows: Tensor) -> Tensor:
        """[B, T, D] on the device."""
        return self._states[rows.cpu()].to(self._device)

    def write(self, rows: Tensor, hidden: Tensor) -> None:
        """Put [B, T, D] in place."""
        self._states[rows.cpu()] = hidden.detach().cpu()


def fitting_rate(error: float) -> float:
    """Highest learning rate for a layer whose start has this error, as a fraction of the output's power.

    Found on SmolLM2 with starts of 0.035 to 0.2 (docs/notebook/2026-11-cost.md). To half a power of two, so that
    weights of layers with like starts are updated together, and alike however layers are grouped.
    """
    return half_power(suggested_rate(error, 0.035, HIGHEST_RATE))


def groups(sites: Sequence[AttentionSite], sizes: Mapping[str, int], limit: int | None) -> list[list[AttentionSite]]:
    """Split sites into groups of neighbours whose training fits a memory limit; at least one site each.

    Args:
        sites: in layer order.
        sizes: trained parameters of each, by name.
        limit: bytes for their weights, gradients and moments; None for no limit.
    """
    if limit is None:
        return [list(sites)]
    result: list[list[AttentionSite]] = []
    room = 0
    for site in sites:
        need = BYTES_PER_PARAMETER * sizes[site.name]
        if not result or need > room:
            result.append([])
            room = limit
        result[-1].append(site)
        room -= need
    return result


@torch.no_grad()
def hidden_before(
    teacher: PreTrainedModel,
    sites: Sequence[AttentionSite],
    site: AttentionSite,
    windows: Tensor,
    scratch: Path,
    options: CalibrationOptions,
) -> HiddenStates:
    """Hidden states of all windows before a site's layer, from those before an earlier one if they are there."""
    layers, by_layer = decoder_layers(teacher, list(sites))
    target = next(index for index, found in by_layer.items() if found.name == site.name)
    earlier = sorted(int(file.stem) for file in scratch.glob("*.hidden"))
    start = max((index for index in earlier if index < target), default=0)
    size = max(1, options.batch_size // options.accumulation)
    old: HiddenStates | None = None
    new: HiddenStates | None = None
    for rows in torch.arange(len(windows)).split(size):
        with mixed_precision(teacher):
            walk = Walk(teacher, layers, windows[rows])
            shape = (len(windows), *walk.hidden.shape[1:])
            if start:
                old = old or HiddenStates(scratch / f"{start}.hidden", shape, walk.hidden)
                walk.skip_to(start, old.read(rows))
            for _ in range(start, target):
                walk.advance()
            new = new or HiddenStates(scratch / f"{target}.hidden", shape, walk.hidden)
            new.write(rows, walk.hidden)
    assert new is not None
    for index in earlier:
        (scratch / f"{index}.hidden").unlink()
    return new


@contextmanager
def hooked(model: nn.Module, hooks: Mapping[str, Callable[..., None]]) -> Iterator[None]:
    """Call hooks after the forward of the modules of their names, with positional and keyword arguments and output."""
    handles = [model.get_submodule(name).register_forward_hook(hook, with_kwargs=True) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def first_output(output: Any) -> Tensor:
    """What a module returns first, or alone."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found

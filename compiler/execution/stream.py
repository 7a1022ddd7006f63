"""Run a model over calibration windows one decoder layer at a time.

Only the hidden states between two layers are kept, so memory does not grow with depth, and every attention module is
met with exactly the arguments that the live model gives it (teacher forcing: always the source's own hidden states).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.torch_names import pytree
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.execution.model_inputs import body_of, is_given
from attnedit.compiler.graph.modules import lists_around
from attnedit.compiler.model_io.heads import outputs_of
from attnedit.compiler.model_io.source_checks import embedding_weight
from attnedit.compiler.progress import Progress, silent

BATCH_TOKENS = 4096
"""Tokens that go through a layer at once."""


@dataclass(frozen=True)
class AttentionInputs:
    """The arguments of one attention module on one batch of calibration windows."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


Visit = Callable[[AttentionSite, Iterator[AttentionInputs]], None]


@dataclass
class _Batch:
    """Hidden states [B, T, D] entering the next layer, and what else each layer is called with.

    `added` is what the model adds to the hidden states before a layer, if anything: features of an image.
    """

    hidden: Tensor
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]]
    added: dict[int, Tensor]


def decoder_layers(model: nn.Module, sites: list[AttentionSite]) -> tuple[nn.ModuleList, dict[int, AttentionSite]]:
    """The list of decoder layers that holds all sites, and the site of each layer index.

    Raises:
        CaptureError: the sites do not lie in one list of layers, one per layer.
    """
    for prefix, layers in lists_around(model, sites[0].name):
        by_layer = {int(s.name[len(prefix) + 1 :].split(".")[0]): s for s in sites if s.name.startswith(prefix + ".")}
        if len(by_layer) == len(sites):
            return layers, by_layer
    raise CaptureError(f"{sites[0].name}: its layers are not in one torch.nn.ModuleList, so they cannot be streamed")


class Stream:
    """Calibration windows on their way through the decoder layers, in batches; each layer runs once for each.

    Construction runs what comes before the layers (embeddings, masks, rotary tables) on all windows, and layer 0 on two
    tokens, to learn what a layer returns.

    Args:
        model: live model in eval mode; left as it was.
        layers: its decoder layers. Apart from those that run, their weights may be on meta.
        windows: token ids [N, T] of each length T, int64, no padding.
        exact: compute hidden states in the model's dtype. If not, matrix products of the layers are in bfloat16 on a
            processor that is faster so; attention modules still get the same arguments as their layer's.

    Raises:
        CaptureError: the model's layers exchange more than hidden states.
    """

    @torch.no_grad()
    def __init__(
        self, model: PreTrainedModel, layers: nn.ModuleList, windows: Sequence[Tensor], *, exact: bool = True
    ) -> None:
        device = embedding_weight(model).device
        self._model, self._layers = model, layers
        self._parts = [_enter(model, layers, rows) for rows in windows]
        fast = not exact and device.type == "cpu" and fast_bfloat16()
        self._probe = _enter(model, layers, windows[0][:1, :2])[0] if fast else None

    @property
    def hidden(self) -> list[Tensor]:
        """Hidden states [N, T, D] before the next layer, of each length."""
        return [torch.cat([batch.hidden for batch in part]) for part in self._parts]

    def skip_to(self, index: int, hidden: Sequence[Tensor]) -> None:
        """Go on before layer `index` with the hidden states [N, T, D] of each length known from an earlier stream."""
        for part, states in zip(self._parts, hidden, strict=True):
            for batch, rows in zip(part, states.split([len(batch.hidden) for batch in part]), strict=True):
                # A copy: where a tensor begins in memory may decide how its products are rounded.
                batch.hidden = rows.to(batch.hidden.device, copy=True)
                batch.calls = {layer: call for layer, call in batch.calls.items() if layer >= index}

    @property
    def _batches(self) -> list[_Batch]:
        return [batch for part in self._parts for batch in part]

    def advance(self, index: int) -> None:
        """Go through layer `index`, the next one."""
        context = self._context(index)
        for batch in self._batches:
            with torch.no_grad(), context:
                _advance(self._layers[index], index, batch)

    @contextmanager
    def inputs(self, index: int, attention: str) -> Iterator[Iterator[AttentionInputs]]:
        """Go through layer `index`, the next one, and give what its attention module is called with, by batch."""
        module = self._model.get_submodule(attention)
        found = _inputs(self._layers[index], index, module, self._batches, self._context(index))
        with torch.no_grad():
            yield found
            for _ in found:  # a reader that stopped early must not stop the hidden states
                pass

    @torch.no_grad()
    def _context(self, index: int) -> torch.autocast:
        """Autocast where it is wanted and works: some mixtures of experts add up outputs in the dtype they came in."""
        works = self._probe is not None
        if self._probe is not None:
            args, kwargs = self._probe.calls[index]
            try:
                with torch.autocast("cpu", torch.bfloat16):
                    self._layers[index](self._probe.hidden, *args, **kwargs)
            except RuntimeError:
                works = False
        return torch.autocast("cpu", torch.bfloat16, enabled=works)


@torch.no_grad()
def stream(
    model: PreTrainedModel,
    sites: list[AttentionSite],
    windows: Sequence[Tensor],
    visit: Visit,
    *,
    progress: Progress | None = None,
    stage: str = "calibrate",
    exact: bool = True,
) -> None:
    """Call `visit(site, inputs)` for every site in layer order; `inputs` iterates over the batches.

    Args:
        model: live source model in eval mode; left as it was.
        sites: sites to visit, all in one list of decoder layers.
        windows: token ids [N, T] of each length T, int64, no padding.
        visit: must consume `inputs`; while it iterates, each batch's layer runs once.
        progress: told of every layer.
        stage: name under which progress is told.
        exact: as for `Stream`.

    Raises:
        CaptureError: the model's layers exchange more than hidden states, or are not in one list.
    """
    layers, by_layer = decoder_layers(model, sites)
    report = progress or silent
    batches = Stream(model, layers, windows, exact=exact)
    last = max(by_layer)
    report(stage, 0, last + 1)
    for index in range(last + 1):
        if site := by_layer.get(index):
            with batches.inputs(index, site.name) as inputs:
                visit(site, inputs)
        else:
            batches.advance(index)
        report(stage, index + 1, last + 1)


class Walk:
    """One batch on its way through the decoder layers, from where the model can be run to its end any number of times.

    Args:
        model: live model in eval mode.
        layers: its decoder layers.
        ids: token ids [B, T], int64, no padding.

    Raises:
        CaptureError: the layers exchange more than hidden states.
    """

    def __init__(self, model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor) -> None:
        self._model, self._layers = model, layers
        self._ids = ids.to(next(model.parameters()).device)
        self._returned = _returned(model, layers, self._ids[:1, :2])
        (self._batch,) = _enter(model, layers, self._ids, size=len(ids))
        self._index = 0

    def advance(self) -> None:
        """Go through the next layer as it stands."""
        _advance(self._layers[self._index], self._index, self._batch)
        self._index += 1

    @property
    def hidden(self) -> Tensor:
        """Hidden states [B, T, D] before the next layer."""
        return self._batch.hidden

    def skip_to(self, index: int, hidden: Tensor) -> None:
        """Go on before layer `index` with the hidden states [B, T, D] known from an earlier walk."""
        for passed in range(self._index, index):
            self._batch.calls.pop(passed)
        self._batch.hidden, self._index = hidden, index

    def logits(self) -> Tensor:
        """Logits [B, T, V] of the model as it stands from here on, as if all before had not changed.

        Last hidden states [B, T, D] where it has no language-model head.
        """
        hidden, returned = self._batch.hidden, self._returned

        def skip(*_: Any, **__: Any) -> Any:
            return (hidden, *[None] * (returned - 1)) if returned else hidden

        with replaced_forwards(list(self._layers[: self._index]), [skip] * self._index):
            return outputs_of(self._model, self._ids, use_cache=False)


@contextmanager
def replaced_forwards(modules: Sequence[nn.Module], forwards: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """Let other functions compute what the modules do while inside."""
    originals = [(module, module.__dict__.get("forward")) for module in modules]
    for module, forward in zip(modules, forwards, strict=True):
        module.forward = forward
    try:
        yield
    finally:
        for module, original in originals:
            if original is None:
                del module.forward
            else:
                module.forward = original


def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> AbstractContextManager[None]:
    """`replaced_forwards` for one."""
    return replaced_forwards([module], [forward])


def _inputs(
    layer: nn.Module, index: int, attention: nn.Module, batches: list[_Batch], context: torch.autocast
) -> Iterator[AttentionInputs]:
    """Advance batch by batch through a layer, and yield what its attention module is called with, exactly once each."""
    seen: list[AttentionInputs] = []

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(AttentionInputs(args, kwargs))

    for batch in batches:
        handle = attention.register_forward_pre_hook(record, with_kwargs=True)
        try:
            with context:
                _advance(layer, index, batch)
        finally:
            handle.remove()
        yield seen.pop()


def fast_bfloat16() -> bool:
    """Whether this processor multiplies matrices of bfloat16 faster than those of float32."""
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_tile"))


def _advance(layer: nn.Module, index: int, batch: _Batch) -> None:
    """Run a batch through a layer; what the layer is called with is given up, so that memory falls with depth."""
    args, kwargs = batch.calls.pop(index)
    hidden = batch.hidden + batch.added[index] if index in batch.added else batch.hidden
    output = layer(hidden, *args, **kwargs)
    batch.hidden = output[0] if isinstance(output, tuple) else output


def _enter(model: PreTrainedModel, layers: nn.ModuleList, windows: Tensor, size: int | None = None) -> list[_Batch]:
    """Run everything before the first layer, with layers that only record how they are called."""
    device = embedding_weight(model).device
    size = 1 if is_given(windows) else size or max(1, BATCH_TOKENS // windows.shape[1])
    returned = _returned(model, layers, windows[:1, :2].to(device))
    batches: list[_Batch] = []
    for rows in windows.split(size):
        calls, entered = _record(model, layers, rows.to(device), returned)
        if len(calls) != len(layers):
            raise CaptureError(f"{type(model).__name__}: not every decoder layer runs once per forward pass")
        added = _additions(entered)
        if added:
            halved = _additions(_record(model, layers, rows.to(device), returned, scale=0.5)[1], scale=0.5)
            if any(not torch.allclose(value, halved[index], rtol=1e-3, atol=1e-3) for index, value in added.items()):
                raise CaptureError(f"{type(model).__name__}: hidden states change between its decoder layers")
        if batches:
            calls = _share(calls, batches[0].calls)
        batches.append(_Batch(entered[0], calls, added))
    return batches


def _record(
    model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor, returned: int, scale: float = 1.0
) -> tuple[dict[int, tuple[tuple[Any, ...], dict[str, Any]]], list[Tensor]]:
    """What each layer is called with, hidden states apart, where layers do nothing but scale."""
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}
    entered: list[Tensor] = []
    recorders = [_recorder(index, calls, entered, returned, scale) for index in range(len(layers))]
    with replaced_forwards(list(layers), recorders):
        body_of(model)(input_ids=ids, use_cache=False)
    return calls, entered


def _additions(entered: list[Tensor], scale: float = 1.0) -> dict[int, Tensor]:
    """What came to the hidden states before each layer, where something did: some models add features of images."""
    pairs = enumerate(itertools.pairwise(entered), start=1)
    changed = {index: (before, after) for index, (before, after) in pairs if scale != 1 or after is not before}
    return {index: after - scale * before for index, (before, after) in changed.items()}


def _recorder(
    index: int,
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]],
    entered: list[Tensor],
    returned: int,
    scale: float,
) -> Callable[..., Any]:
    """A forward in place of a layer's: notes the arguments, and returns the hidden states scaled, in a layer's form."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        if args:
            hidden, args = args[0], args[1:]
        else:
            hidden = kwargs.pop("hidden_states")
        calls[index] = (args, kwargs)
        entered.append(hidden)
        hidden = hidden if scale == 1 else scale * hidden
        return (hidden, *[None] * (returned - 1)) if returned else hidden

    return forward


class _Enough(Exception):
    """Ends a forward pass of which the rest is not needed."""


def _returned(model: PreTrainedModel, layers: nn.ModuleList, ids: Tensor) -> int:
    """The length of the tuple that layers return; 0 where they return a tensor."""
    found: list[int] = []

    def look(_: nn.Module, __: Any, output: Any) -> None:
        found.append(len(output) if isinstance(output, tuple) else 0)
        raise _Enough

    handle = layers[0].register_forward_hook(look)
    try:
        with suppress(_Enough):
            body_of(model)(input_ids=ids, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _share(calls: dict[int, Any], first: dict[int, Any]) -> dict[int, Any]:
    """Use the first batch's tensors wherever they are equal: masks and rotary tables are the same for all."""
    pool = {id(leaf): leaf for leaf in pytree.tree_leaves(list(first.values())) if isinstance(leaf, Tensor)}
    known: dict[int, Tensor] = {}

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in known:
            same = (
                t for t in pool.values() if t.shape == leaf.shape and t.dtype == leaf.dtype and torch.equal(t, leaf)
            )
            known[id(leaf)] = next(same, leaf)
        return known[id(leaf)]

    return {index: pytree.tree_map(replace, call) for index, call in calls.items()}

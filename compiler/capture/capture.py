"""From a live transformers model to its attention sites, and back to graph modules that fit into the model."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from attnedit.compiler.capture import stored_traces
from attnedit.compiler.capture.export import Exported, export_attention, export_program, trace_attention
from attnedit.compiler.capture.facts import FactReader, NoOutputProjectionError
from attnedit.compiler.capture.forwards import probe_inputs
from attnedit.compiler.capture.kept_exports import Key, forget, keep, key_of, recall
from attnedit.compiler.capture.normalise import clean
from attnedit.compiler.capture.probe import AttentionCall, discover
from attnedit.compiler.capture.sites import AttentionSite, Facts, Sites, by_reason
from attnedit.compiler.compatibility.torch_names import pytree, temporary_buffers
from attnedit.compiler.errors import CaptureError, OtherAttentionError
from attnedit.compiler.graph.anchor import ANCHOR, attention_implementation
from attnedit.compiler.graph.dataflow import anchors, structure_hash
from attnedit.compiler.graph.masks import dense_mask
from attnedit.compiler.graph.modules import evaluation_mode, lists_around, shadow
from attnedit.compiler.graph.spec import LENGTH, verify
from attnedit.compiler.graph.surgery import unlift
from attnedit.compiler.model_io.heads import outputs_of

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class _Kind:
    exported: Exported
    facts: Facts
    structure: str


def capture(model: torch.nn.Module, *, fresh: bool = False) -> Sites:
    """Find and read every attention site of a live model; the model is left as it was.

    Args:
        model: a transformers causal language model in any dtype, on any device; on meta too, where only buffers may
            need values (see `attnedit.compiler.capture.rope.rope_angles`).
        fresh: trace every kind of module anew, also where one that cannot be told apart was traced before, in this
            process (`attnedit.compiler.capture.kept_exports`) or in another (`stored_traces`).

    Returns:
        One site per attention module, in the order they run. Sites of one kind share their graph: copy it before
        editing (`graph_module` does). Attention of other kinds beside them (shared keys, cross-attention, sparse or
        chunked attention) and layers without softmax attention are in `left`, with the reason for each.

    Raises:
        UsageError: not a transformers model.
        CaptureError: no attention, an unsupported architecture, or layers whose graph or facts cannot be read;
            each is listed with its reason.
    """
    with torch.device("cpu"):
        calls, left = discover(model)
        kinds: dict[str, _Kind | CaptureError] = {}
        for index, call in enumerate(calls):
            if call.signature not in kinds:
                kinds[call.signature] = _kind_or_error(call, fresh)
            wider = call.outer
            if wider is not None and isinstance(kinds[call.signature], NoOutputProjectionError):
                kinds.setdefault(wider.signature, _kind_or_error(wider, fresh))
                if isinstance(kinds[wider.signature], _Kind):
                    calls[index] = wider
        _log.debug("%d attention sites of %d kinds", len(calls), len(kinds))
        sites: list[AttentionSite] = []
        problems: list[tuple[str, str]] = []
        for position, call in enumerate(calls):
            kind = kinds[call.signature]
            if isinstance(kind, OtherAttentionError):
                left[call.name] = f"({type(call.module).__name__}): {kind}"
            elif isinstance(kind, CaptureError):
                problems.append((call.name, f"({type(call.module).__name__}): {kind}"))
            else:
                sites.append(_site(call, kind, position))
    if problems or not sites:
        raise CaptureError(f"{type(model).__name__}: {'; '.join(by_reason([*problems, *left.items()]))}")
    return Sites(sites, {**left, **_without_attention(model, [*(site.name for site in sites), *left])})


def _without_attention(model: torch.nn.Module, names: list[str]) -> dict[str, str]:
    """Decoder layers in which nothing of these names runs, and what they are."""
    config: Any = model.config
    config = config.get_text_config(decoder=True)
    count, kinds = int(config.num_hidden_layers), getattr(config, "layer_types", None) or []
    for prefix, layers in lists_around(model, names[0]):
        if len(layers) == count:
            found = {f"{prefix}.{index}": layer for index, layer in enumerate(layers)}
            empty = [name for name in found if not any(f"{other}.".startswith(f"{name}.") for other in names)]
            said = dict(zip(found, kinds, strict=False))
            return {
                name: f"({said.get(name, type(found[name]).__name__)}): it runs no softmax attention" for name in empty
            }
    return {}


def _kind_or_error(call: AttentionCall, fresh: bool) -> _Kind | CaptureError:
    if call.mask is not None and not call.mask.regular:
        return OtherAttentionError("its mask is neither causal nor a sliding window")
    key = None if fresh else key_of(call)
    try:
        for place in ("memory", "disk"):
            try:
                if (kept := recall(key) if place == "memory" else _restored(call, key)) is not None:
                    return _read_kind(call, kept)
            except NoOutputProjectionError:
                raise
            except Exception as error:  # of a file anything
                if place == "memory" and not isinstance(error, CaptureError):
                    raise
                _log.debug("what was kept in %s of %s does not fit (%s)", place, call.name, error)
                forget(key)
                stored_traces.drop(key)
        trace = trace_attention(call)
        stored_traces.write(key, trace)
        exported = export_attention(call, trace)
        keep(key, exported)
        return _read_kind(call, exported)
    except CaptureError as error:
        return error


def _restored(call: AttentionCall, key: Key | None) -> Exported | None:
    """What an earlier process traced, kept in this one from now on."""
    trace = stored_traces.read(key)
    if trace is None:
        return None
    exported = export_attention(call, trace)
    keep(key, exported)
    return exported


def _read_kind(call: AttentionCall, exported: Exported) -> _Kind:
    known = call.rotary is not None
    facts = FactReader(exported.graph, call.module, exported.constants, call.cached is not None, known).read()
    verify(exported.graph, "facts")
    exported = dataclasses.replace(exported, constants={**exported.constants, **_tables(call.module, exported.graph)})
    _check_against_eager(call, exported)
    return _Kind(exported, facts, structure_hash(exported.graph))


def _tables(module: torch.nn.Module, graph: fx.Graph) -> dict[str, torch.Tensor]:
    """Values of the buffers that a graph reads and no checkpoint holds."""
    read = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    saved = set(module.state_dict(keep_vars=True))
    return {
        name: buffer.detach().cpu().clone()
        for name, buffer in module.named_buffers()
        if name in read - saved and not buffer.is_meta
    }


def _site(call: AttentionCall, kind: _Kind, position: int) -> AttentionSite:
    facts: dict[str, Any] = {f.name: getattr(kind.facts, f.name) for f in dataclasses.fields(kind.facts)}
    if call.mask is not None:
        # What the mask shows is what eager attention and SDPA compute, whatever the keyword argument says.
        facts["window"] = call.mask.window
    return AttentionSite(
        name=call.name,
        layer_idx=position if call.layer is None else int(call.layer),
        kind=call.signature,
        structure=kind.structure,
        graph=kind.exported.graph,
        rotary=call.rotary if facts["rope"] is not None else None,
        constants=kind.exported.constants,
        implementation=None if call.cached is None else call.cached.implementation,
        **facts,
    )


def as_captured(model: torch.nn.Module, sites: Iterable[AttentionSite]) -> contextlib.AbstractContextManager[None]:
    """Inside the block a model gives its attention modules the arguments that the graphs of `sites` are made for.

    Only models that write their attention out give their modules other ones for each implementation.
    """
    name = captured_implementation(sites)
    return contextlib.nullcontext() if name is None else attention_implementation(model, name)


def captured_implementation(sites: Iterable[AttentionSite]) -> str | None:
    """The one attention implementation that graphs of `sites` work with; None where any does."""
    return next((site.implementation for site in sites if site.implementation), None)


def _random_inputs(call: AttentionCall) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The probe's arguments with random float32 tensors of the same shapes, a causal mask, and positions 0, 1, ..."""
    generator = torch.Generator().manual_seed(0)
    causal = dense_mask(None, torch.empty(1, LENGTH, 1), LENGTH)[0, 0]

    def replace(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        if leaf.dim() == 4 and tuple(leaf.shape[-2:]) == (LENGTH, LENGTH):
            hidden = causal.expand(leaf.shape).clone()
            return hidden if leaf.is_floating_point() else hidden != 0
        if leaf.is_floating_point() or leaf.is_complex():
            dtype = torch.complex64 if leaf.is_complex() else torch.float32
            return torch.randn(leaf.shape, generator=generator, dtype=dtype)
        return torch.arange(leaf.shape[-1], dtype=leaf.dtype).expand(leaf.shape).clone() if leaf.dim() else leaf.cpu()

    args, kwargs = pytree.tree_map(replace, (call.args, dict(call.kwargs)))
    return args, kwargs


def _check_against_eager(call: AttentionCall, exported: Exported) -> None:
    """Hold the graph to the module's own eager attention, on random weights: what the anchor left out shows here."""
    implementation = "eager" if call.cached is None else call.cached.implementation
    module = shadow(call.module, implementation, "cpu", torch.float32, seed=0)
    graph = _assemble(module, exported.graph, exported.constants, None)
    args, kwargs = _random_inputs(call)
    with torch.no_grad():
        expected = module(*args, **kwargs)
        found = graph(*args, **kwargs)
    expected = next(v for v in pytree.tree_leaves(expected) if isinstance(v, torch.Tensor))
    found = next(v for v in pytree.tree_leaves(found) if isinstance(v, torch.Tensor))
    difference = float((expected - found).abs().max())
    size = float(expected.abs().max())
    if not difference <= 1e-4 * size:
        raise CaptureError(
            f"its graph does not compute what its eager attention computes (difference {difference:.1e} at size "
            f"{size:.1e}): the attention function of its family does something that its arguments do not say"
        )


def graph_module(model: torch.nn.Module, site: AttentionSite) -> fx.GraphModule:
    """A graph module that can take the place of `site.name` in `model`: same signature, same child modules.

    Args:
        model: the model the site was captured from, or one with the same modules.
        site: its site; the graph is copied, so the result can be edited freely.

    Returns:
        The graph module; parameters are the live model's own, state-dict keys are those of the attention module.

    Example:
        >>> site = capture(model)[0]  # doctest: +SKIP
        >>> graph_module(model, site).graph.print_tabular()  # doctest: +SKIP
    """
    return _assemble(model.get_submodule(site.name), site.graph, site.constants, site.layer_idx)


def _assemble(module: torch.nn.Module, graph: fx.Graph, constants: Any, layer: int | None) -> fx.GraphModule:
    copied = copy.deepcopy(graph)
    for anchor in anchors(copied):
        if layer is not None:
            anchor.update_arg(8, layer)
    targets: dict[str, Any] = {}
    temporary: list[tuple[str, str]] = []
    for node in copied.nodes:
        if node.op == "call_module":
            targets[node.target] = module.get_submodule(node.target)
        elif node.op == "get_attr":
            owner, _, name = node.target.rpartition(".")
            holder = module.get_submodule(owner)
            value = getattr(holder, name, None)
            # A model that is about to be loaded has its tables on meta, and nobody but the source's class fills them.
            known = value is not None and not (value.is_meta and node.target in constants)
            targets[node.target] = value if known else constants[node.target]
            if value is None or name in temporary_buffers(holder):
                temporary.append((owner, name))
    result = fx.GraphModule(targets, copied, class_name=type(module).__name__)
    for owner, name in temporary:
        temporary_buffers(result.get_submodule(owner)).add(name)
    # Decoder layers and caches read plain attributes such as layer_idx or is_causal.
    plain = (bool, int, float, str, type(None))
    for name, value in vars(module).items():
        if not name.startswith("_") and isinstance(value, plain) and not hasattr(result, name):
            setattr(result, name, value)
    result.train(module.training)
    return result


_ROOT = "model"


class _Outputs(torch.nn.Module):
    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return outputs_of(self.model, input_ids, attention_mask=attention_mask, use_cache=False)


def capture_model(model: torch.nn.Module) -> fx.GraphModule:
    """The whole model as one graph: `forward(input_ids [B, T], attention_mask [B, T]) -> logits [B, T, vocab]`.

    Without a language-model head it gives the last hidden states [B, T, D].

    Args:
        model: a transformers causal language model; attention modules that were replaced by graph modules are traced
            through, others show as one attnedit::attention node each.

    Returns:
        A graph module without cache that shares the model's parameters (by their names in the model), for any batch
        and length.

    Raises:
        CaptureError: torch.export could not trace the model.
    """
    with torch.device("cpu"):
        inputs = probe_inputs(model)
        arguments = (inputs["input_ids"].clone(), inputs["attention_mask"].clone())
        dynamic = tuple({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO} for _ in arguments)
        with evaluation_mode(model), attention_implementation(model, ANCHOR):
            program = export_program(_Outputs(model).eval(), arguments, dynamic)
    graph = fx.Graph()
    outputs, constants = unlift(program, graph, _ROOT, lambda node: graph.node_copy(node))
    graph.output(outputs[0])
    clean(graph)
    targets = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            made = constants.get(node.target)
            targets[node.target] = operator.attrgetter(node.target)(model) if made is None else made
        elif stack := node.meta.get("nn_module_stack"):
            node.meta["nn_module_stack"] = {
                key: (path.removeprefix(_ROOT).removeprefix("."), kind) for key, (path, kind) in stack.items() if path
            }
    result = fx.GraphModule(targets, graph, class_name=type(model).__name__)
    persistent = set(model.state_dict())
    for name, _ in list(result.named_buffers()):
        if name not in persistent:
            owner, _, attribute = name.rpartition(".")
            temporary_buffers(result.get_submodule(owner)).add(attribute)
    result.graph.lint()
    return result

"""Traces one call of an attention module with torch.export.

It runs on a bfloat16 copy on the meta device: no weight is touched, and every cast the source makes shows up in the
graph whatever the dtype of the live model is.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Cache

from attnedit.compiler.capture.forwards import PAST
from attnedit.compiler.capture.normalise import ChildCall
from attnedit.compiler.capture.probe import AttentionCall
from attnedit.compiler.capture.written_out import Past
from attnedit.compiler.compatibility.torch_names import TorchDynamoException, forward_hooks, pytree, without_fake_cache
from attnedit.compiler.compatibility.transformers_names import ATTENTION_FIELD
from attnedit.compiler.errors import CaptureError
from attnedit.compiler.graph.anchor import ANCHOR
from attnedit.compiler.graph.spec import BATCH, LENGTH

PROBE_DTYPE = torch.bfloat16
ROOT = "attn"
"""Where the module stands in what is traced."""


def shadow(
    module: torch.nn.Module, implementation: str, device: str, dtype: torch.dtype, seed: int | None = None
) -> torch.nn.Module:
    """A copy of `module` that shares no storage with it and whose attention implementation is `implementation`.

    Args:
        module: any attention module.
        implementation: for the copy of its configuration; the module's own is left alone.
        device: "meta", or where parameters are made.
        dtype: of the floating parameters and buffers.
        seed: for random parameters; None for empty ones.
    """
    generator = torch.Generator().manual_seed(seed) if seed is not None else None
    memo: dict[int, Any] = {}
    for tensor in [*module.parameters(), *module.buffers()]:
        floating = tensor.is_floating_point()
        replacement: torch.Tensor
        if generator is None:
            replacement = torch.empty_like(tensor, device=device, dtype=dtype if floating else tensor.dtype)
        elif floating and (isinstance(tensor, torch.nn.Parameter) or tensor.is_meta):
            # Variance 1/fan_in keeps activations near 1, vectors near 1 keep norms from vanishing.
            spread = tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 1.0
            replacement = torch.empty(tensor.shape, dtype=dtype).uniform_(-1.7, 1.7, generator=generator) * spread
        else:
            replacement = tensor.detach().to(device=device, dtype=dtype if floating else tensor.dtype, copy=True)
        if isinstance(tensor, torch.nn.Parameter):
            replacement = torch.nn.Parameter(replacement, requires_grad=False)
        memo[id(tensor)] = replacement
    for child in module.modules():
        config = getattr(child, "config", None)
        if config is not None and id(config) not in memo:
            twin = copy.copy(config)
            if hasattr(twin, ATTENTION_FIELD):
                setattr(twin, ATTENTION_FIELD, implementation)
            memo[id(config)] = twin
    hooks = {id(hook): hook for child in module.modules() for hook in forward_hooks(child)}
    memo.update(hooks)
    return copy.deepcopy(module, memo).eval()


@dataclass(frozen=True)
class Trace:
    """What torch made of one call of an attention module.

    Attributes:
        program: in functional form.
        children: calls of its child modules.
        output: values of the output, True where they are tensors, and their structure.
    """

    program: torch.export.ExportedProgram
    children: list[ChildCall]
    output: tuple[list[Any], pytree.TreeSpec]


class Structure:
    """The arguments of the probe's call and the structure of its output.

    Not attributes of the module: export restores those after tracing.
    """

    def __init__(self, leaves: list[Any], spec: pytree.TreeSpec) -> None:
        self.leaves = leaves
        self.spec = spec
        self.output: tuple[list[Any], pytree.TreeSpec] | None = None


class _Flat(torch.nn.Module):
    """Calls the attention module with tensors put back among its other arguments; keeps its output structure."""

    def __init__(self, module: torch.nn.Module, structure: Structure) -> None:
        super().__init__()
        self.attn = module
        self.structure = structure

    def forward(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in self.structure.leaves]
        if past := tuple(given):
            leaves = [Past(*past) if isinstance(leaf, Cache) else leaf for leaf in leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self.structure.spec)
        output = self.attn(*args, **kwargs)
        values, spec = pytree.tree_flatten(output)
        self.structure.output = ([isinstance(v, torch.Tensor) or v for v in values], spec)
        return [value for value in values if isinstance(value, torch.Tensor)]


def _empty(leaf: Any, device: str) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    dtype = PROBE_DTYPE if leaf.is_floating_point() else leaf.dtype
    # Contiguous and distinct: a view of another argument would become a guard on its base.
    return torch.empty(leaf.shape, dtype=dtype, device=device)


def record_children(module: torch.nn.Module) -> tuple[list[ChildCall], list[Any]]:
    """Note every call of a child module from now on; returns the calls so far, and hooks to remove."""
    calls: list[ChildCall] = []
    counts: dict[str, int] = {}
    handles = []
    for name, child in module.named_modules():
        if not name:
            continue

        def before(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            number = counts.get(name, 0)
            counts[name] = number + 1
            leaves, spec = pytree.tree_flatten((args, kwargs))
            marked = [ChildCall.TENSOR if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            calls.append(ChildCall(name, number, marked, spec))

        handles.append(child.register_forward_pre_hook(before, with_kwargs=True))
    return calls, handles


def trace_attention(call: AttentionCall) -> Trace:
    """Trace the attention module of one call.

    Raises:
        CaptureError: torch.export could not.
    """
    cached = call.cached
    # Constants that a module makes on the way have values on a real device only; nothing is computed there.
    implementation, device = (ANCHOR, "meta") if cached is None else (cached.implementation, "cpu")
    copied = shadow(call.module, implementation, device, PROBE_DTYPE)
    structure = structure_of(call, device)
    flat = _Flat(copied, structure).eval()
    inputs = tuple(leaf for leaf in structure.leaves if isinstance(leaf, torch.Tensor))
    if cached is not None:
        inputs += (_empty(cached.keys, device), _empty(cached.values, device))
    children, handles = record_children(copied)
    dynamic = (tuple(_dynamic(tensor, cached is not None) for tensor in inputs),)
    try:
        program = export_program(flat, inputs, dynamic)
    finally:
        for handle in handles:
            handle.remove()
    if structure.output is None:
        raise AssertionError("the module that is exported has run")
    return Trace(program, children, structure.output)


def structure_of(call: AttentionCall, device: str) -> Structure:
    """The arguments of a call, their tensors empty ones on a device."""
    given = call if call.cached is None else call.cached
    leaves, spec = pytree.tree_flatten((given.args, dict(given.kwargs)))
    return Structure([_empty(leaf, device) for leaf in leaves], spec)


def export_program(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: Any
) -> torch.export.ExportedProgram:
    """Non-strict export in functional form, every composite op kept; CaptureError where torch.export fails."""
    program: torch.export.ExportedProgram
    try:
        # With gradients on, the no_grad regions of rotary embeddings would become higher-order ops.
        with torch.no_grad(), without_fake_cache(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)  # torch's own copy of it
            program = torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)
            program = program.run_decompositions({})
    except (RuntimeError, ValueError, TypeError, AssertionError, TorchDynamoException) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CaptureError(f"torch.export failed: {reason}") from error
    return program


def _dynamic(tensor: torch.Tensor, written_out: bool) -> dict[int, Any]:
    # Batch, and whatever is as long as the sequence; feature dims stay numbers.
    lengths = {size for size in tensor.shape if size in (BATCH, LENGTH, PAST, PAST + LENGTH)}
    dims = [
        dim
        for dim, size in enumerate(tensor.shape)
        if size in lengths and dim < max(tensor.dim() - 1, 2 if tensor.dim() < 4 else 4)
    ]
    if written_out and tensor.dim() and tensor.shape[0] % BATCH == 0:
        dims.append(0)  # batch and heads in one
    if written_out and tensor.dim() and tensor.shape[-1] == PAST + LENGTH:
        dims.append(tensor.dim() - 1)
    return {dim: torch.export.Dim.AUTO for dim in dims}

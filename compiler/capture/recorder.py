"""Watches one forward of a live model: the stack of running modules, their aten ops, and where attention runs."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from attnedit.compiler.compatibility.torch_names import TorchDispatchMode, pytree
from attnedit.compiler.graph.anchor import InterfaceCall
from attnedit.compiler.graph.spec import LENGTH

_SOFTMAX = ("_softmax", "softmax", "_safe_softmax")


@dataclass(eq=False)
class Frame:
    """One running module and how it was called; `trace` are the aten ops that ran inside."""

    name: str
    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    trace: list[str]


@dataclass(eq=False)
class Produced:
    """A tensor some module returned: which module, at which place of its output, called with what."""

    tensor: torch.Tensor
    name: str
    index: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class Attention:
    """Attention as it ran: the modules around it, outermost first, and the interface's call, if it is one.

    `place` is the source line where there is no call.
    """

    stack: list[Frame]
    call: InterfaceCall | None
    place: str = ""


class Recorder(TorchDispatchMode):
    """Keeps the stack of running modules, the aten ops of each, and all attention, through the interface or not."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(module): name for name, module in model.named_modules()}
        self.stack: list[Frame] = []
        self.attention: list[Attention] = []
        self.produced: dict[int, Produced] = {}

    def enter(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note that a module starts to run."""
        self.stack.append(Frame(self.names.get(id(module), ""), module, args, kwargs, []))

    def leave(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Note that it ends, and what it returns."""
        frame = self.stack.pop()
        # Only tuples: that is how rotary modules return (cos, sin).
        if isinstance(output, tuple):
            for index, item in enumerate(output):
                if isinstance(item, torch.Tensor):
                    self.produced[id(item)] = Produced(item, frame.name, index, frame.args, frame.kwargs)

    def called(self, call: InterfaceCall) -> None:
        """Note a call of the attention interface."""
        frame = next((f for f in reversed(self.stack) if f.module is call.module), self.stack[-1])
        self.attention.append(Attention(self.stack[: self.stack.index(frame) + 1], call))

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Record what runs in `model` inside the block."""
        handles = []
        try:
            for module in model.modules():
                handles.append(module.register_forward_pre_hook(self.enter, with_kwargs=True, prepend=True))
                handles.append(module.register_forward_hook(self.leave))
            with self:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name == "_local_scalar_dense" and args[0].is_meta and args[0].dtype == torch.bool:
            return True  # models with linear attention ask whether the padding mask is all ones, and it is
        output = func(*args, **(kwargs or {}))
        shown = [
            f"{tuple(a.shape)}" if isinstance(a, torch.Tensor) else repr(a)
            for a in pytree.tree_leaves((args, kwargs or {}))
            if isinstance(a, (torch.Tensor, int, float, bool, str, type(None), torch.dtype))
        ]
        for frame in self.stack:
            frame.trace.append(f"{name}({', '.join(shown)})")
        if self.stack and self._is_attention(name, output):
            self.attention.append(Attention(list(self.stack), None, f"{_line_of(self.stack[-1].module)}, {name}"))
        return output

    @staticmethod
    def _is_attention(name: str, output: Any) -> bool:
        if "scaled_dot_product" in name:
            return True
        # The softmax of a router is over experts; that of attention is over keys.
        return name in _SOFTMAX and isinstance(output, torch.Tensor) and tuple(output.shape[-2:]) == (LENGTH, LENGTH)


def _line_of(module: torch.nn.Module) -> str:
    """The source line that `module.forward` is executing right now."""
    frame = sys._getframe()
    source = inspect.getsourcefile(type(module))
    found = type(module).__name__
    while frame is not None:
        if frame.f_code.co_filename == source and frame.f_locals.get("self") is module:
            return f"{source.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        if frame.f_back is None:
            break
        frame = frame.f_back
    return found

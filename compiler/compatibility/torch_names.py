"""Private names of torch: all that the compiler relies on, each held by test_compatibility.py."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.traceback import NodeSource, NodeSourceAction
from torch.utils._python_dispatch import TorchDispatchMode

# What is passed on as it is.
__all__ = [
    "FakeTensor",
    "HigherOrderOperator",
    "NodeSource",
    "NodeSourceAction",
    "OpOverload",
    "TorchDispatchMode",
    "pytree",
]

GUARDS = "_guards_fn"
"""The module of an exported program that checks its inputs."""

foreach_lerp, foreach_lerp_, foreach_mul_ = torch._foreach_lerp, torch._foreach_lerp_, torch._foreach_mul_


def exporting() -> bool:
    """Whether torch.export traces. That of torch 2.11, `torch.compiler.is_exporting`, says so in torch.compile, too."""
    exports: bool = torch.compiler._is_exporting_flag
    return exports


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, to read and to replace; some are None."""
    buffers: dict[str, Any] = module._buffers
    return buffers


def temporary_buffers(module: nn.Module) -> set[str]:
    """Names of a module's own buffers that no checkpoint holds; adding one leaves it out of checkpoints."""
    return module._non_persistent_buffers_set


def share_class(target: Any, cls: type) -> None:
    """Make an object an instance of another class, whose layout is the same."""
    target.__class__ = cls


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what `torch.compile` makes of one."""
    return hasattr(module, "_orig_mod")


def forward_hooks(module: nn.Module) -> list[Callable[..., Any]]:
    """What runs after a module's forward."""
    return list(module._forward_hooks.values())


def without_fake_cache() -> contextlib.AbstractContextManager[Any]:
    """Inside the block shapes of symbolic sizes are computed anew for each op, which is faster than looking them up."""
    patched: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(fake_tensor_cache_enabled=False)
    return patched


def compiler_limits(**limits: int) -> contextlib.AbstractContextManager[Any]:
    """Inside the block `torch.compile` has other limits."""
    patched: contextlib.AbstractContextManager[Any] = torch._dynamo.config.patch(limits)
    return patched


def hint_of(size: int | torch.SymInt) -> int:
    """What a symbolic size was when it was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def schema_of(target: Any) -> Any:
    """The schema of an operator; None of what is no operator."""
    return getattr(target, "_schema", None)


def parse_schema(text: str) -> Any:
    """A schema in torch's own form."""
    parse: Any = torch._C.parse_schema
    return parse(text)


def operator_names() -> list[str]:
    """All operators that are registered, with their namespaces."""
    return list(torch._C._dispatch_get_all_op_names())


def has_kernel(operator: str, device: str) -> bool:
    """Whether an operator is implemented for a device, such as "CPU"."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(operator, device))

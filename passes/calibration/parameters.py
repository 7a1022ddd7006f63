"""What is trained, on memory of its own: everything else stays shared between student and teacher."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnedit.passes.calibration.options import Train


def trainable(student: nn.Module, sites: Iterable[str], train: Train) -> dict[str, nn.Parameter]:
    """Parameters that training changes, by name; tied ones once.

    "attention" is all of the sites; "norms" also every module whose own weights are vectors only.
    """
    if train == "all":
        return dict(student.named_parameters())
    inside = tuple(f"{name}." for name in sites)
    chosen = {name: parameter for name, parameter in student.named_parameters() if name.startswith(inside)}
    if train == "norms":
        for prefix, module in student.named_modules():
            own = dict(module.named_parameters(prefix, recurse=False))
            if own and all(parameter.dim() == 1 for parameter in own.values()):
                chosen |= own
    return chosen


def own_memory(parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.dtype]:
    """Give each parameter memory of its own, in float32, and require its gradient; return the dtypes before.

    A copy that shares its weights with the source would write into the source otherwise, and updates smaller than
    half precision resolves would be lost.
    """
    before = {name: parameter.dtype for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.data = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        parameter.requires_grad_(True)
    return before


def as_before(parameters: Mapping[str, nn.Parameter], dtypes: Mapping[str, torch.dtype]) -> None:
    """Undo `own_memory`'s dtype, and drop gradients."""
    for name, parameter in parameters.items():
        parameter.grad = None
        parameter.data = parameter.detach().to(dtypes[name])


def local(parameter: nn.Parameter) -> nn.Parameter:
    """This process's part of a parameter in parts, on the same memory; any other parameter itself."""
    part = parameter.detach()
    return nn.Parameter(part.to_local()) if isinstance(part, DTensor) else parameter


def local_gradient(parameter: nn.Parameter) -> Tensor | None:
    """The gradient of `local(parameter)`."""
    return parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad


def snapshot(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: parameter.detach().to("cpu", copy=True) for name, parameter in parameters.items()}


@torch.no_grad()
def restore(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    """Write a `snapshot` back."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def share(student: nn.Module, teacher: nn.Module) -> int:
    """Let the student use the teacher's memory where tensors of a name are equal; return the bytes saved."""
    theirs = {**dict(teacher.named_parameters()), **dict(teacher.named_buffers())}
    saved = 0
    for name, tensor in [*student.named_parameters(), *student.named_buffers()]:
        other = theirs.get(name)
        if other is None or other.shape != tensor.shape or other.dtype != tensor.dtype:
            continue
        if other.data_ptr() != tensor.data_ptr() and torch.equal(other.detach(), tensor.detach().to(other.device)):
            saved += tensor.numel() * tensor.element_size()
            tensor.data = other.detach()
    return saved

"""Training on models that are spread over the processes: every module's weights in parts, put together when it runs.

PyTorch's FSDP2 (`torch.distributed.fsdp.fully_shard`) does the work. What source and student have in common is one
module in both, so that its parts are held once. Each attention and each feed-forward block is a unit of its own, since
two models run through them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.execution.stream import decoder_layers
from attnedit.compiler.graph.modules import share_copy
from attnedit.compiler.processes import processes
from attnedit.passes.calibration.parameters import share

Models = tuple[PreTrainedModel, PreTrainedModel, dict[str, nn.Parameter]]


@contextmanager
def spread(
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    sites: Sequence[AttentionSite],
    learned: Mapping[str, nn.Parameter],
    *,
    half: bool,
) -> Iterator[Models]:
    """Copies of both models in parts on the devices of all processes; the originals wait in host memory.

    Args:
        student: the rewritten model; has what was learned afterwards.
        teacher: its source.
        sites: of the teacher, those that are rewritten in the student.
        learned: the student's parameters that training changes, by name.
        half: put weights together in bfloat16; gradients are summed in float32 all the same.

    Yields:
        Student, teacher and what is learned, in parts.
    """
    home = next(teacher.parameters()).device
    device = processes().device or home
    _move(student, teacher, torch.device("cpu"))
    own, source = share_copy(student), share_copy(teacher)
    _join(own, source, learned)
    policy = MixedPrecisionPolicy(torch.bfloat16 if half else None, torch.float32, cast_forward_inputs=False)
    layers = [layer for model in (source, own) for layer in decoder_layers(model, list(sites))[0]]
    for unit in itertools.chain.from_iterable(layer.children() for layer in layers):
        if isinstance(unit, FSDPModule) or not any(parameter.dim() > 1 for parameter in unit.parameters()):
            continue
        parts_of = fully_shard(unit.to(device), mp_policy=policy, reshard_after_forward=True)
        # Each process's loss is its share of the mean already; gloo knows no sum with a factor.
        parts_of.set_gradient_divide_factor(1.0)
        parts_of.set_force_sum_reduction_for_comms(True)
    source.to(device)  # type: ignore[arg-type]  # transformers wraps it
    own.to(device)  # type: ignore[arg-type]
    parts = dict(own.named_parameters())
    try:
        yield own, source, {name: parts[name] for name in learned}
    finally:
        for name, parameter in learned.items():
            part = parts[name].detach()
            parameter.data = (part.full_tensor() if isinstance(part, DTensor) else part).to("cpu")
        del own, source, parts
        _move(student, teacher, home)


def _join(student: nn.Module, teacher: nn.Module, learned: Mapping[str, nn.Parameter], prefix: str = "") -> None:
    """Let the student have the teacher's own modules wherever nothing in them is learned."""
    theirs = dict(teacher.named_children())
    for name, child in list(student.named_children()):
        path = f"{prefix}{name}."
        if name not in theirs or type(theirs[name]) is not type(child):
            continue
        if any(parameter.startswith(path) for parameter in learned):
            _join(child, theirs[name], learned, path)
        else:
            setattr(student, name, theirs[name])


def _move(student: PreTrainedModel, teacher: PreTrainedModel, device: torch.device) -> None:
    """Move both, and let them share again what moving has made two of."""
    if next(teacher.parameters()).device != device:
        teacher.to(device)  # type: ignore[arg-type]
        student.to(device)  # type: ignore[arg-type]
        share(student, teacher)

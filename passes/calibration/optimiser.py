"""What changes the weights: AdamW, or Muon for matrices and AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from attnedit.compiler.compatibility.torch_names import foreach_lerp, foreach_lerp_

FRESH_SIZE = 2**-5.5
"""Root mean square that a weight of zeros is taken to have."""
LOWEST_RATE = 0.0001
MOMENTUM = 0.95
COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the odd polynomial of degree 5 that moves all singular values towards 1 the fastest near 0."""
ITERATIONS = 5
TOGETHER = 1 << 26
"""Numbers in the matrices that are multiplied together, at most."""


class Optimiser:
    """AdamW and Muon under one learning rate, which is relative to the size of each weight.

    Args:
        parameters: by name, all on one device.
        sizes: of each, see `size_of`.
        orthogonal: names of matrices that Muon updates.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], sizes: Mapping[str, float], orthogonal: Collection[str] = ()
    ) -> None:
        self._parameters, self._orthogonal = parameters, orthogonal
        groups: dict[bool, dict[float, list[nn.Parameter]]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(name in orthogonal, defaultdict(list))[sizes[name]].append(parameter)
        self._rules: dict[str, torch.optim.Optimizer] = {}
        for muon, by_size in groups.items():
            listed: list[dict[str, Any]] = [{"params": chosen, "size": size} for size, chosen in by_size.items()]
            if muon:
                self._rules["muon"] = Muon(listed)
            else:
                fused = listed[0]["params"][0].device.type == "cuda"
                self._rules["adamw"] = torch.optim.AdamW(listed, betas=(0.9, 0.95), weight_decay=0.0, fused=fused)

    def step(self, rate: float) -> None:
        """Change every parameter that has a gradient, by about `rate` times its size."""
        for rule in self._rules.values():
            for group in rule.param_groups:
                group["lr"] = rate * group["size"]
            rule.step()

    def forget(self) -> None:
        """Start again without moments."""
        for rule in self._rules.values():
            rule.state.clear()

    def with_sizes(self, sizes: Mapping[str, float], fresh: Collection[str]) -> Optimiser:
        """The same with other sizes; of `fresh` parameters without moments."""
        new = Optimiser(self._parameters, sizes, self._orthogonal)
        without = {self._parameters[name] for name in fresh}
        for name, rule in self._rules.items():
            new._rules[name].state.update({key: kept for key, kept in rule.state.items() if key not in without})
        return new

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`, on the same parameters."""
        return {name: rule.state_dict() for name, rule in self._rules.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, rule in self._rules.items():
            rule.load_state_dict(states[name])


class Muon(torch.optim.Optimizer):
    """Makes the momentum of a matrix orthogonal, so that no direction is starved by those of large gradients.

    Muon (https://kellerjordan.github.io/posts/muon) with Nesterov momentum, its updates made as large as AdamW's
    (arXiv 2502.16982, equation 4), so that one rate serves both. The numbers are those of `torch.optim.Muon`, which
    takes one matrix after the other: thousands of launches for a step of a small model, and launch failures where
    several processes share a GPU (docs/notebook/2026-11-training.md). Here matrices of one shape are multiplied
    together.

    Args:
        groups: of matrices, with their learning rate "lr".
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {"lr": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # no closure is ever given
        """Change every matrix that has a gradient."""
        shapes: dict[torch.Size, list[tuple[nn.Parameter, float]]] = defaultdict(list)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    shapes[parameter.shape].append((parameter, group["lr"]))
        for shape, chosen in shapes.items():
            size = max(1, TOGETHER // shape.numel())
            for first in range(0, len(chosen), size):
                self._update(*zip(*chosen[first : first + size], strict=True))

    def _update(self, parameters: Sequence[nn.Parameter], rates: Sequence[float]) -> None:
        """Change matrices of one shape."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if "momentum" not in self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
        updates = orthogonalised(torch.stack(foreach_lerp(gradients, momenta, MOMENTUM)))
        size = 0.2 * math.sqrt(max(updates.shape[1:]))
        for parameter, update, rate in zip(parameters, updates, rates, strict=True):
            parameter.sub_(update, alpha=rate * size)


def orthogonalised(stacked: Tensor) -> Tensor:
    """U V^T of matrices U S V^T [N, A, B], about: singular values from 0.5 to 1.5; in bfloat16.

    By Muon's iteration of X = p(X X^T) X with a polynomial p, which starts from a norm of 1.
    """
    x = stacked.bfloat16()
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    first, second, third = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=second, alpha=third), x, beta=first)
    return x if wide else x.mT


@torch.no_grad()
def size_of(parameter: nn.Parameter) -> float:
    """Root mean square of a weight, which its steps are measured by; of one that is zero, what it is made with.

    Sizes differ a hundredfold between the factors of a latent attention, and so would relative steps under one rate
    (Adafactor, arXiv 1804.04235, section 8). Rounded to half powers of two: weights of one size are updated together.
    """
    mean = parameter.float().square().mean()
    return half_power(math.sqrt(float(mean.full_tensor() if isinstance(mean, DTensor) else mean)) or FRESH_SIZE)


def half_power(number: float) -> float:
    """The power of the square root of two that is nearest to a positive number.

    >>> half_power(0.7), half_power(3.0)
    (0.7071067811865476, 2.8284271247461903)
    """
    return float(2 ** (round(2 * math.log2(number)) / 2))


def suggested_rate(loss: float, factor: float, highest: float) -> float:
    """Highest learning rate for a start with this loss: the better it is, the less may be moved.

    Moving weights by a fraction r of their size in every step costs about r^1.4 (docs/notebook/2026-11-cost.md), which
    is to stay in proportion to the start's loss; `factor` is the rate for a loss of 1.
    """
    return min(highest, max(LOWEST_RATE, factor * float(max(0.0, loss) ** 0.6)))


def matrices(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of weights that multiply hidden states: of two dimensions, but no embedding and no output head.

    Few tokens of a batch touch a row of those, and an orthogonal update would move all rows alike.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tables |= {id(getattr(head, "weight", None))}
    return {name for name, parameter in parameters.items() if parameter.dim() == 2 and id(parameter) not in tables}

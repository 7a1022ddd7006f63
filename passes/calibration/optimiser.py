"""What changes the weights: AdamW, or Muon for matrices and AdamW for everything else."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

FRESH_SIZE = 2**-5.5
"""Root mean square that a weight of zeros is taken to have."""


class Optimiser:
    """AdamW and Muon under one learning rate, which is relative to the size of each weight.

    Muon makes the momentum of a matrix orthogonal, so that no direction is starved by those of large gradients. Its
    updates are made as large as AdamW's (arXiv 2502.16982, equation 4), so that one rate serves both.

    Args:
        parameters: by name, all on one device.
        sizes: of each, see `size_of`.
        orthogonal: names of matrices that Muon updates.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], sizes: Mapping[str, float], orthogonal: Collection[str] = ()
    ) -> None:
        groups: dict[bool, dict[float, list[nn.Parameter]]] = {}
        for name, parameter in parameters.items():
            groups.setdefault(name in orthogonal, defaultdict(list))[sizes[name]].append(parameter)
        self._rules: dict[str, torch.optim.Optimizer] = {}
        for muon, by_size in groups.items():
            listed: list[dict[str, Any]] = [{"params": chosen, "size": size} for size, chosen in by_size.items()]
            if muon:
                self._rules["muon"] = torch.optim.Muon(listed, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
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

    def state_dict(self) -> dict[str, Any]:
        """For `load_state_dict`, on the same parameters."""
        return {name: rule.state_dict() for name, rule in self._rules.items()}

    def load_state_dict(self, states: Mapping[str, Any]) -> None:
        """Go on from a `state_dict`."""
        for name, rule in self._rules.items():
            rule.load_state_dict(states[name])


@torch.no_grad()
def size_of(parameter: nn.Parameter) -> float:
    """Root mean square of a weight, which its steps are measured by; of one that is zero, what it is made with.

    Sizes differ a hundredfold between the factors of a latent attention, and so would relative steps under one rate
    (Adafactor, arXiv 1804.04235, section 8). Rounded to half powers of two: weights of one size are updated together.
    """
    mean = parameter.float().square().mean()
    size = math.sqrt(float(mean.full_tensor() if isinstance(mean, DTensor) else mean)) or FRESH_SIZE
    return float(2 ** (round(2 * math.log2(size)) / 2))


def matrices(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> set[str]:
    """Names of weights that multiply hidden states: of two dimensions, but no embedding and no output head.

    Few tokens of a batch touch a row of those, and an orthogonal update would move all rows alike.
    """
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    tables |= {id(getattr(head, "weight", None))}
    return {name for name, parameter in parameters.items() if parameter.dim() == 2 and id(parameter) not in tables}

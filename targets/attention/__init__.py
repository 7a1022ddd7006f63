"""What attention can become: configuration, module, cache layout and cost of each target."""

from attnedit.targets.attention.cost import (
    AttentionCost,
    attention_cost,
    attention_values,
    gateswa_cost,
    gateswa_values,
    mla_cost,
    mla_values,
)
from attnedit.targets.attention.gateswa import GateSWA, GateSWAConfig
from attnedit.targets.attention.mla import MLA, MLAConfig, choose_path

__all__ = [
    "MLA",
    "AttentionCost",
    "GateSWA",
    "GateSWAConfig",
    "MLAConfig",
    "attention_cost",
    "attention_values",
    "choose_path",
    "gateswa_cost",
    "gateswa_values",
    "mla_cost",
    "mla_values",
]

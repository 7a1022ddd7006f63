"""What attention can become: configuration, module, cache layout and cost of each target."""

from attnedit.targets.attention.cost import AttentionCost, attention_cost, attention_values, mla_cost, mla_values
from attnedit.targets.attention.mla import MLA, MLAConfig, choose_path

__all__ = [
    "MLA",
    "AttentionCost",
    "MLAConfig",
    "attention_cost",
    "attention_values",
    "choose_path",
    "mla_cost",
    "mla_values",
]

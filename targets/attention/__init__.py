"""What attention can become: configuration, module, cache layout and cost of each target."""

from attnedit.targets.attention.cost import AttentionCost, attention_cost, attention_values
from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.cost import gateswa_cost, gateswa_values
from attnedit.targets.attention.gateswa.module import GateSWA
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.cost import mla_cost, mla_values
from attnedit.targets.attention.mla.module import MLA, choose_path

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

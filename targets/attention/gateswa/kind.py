"""Gated sliding-window attention, as everything outside this folder asks for it."""

from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.cost import gateswa_cost
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE, gateswa_graph
from attnedit.targets.attention.kind import AttentionKind

GATESWA_KIND = AttentionKind(
    GATESWA_MODULE,
    "gated sliding-window attention (GateSWA)",
    GateSWAConfig,
    gateswa_graph,
    gateswa_cost,
    figures=("sliding_window",),
    lowerings={
        "onnx": "attnedit.targets.runtime.onnx.attention:WindowAttention",
        "npu": "attnedit.targets.runtime.npu.attention:WindowAttention",
    },
)

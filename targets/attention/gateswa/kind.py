"""Gated sliding-window attention, as everything outside this folder asks for it."""

from attnedit.targets.attention.gateswa.config import GateSWAConfig
from attnedit.targets.attention.gateswa.cost import gateswa_cost
from attnedit.targets.attention.gateswa.graph import GATESWA_MODULE, gateswa_graph
from attnedit.targets.attention.gateswa.layers import bounded_layer
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
        "gguf": "attnedit.targets.runtime.gguf.windowed:windowed_form",
        "vllm": "attnedit.targets.runtime.vllm.served:WINDOW",
        "engines": "attnedit.targets.runtime.engines:WINDOWED",
    },
    profiles={
        "laguna": "attnedit.targets.runtime.hf.gateswa:LAGUNA",
        "lfm3": "attnedit.targets.runtime.hf.gateswa:LFM3",
        "native": "attnedit.targets.runtime.hf.gateswa:NATIVE",
    },
    cache_layer=bounded_layer,
)

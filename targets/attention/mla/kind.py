"""Latent attention, as everything outside this folder asks for it."""

from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.mla.config import MLAConfig
from attnedit.targets.attention.mla.cost import mla_cost
from attnedit.targets.attention.mla.graph import MLA_MODULE, mla_graph

MLA_KIND = AttentionKind(
    MLA_MODULE,
    "multi-head latent attention (MLA)",
    MLAConfig,
    mla_graph,
    lambda config: mla_cost(config, config.input_size),
    figures=("kv_lora_rank", "qk_rope_head_dim"),
    lowerings={
        "onnx": "attnedit.targets.runtime.onnx.attention:LatentAttention",
        "npu": "attnedit.targets.runtime.npu.latent:LatentAttention",
        "gguf": "attnedit.targets.runtime.gguf.latent:latent_form",
        "vllm": "attnedit.targets.runtime.vllm.served:LATENT",
        "engines": "attnedit.targets.runtime.engines:LATENT",
    },
    profiles={
        "deepseek_v3": "attnedit.targets.runtime.hf.mla:DEEPSEEK_V3",
        "youtu": "attnedit.targets.runtime.hf.mla:YOUTU",
    },
)

"""What vLLM calls in each of its processes before it reads a model."""

from __future__ import annotations

from typing import Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attnedit.compiler.compatibility.vllm_names import add_attention
from attnedit.compiler.model_io.heads import check_text_alone
from attnedit.targets.runtime.eager.classes import PREFIX
from attnedit.targets.runtime.vllm.limits import TESTED, Settings, block_size, check

OPERATION = "attnedit::paged_latents"
"""What attends to latents: `attnedit.targets.runtime.vllm.latent_layer`, which is imported with the model only."""
MODEL = "attnedit.targets.runtime.vllm.model:AttneditForCausalLM"


def register() -> None:
    """Tell vLLM of the classes that saved results name, and of what is checked before one is loaded."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Checked(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            check_engine(vllm_config)

    add_attention(OPERATION)
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        for source in (name,) if isinstance(name, str) else name:
            ModelRegistry.register_model(f"{PREFIX}{source}", MODEL)
            MODELS_CONFIG_MAP[f"{PREFIX}{source}"] = Checked


def check_engine(vllm_config: Any) -> None:
    """Refuse what `attnedit.targets.runtime.vllm.limits.check` refuses; warn once of a vLLM that was not tested.

    Raises:
        UsageError: the model or a setting cannot be served.
    """
    import vllm
    from vllm.logger import init_logger

    device = vllm_config.device_config.device_type
    if ".".join(vllm.__version__.split(".")[:2]) not in TESTED.get(device, ()):
        tested = "; ".join(f"{' and '.join(releases)} on {place}" for place, releases in TESTED.items())
        init_logger(f"vllm.{__name__}").warning_once(
            "attnedit's plugin was tested with vLLM %s; this is %s on %s", tested, vllm.__version__, device
        )
    parallel = vllm_config.parallel_config
    context = (parallel.decode_context_parallel_size, parallel.prefill_context_parallel_size)
    others = {
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": max(context) > 1,
        "expert parallelism": parallel.enable_expert_parallel,
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "quantisation on load": vllm_config.model_config.quantization is not None,
        "a quantised KV cache": vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16"),
    }
    settings = Settings(parallel.tensor_parallel_size, others)
    config = vllm_config.model_config.hf_config
    check_text_alone(config, f"a {type(config).__name__}", "attnedit's plugin of vLLM")
    check(config, settings)
    cache, wanted = vllm_config.cache_config, block_size(config)
    if device == "cuda" and wanted is not None and not cache.user_specified_block_size:
        # vLLM would ask the first layer's backend alone, which may be one of windows.
        cache.block_size, cache.user_specified_block_size = wanted, True

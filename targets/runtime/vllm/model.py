"""The model that vLLM runs for a result of ours: its transformers backend, with our attention put in by graph."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM
from vllm.model_executor.models.transformers.utils import replace_linear_class

from attnedit.compiler.errors import UsageError
from attnedit.targets.runtime.vllm.attention import ServedWindow, by_heads
from attnedit.targets.runtime.vllm.decoder import (
    Placed,
    attention_of,
    decoder_class,
    inputs_of,
    without_mask_and_cache,
)


class AttneditForCausalLM(TransformersForCausalLM):
    """Any result of attnedit, whatever its source; one with experts becomes an `AttneditMoEForCausalLM`.

    Raises:
        UsageError: something in it cannot be served; it names the layer.
    """

    def __new__(cls, *, vllm_config: Any, prefix: str = "") -> AttneditForCausalLM:
        """Take the class that has its experts run by vLLM, where there are any."""
        experts = vllm_config.model_config.get_num_experts() > 1
        made: AttneditForCausalLM = super().__new__(AttneditMoEForCausalLM if experts else cls)
        return made

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        decoder_class(vllm_config.model_config.hf_config)
        # Layers without a window would take that of the source's configuration.
        vllm_config.cache_config.sliding_window = None
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        # vLLM 0.26 leaves out what the source does to its logits.
        cap = getattr(self.text_config, "final_logit_softcapping", None)
        if cap is not None:
            self.logits_processor.soft_cap = cap

    def recursive_replace(self) -> None:
        """Put vLLM's attention and linear modules into our graphs; all else is as for any transformers model."""
        # Off the configuration: a model whose attention was replaced has none for it any more.
        source: dict[str, str] = getattr(self.model.config, "base_model_tp_plan", None) or {}
        plan = {f"model.{name}": style for name, style in source.items()}
        for placed in attention_of(self.model):
            _serve(placed, get_current_vllm_config(), plan)
        super().recursive_replace()

    def _create_attention_instances(self, prefix: str = "") -> None:
        """They are in the graphs already."""

    def create_attention_instances(self) -> dict[int, Any]:
        """The same in vLLM 0.26."""
        return {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load, then compute what depends on weights."""
        loaded: set[str] = super().load_weights(weights)
        for module in self.modules():
            if isinstance(module, ServedWindow):
                module.finish()
        return loaded


class AttneditMoEForCausalLM(AttneditForCausalLM, TransformersMoEForCausalLM):
    """The same with experts, which vLLM fuses."""


def _serve(placed: Placed, vllm_config: Any, plan: dict[str, str]) -> None:
    """Replace what attends in a graph, and the linear modules around it."""
    graph, child = placed.graph, placed.child
    name = f"model.{placed.name}"
    without_mask_and_cache(graph, child)
    ranks = vllm_config.parallel_config.tensor_parallel_size
    styles = _styles(placed, plan) if ranks > 1 else {}
    for path, module in list(graph.named_modules()):
        if isinstance(module, nn.Linear) and not path.startswith(f"{child}."):
            style = styles.get(path, "replicate")
            linear = replace_linear_class(module, style, vllm_config.quant_config, prefix=f"{name}.{path}")
            graph.set_submodule(path, linear)
    sinks = None
    if placed.sinks is not None:
        sinks = by_heads(placed.config.num_attention_heads // ranks)
        owner, _, own = placed.sinks.rpartition(".")
        setattr(graph.get_submodule(owner), own, sinks)
    module, _, made = placed.served.module.partition(":")
    logits = () if placed.served.sinks is None else (sinks,)
    served = getattr(import_module(module), made)(placed.config, vllm_config, f"{name}.{child}", *logits)
    graph.set_submodule(child, served)


def _styles(placed: Placed, plan: dict[str, str]) -> dict[str, str]:
    """How each linear module of a graph is split among ranks: heads are, what all heads share is not.

    Raises:
        UsageError: the source's plan splits it in another way, or it has none.
    """
    linear = {path for path, module in placed.graph.named_modules() if isinstance(module, nn.Linear)}
    before = _inputs(placed, placed.served.split)
    split = before & linear
    shared = _inputs(placed, placed.served.shared) & linear
    styles = {path: "replicate" for path in shared} | {path: "colwise" for path in split}
    after = {path for path in linear - split - shared if not path.startswith(f"{placed.child}.")}
    styles |= {path: "rowwise" for path in after}
    others = [parameter for path in before - linear for parameter in placed.graph.get_submodule(path).parameters()]
    if not split or not after or any(parameter.numel() > placed.config.head_dim for parameter in others):
        raise UsageError(
            f"layer {placed.config.layer_idx}: its projections are no nn.Linear modules, or a norm spans heads, "
            "and these are not split among devices; use --tensor-parallel-size 1"
        )
    for path, style in styles.items():
        planned = plan.get(_starred(f"model.{placed.name}.{path}"))
        known = {"colwise": ("colwise",), "rowwise": ("rowwise",), "replicate": (None, "replicate", "colwise")}[style]
        if planned not in known or (split & shared):
            raise UsageError(
                f"layer {placed.config.layer_idx}: transformers splits {path} of this model among devices as "
                f"{planned!r}, which the plugin does not know how to follow; use --tensor-parallel-size 1"
            )
    return styles


def _inputs(placed: Placed, arguments: tuple[int, ...]) -> set[str]:
    return set().union(*(inputs_of(placed.graph, placed.child, index) for index in arguments))


def _starred(name: str) -> str:
    """The name of a module in a plan: numbers are stars."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))

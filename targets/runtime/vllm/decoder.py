"""A source's decoder, without its head, with every attention module as a graph that ends in one module of ours.

An engine that runs transformers models puts its own attention, with its own cache, where those modules stand
(`attention_of`): by graph, so that it needs to know no family. Shapes: H heads, G key/value heads, d query and key
size, v value size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, cast

from torch import fx, nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_MAPPING

from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.transformers_names import attention_of as implementation_of
from attnedit.compiler.compatibility.transformers_names import set_implementations
from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.kinds import config_from_dict, kind_of
from attnedit.targets.attention.site_graph import AnchorCall, anchor_arguments, replace_attention
from attnedit.targets.runtime.eager.classes import attnedit_classes, sites_of_class, source_config_class
from attnedit.targets.runtime.eager.splice import splice
from attnedit.targets.runtime.vllm.served import ORDINARY, Served

ORDINARY_MODULE = "ordinary"


@dataclass(frozen=True)
class OrdinaryConfig:
    """Attention that was not rewritten: the source's, read off its graph; the fields mean what `GateSWAConfig`'s do.

    Attributes:
        sliding_window: tokens each query sees, itself included; None is all.
    """

    layer_idx: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    softcap: float | None
    sinks: bool
    sliding_window: int | None

    @classmethod
    def of(cls, site: AttentionSite) -> OrdinaryConfig:
        """Read it off a site."""
        arguments = anchor_arguments(site)
        read: dict[str, Any] = {
            "scale": float(arguments["scale"]),
            "softcap": arguments.get("softcap"),
            "sinks": arguments.get("sinks") is not None,
            "sliding_window": site.window,
        }
        names = {field.name for field in fields(cls)} - set(read)
        return cls(**{name: getattr(site, name) for name in names}, **read)


class Ordinary(nn.Module):
    """Stands where the source attends; an engine's attention takes its place."""

    def __init__(self, config: OrdinaryConfig) -> None:
        super().__init__()
        self.config = config


@dataclass(frozen=True)
class Placed:
    """Where the attention of one layer stands.

    Attributes:
        name: of the attention module, below the decoder.
        graph: that module.
        child: the name in it of the module that attends.
        config: shape of the attention.
        served: how attention of its kind is.
        sinks: name in the graph of the source's own sink logits, where it has them.
    """

    name: str
    graph: fx.GraphModule
    child: str
    config: Any
    served: Served
    sinks: str | None


def decoder_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Make the class of a rewritten model's decoder, and register it for that configuration with ``AutoModel``.

    Args:
        config: of a result that attnedit saved.

    Returns:
        A subclass of the source's base model, another one at every call: engines change such classes in place.

    Raises:
        UsageError: transformers has no base model for the source, or some layer has no attention that was captured.
    """
    config_class, causal = attnedit_classes(config)
    source = cast(type[PreTrainedModel], causal.__bases__[1])
    base: Any = MODEL_MAPPING.get(source_config_class(type(config)), None)
    if base is None:
        raise UsageError(
            f"{source.__name__} comes with code of its own, or transformers has no base model for it: it cannot be "
            "served by this plugin; use attnedit.load, or export it to a checkpoint of a class that the engine knows"
        )
    sites = sites_of_class(source, config)
    for site in sites.values():
        if site.bias:
            raise UsageError(
                f"layer {site.layer_idx} of {source.__name__} adds biases of its own to the logits (such as ALiBi), "
                "which the engine's attention is not given; use attnedit.load"
            )
    missing = sorted(set(range(config.num_hidden_layers)) - {site.layer_idx for site in sites.values()})
    if missing:
        raise UsageError(
            f"layer {missing[0]} of {source.__name__} has no softmax attention, and what it keeps in its place has no "
            "room in the engine's cache; use attnedit.load"
        )
    prefix = source.base_model_prefix

    def __init__(self: Any, config: Any, **kwargs: Any) -> None:
        base.__init__(self, config, **kwargs)
        _place(self, prefix, sites)

    __init__.__annotations__.clear()  # vLLM takes them for classes and compares the arguments
    made = type(f"Attnedit{base.__name__}", (base,), {"__init__": __init__, "config_class": config_class})
    AutoModel.register(config_class, made, exist_ok=True)
    return cast(type[PreTrainedModel], made)


def attention_of(decoder: nn.Module) -> list[Placed]:
    """Return where each attention of a decoder stands, in order; layers that were taken out are left out."""
    found = []
    for name, module in decoder.named_modules():
        if isinstance(module, fx.GraphModule):
            for child, part in module.named_children():
                config = getattr(part, "config", None)
                if (served := served_as(config)) is not None:
                    found.append(Placed(name, module, child, config, served, _sinks(module, child, served.sinks)))
    return found


def served_as(config: Any) -> Served | None:
    """How attention of a shape is served; None of what is no attention, or of a kind that is not served."""
    if isinstance(config, OrdinaryConfig):
        return ORDINARY
    served: Served | None = kind_of(config).lowering("vllm") if isinstance(config, SiteConfig) else None
    return served


def inputs_of(graph: fx.GraphModule, child: str, argument: int) -> set[str]:
    """Return the names of the modules that an argument of the attention is computed by."""
    seen: set[fx.Node] = set()
    todo = [_call(graph, child).args[argument]]
    while todo:
        node = todo.pop()
        if isinstance(node, fx.Node) and node not in seen:
            seen.add(node)
            todo.extend(node.all_input_nodes)
    return {str(node.target) for node in seen if node.op == "call_module"}


def without_mask_and_cache(graph: fx.GraphModule, child: str) -> None:
    """Let the attention of a graph be given neither: the engine has both. In place."""
    call = _call(graph, child)
    served = served_as(graph.get_submodule(child).config)
    engines = () if served is None else served.engines
    call.args = tuple(None if index in engines else value for index, value in enumerate(call.args))
    graph.graph.eliminate_dead_code(lambda node: node.op in ("placeholder", "output"))
    graph.recompile()


def _place(decoder: PreTrainedModel, prefix: str, sites: Mapping[str, AttentionSite]) -> None:
    """Put graphs in place of the attention modules of a decoder just built as the source, in place."""
    holder = nn.Module()  # names of sites begin with the decoder's own
    holder.add_module(prefix, decoder)
    config: Any = decoder.config
    records = config.attnedit["sites"]
    if unknown := sorted(set(records) - set(sites)):
        raise UsageError(f"config.json names the attention module {unknown[0]!r}, which its source lacks")
    implementations = implementation_of(config)
    graphs = {}
    for name, site in sites.items():
        if name in records:
            site_config = config_from_dict(records[name])
            graph = kind_of(site_config).graph(holder, site, site_config)
        else:
            graph = _ordinary_graph(holder, site)
        graphs[name] = graph
    splice(holder, graphs)
    set_implementations(config, implementations)


def _ordinary_graph(holder: nn.Module, site: AttentionSite) -> fx.GraphModule:
    def arguments(call: AnchorCall) -> tuple[Any, ...]:
        given = call.arguments
        return given["q"], given["k"], given["v"], given.get("sinks")

    return replace_attention(holder, site, ORDINARY_MODULE, Ordinary(OrdinaryConfig.of(site)), arguments)


def _call(graph: fx.GraphModule, child: str) -> fx.Node:
    found: fx.Node = next(node for node in graph.graph.nodes if node.op == "call_module" and node.target == child)
    return found


def _sinks(graph: fx.GraphModule, child: str, index: int | None) -> str | None:
    """The name of the parameter that a graph gives its attention as sink logits, by that argument."""
    if index is None:
        return None
    value = _call(graph, child).args[index]
    if value is None:
        return None
    if isinstance(value, fx.Node) and value.op == "get_attr":
        return str(value.target)
    raise UsageError(f"the sink logits of {child} are computed, not a parameter; an engine takes a parameter only")

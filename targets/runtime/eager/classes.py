"""Configuration and model classes of ``model_type`` "attnedit": subclasses of the source's own, made on demand.

A loaded model is the source's class with other attention in some layers, so that everything written for the source
keeps working: ``isinstance``, generation, loss, gradient checkpointing, tied weights, sharded and mapped loading.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from typing import Any, cast

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING

from attnedit.compiler.capture.capture import captured_implementation
from attnedit.compiler.capture.sites import AttentionSite
from attnedit.compiler.compatibility.torch_names import share_class
from attnedit.compiler.compatibility.transformers_names import (
    NOT_SAVED_AS_CODE,
    LoadingHook,
    attention_of,
    ignore_on_load,
    records_attention,
    set_implementations,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.heads import HEADS, LANGUAGE, auto_of_class, classes_of
from attnedit.compiler.model_io.models import forget_quantization
from attnedit.compiler.model_io.remote_code import class_references, own_class
from attnedit.targets.attention.config import SiteConfig
from attnedit.targets.attention.kinds import config_from_dict, config_to_dict, kind_of
from attnedit.targets.attention.module import attention_modules
from attnedit.targets.attention.rewritten.module import Attend
from attnedit.targets.runtime.eager.cache import BoundedGeneration
from attnedit.targets.runtime.eager.conversions import register_conversions
from attnedit.targets.runtime.eager.skeleton import sites_of_source
from attnedit.targets.runtime.eager.splice import splice

MODEL_TYPE = "attnedit"
FORMAT_VERSION = 1
PREFIX = "Attnedit"

NO_WEIGHTS = (
    "output_attentions: {kind} keeps no attention weights that could be given out; leave it out, "
    "and set it to false in the configuration"
)

ConfigClass = type[PreTrainedConfig]
ModelClass = type[PreTrainedModel]

_CLASSES: dict[tuple[ConfigClass, ModelClass], tuple[ConfigClass, ModelClass]] = {}
_BUILDING: ContextVar[bool] = ContextVar("building", default=False)
"""Whether a rewritten model is being made, so that one that is made meanwhile is a part of it."""


class AttneditConfig(PreTrainedConfig):
    """What "attnedit" in a ``config.json`` resolves to; reading one gives a subclass of the source's configuration."""

    model_type = MODEL_TYPE

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Make the configuration that a saved dictionary describes.

        Raises:
            UsageError: it names no source, an unknown one, or another format.
        """
        record = config_dict.get("attnedit")
        source_type = config_dict.get("source_model_type")
        if not isinstance(record, dict) or not isinstance(source_type, str) or "sites" not in record:
            raise UsageError("config.json lacks source_model_type or attnedit: attnedit did not write it")
        if record.get("format_version") != FORMAT_VERSION:
            raise UsageError(
                f"config.json has attnedit format {record.get('format_version')}, this version reads {FORMAT_VERSION}; "
                "use the version of attnedit that wrote it"
            )
        own = {auto: own_class(reference) for auto, reference in (record.get("auto_map") or {}).items()}
        if "AutoConfig" not in own and source_type not in CONFIG_MAPPING:
            raise UsageError(
                f"this transformers ({transformers.__version__}) does not know the source's model type {source_type!r}"
            )
        config_class = own["AutoConfig"] if "AutoConfig" in own else CONFIG_MAPPING[source_type]
        model_class = next((own[auto] for auto in HEADS if auto in own), None)
        if model_class is not None:
            config_class, _ = _make(config_class, model_class)
        else:
            config_class, _ = _classes_of(config_class, record.get("architecture"))
        # A shallow copy: transformers writes its own keyword arguments into the dictionary.
        return config_class.from_dict(dict(config_dict), **kwargs)


class _Rewritten(BoundedGeneration, LoadingHook):
    """First base of every model class here: builds the source model, then puts the new attention in."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        inside = _BUILDING.get()
        token = _BUILDING.set(True)
        try:
            super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        finally:
            _BUILDING.reset(token)
        model = cast(PreTrainedModel, self)
        if inside:
            # The class of a head has asked AutoModel for its decoder; what is rewritten is the model around.
            share_class(model, type(model).__bases__[1])
            return
        _rebuild(model)
        model.init_weights()  # of what is new; the source's own are marked

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model; attention weights, where they are asked for, come from the eager implementation.

        A rewritten layer's are of all tokens so far [B, H, T, S], with none for a token that it no longer holds.

        Raises:
            UsageError: attention weights are asked for, and the model's class or a rewrite of the user's gives none.
        """
        parent: Any = super()
        asked = kwargs.get("output_attentions")
        config: Any = cast(PreTrainedModel, self).config
        if not (asked or (asked is None and getattr(config, "output_attentions", False))):
            return parent.__call__(*args, **kwargs)
        self._check_weights()
        implementation = attention_of(config)
        if implementation == "eager":
            return parent.__call__(*args, **kwargs)
        try:
            set_implementations(config, "eager")
            return parent.__call__(*args, **kwargs)
        finally:
            set_implementations(config, implementation)

    def _check_weights(self) -> None:
        modules = list(cast(torch.nn.Module, self).modules())
        kinds = {type(module) for module in modules if isinstance(module, Attend)}
        if not any(isinstance(module, PreTrainedModel) and records_attention(module) for module in modules):
            kinds.add(type(self).__bases__[1])
        if kinds:
            raise UsageError(NO_WEIGHTS.format(kind=min(kind.__name__ for kind in kinds)))

    def missing_keys_filled(self) -> None:
        """Fill the tables of the new graphs, which loading has just emptied; the source's class knows its own only."""
        for module in cast(torch.nn.Module, self).modules():
            tables: Mapping[str, torch.Tensor] = getattr(module, "tables", None) or {}
            for name, value in tables.items():
                with torch.no_grad():
                    module.get_buffer(name).copy_(value)

    def weights_missing(self) -> None:
        """Give new attention the values that it has when it is made."""
        for _, module in attention_modules(cast(torch.nn.Module, self)):
            module.reset_parameters()


def attnedit_classes(
    source_config: PreTrainedConfig, model_class: ModelClass | None = None
) -> tuple[ConfigClass, ModelClass]:
    """Return the configuration and model class for rewritten models of one source.

    Args:
        source_config: the source's configuration (or a rewritten model's).
        model_class: the source's model class; the one that the configuration names unless told, and the one that
            AutoModelForCausalLM takes where it names none.

    Returns:
        Subclasses of both, the same ones at every call, registered with transformers' auto classes.

    Raises:
        UsageError: transformers has no such class for the configuration.
    """
    config_class = source_config_class(type(source_config))
    if model_class is None:
        record = getattr(source_config, "attnedit", None) or {}
        if made := _named(config_class, record.get("architecture")):  # of code of its own, too
            return made
        return _classes_of(config_class, record.get("architecture"))
    while issubclass(model_class, _Rewritten):
        model_class = cast(ModelClass, model_class.__bases__[1])
    return _make(config_class, model_class)


def to_attnedit(model: PreTrainedModel, site_configs: Mapping[str, SiteConfig]) -> PreTrainedModel:
    """Turn a live, spliced model into one that saves and loads as "attnedit", in place.

    Class and configuration class change, so the model must be a copy (`share_copy`) where the source is to stay.

    Args:
        model: a transformers model with new attention in the named modules.
        site_configs: by module name; added to what earlier calls named.

    Returns:
        The same model.

    Raises:
        UsageError: a named module is not there, or its attention has another configuration.
    """
    modules = dict(model.named_modules())
    for name, site_config in site_configs.items():
        kind = kind_of(site_config)
        module = getattr(modules.get(name), kind.name, None)
        if getattr(module, "config", None) != site_config:
            raise UsageError(f"{name} of {type(model).__name__} holds no {kind.title} of the given configuration")
    config: Any = model.config
    config_class, model_class = attnedit_classes(config, type(model))
    source_type = source_config_class(type(config)).model_type
    earlier = getattr(config, "attnedit", None) or {"sites": {}}
    sites = {**earlier["sites"], **{name: config_to_dict(site_config) for name, site_config in site_configs.items()}}
    forget_quantization(model)  # the weights are plain by now
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for name in ("model_type", "auto_map"):
        config.__dict__.pop(name, None)
    share_class(config, config_class)
    config.source_model_type = source_type
    config.attnedit = {
        "format_version": FORMAT_VERSION,
        "architecture": model_class.__bases__[1].__name__,
        "sites": sites,
    }
    share_class(model, model_class)
    if own := class_references(source_classes(model)):
        config.attnedit["auto_map"] = own
    return model


def source_classes(model: PreTrainedModel) -> dict[str, type]:
    """Return the classes of a rewritten model's source, by the auto class that finds each."""
    kind = type(model)
    config_class = source_config_class(type(model.config))
    return {"AutoConfig": config_class, auto_of_class(kind.__bases__[1], config_class) or LANGUAGE: kind.__bases__[1]}


def source_config_class(config_class: ConfigClass) -> ConfigClass:
    """Return the transformers class behind a configuration class made here; any other is returned as it is."""
    while config_class.model_type == MODEL_TYPE and config_class is not AttneditConfig:
        config_class = cast(ConfigClass, config_class.__bases__[0])
    return config_class


def source_config(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a copy of a rewritten model's configuration as the source had it."""
    result = copy.deepcopy(config)
    share_class(result, source_config_class(type(config)))
    result.__dict__.pop("model_type", None)
    for name in ("attnedit", "source_model_type"):
        result.__dict__.pop(name, None)
    return result


def source_sites(model: PreTrainedModel) -> Mapping[str, AttentionSite]:
    """Return the attention sites of a rewritten model's source, by module name, in order."""
    return sites_of_class(cast(ModelClass, type(model).__bases__[1]), model.config)


def use_captured_implementation(model: PreTrainedModel, sites: Iterable[AttentionSite]) -> None:
    """Make a rewritten model give its attention modules what their graphs take, in place."""
    name = captured_implementation(sites)
    if name is not None:
        set_implementations(model.config, name)


def _classes_of(config_class: ConfigClass, architecture: str | None) -> tuple[ConfigClass, ModelClass]:
    """Classes for a source known by name only."""
    found = [model_class for auto in HEADS for model_class in classes_of(auto, config_class)]
    named = [model_class for model_class in found if model_class.__name__ == architecture]
    causal = next(iter(classes_of(LANGUAGE, config_class)), None)
    known = named[0] if named else getattr(transformers, architecture, None) if architecture else causal
    if not (isinstance(known, type) and issubclass(known, PreTrainedModel) and auto_of_class(known, config_class)):
        raise UsageError(f"this transformers has no model {architecture or 'with a head'} for {config_class.__name__}")
    return _make(config_class, known)


def _named(config_class: ConfigClass, architecture: str | None) -> tuple[ConfigClass, ModelClass] | None:
    """Classes that were made before for a source known by name."""
    pairs = ((source, made) for (config, source), made in _CLASSES.items() if config is config_class)
    return next((made for source, made in pairs if source.__name__ == architecture), None)


def _make(config_class: ConfigClass, model_class: ModelClass) -> tuple[ConfigClass, ModelClass]:
    # The heads that the source's own auto classes would give it first, then the one asked for: anew each time, for one
    # configuration class may serve several model classes.
    kinds = {auto: next(iter(classes_of(auto, config_class)), None) for auto in HEADS}
    kinds[auto_of_class(model_class, config_class) or LANGUAGE] = model_class
    for auto, kind in kinds.items():
        if kind is not None and auto_of_class(kind, config_class) == auto:
            HEADS[auto][0].register(*_pair(config_class, kind), exist_ok=True)
    language = kinds[LANGUAGE]
    if language is not None and config_class in MODEL_FOR_MULTIMODAL_LM_MAPPING:
        for whole in (AutoModelForMultimodalLM, AutoModelForImageTextToText):
            whole.register(*_pair(config_class, language), exist_ok=True)
    return _pair(config_class, model_class)


def _pair(config_class: ConfigClass, model_class: ModelClass) -> tuple[ConfigClass, ModelClass]:
    made = _CLASSES.get((config_class, model_class))
    if made is None:
        made = _CLASSES[config_class, model_class] = _new_classes(config_class, model_class)
        register_conversions(config_class, model_class, made[1])
    return made


def _new_classes(config_class: ConfigClass, model_class: ModelClass) -> tuple[ConfigClass, ModelClass]:
    common: dict[str, Any] = {"__module__": __name__, **NOT_SAVED_AS_CODE}
    # Pickle needs a configuration class to be one object.
    new_config = next((pair[0] for (source, _), pair in _CLASSES.items() if source is config_class), None)
    if new_config is None:
        name = PREFIX + config_class.__name__
        documented = f"`{config_class.__name__}` of a model that attnedit rewrote."
        own = {**common, "__qualname__": name, "__doc__": documented, "model_type": MODEL_TYPE}
        new_config = cast(ConfigClass, type(name, (config_class,), own))
    name = PREFIX + model_class.__name__
    documented = f"`{model_class.__name__}` with other attention in the layers its configuration names."
    own = {**common, "__qualname__": name, "__doc__": documented, "config_class": new_config}
    generation = (GenerationMixin,) if model_class.can_generate() else ()
    return new_config, cast(ModelClass, type(name, (_Rewritten, model_class, *generation), own))


def _rebuild(model: PreTrainedModel) -> None:
    """Put the new attention, with weights yet to be loaded, into a model just built as the source."""
    record = getattr(model.config, "attnedit", None)
    if not record:
        raise UsageError(f"{type(model).__name__} needs a configuration with the attribute 'attnedit'")
    model_class = cast(ModelClass, type(model).__bases__[1])
    sites = sites_of_class(model_class, model.config)
    # The same decoder has other names for its modules alone than under a head.
    places = {_inside(model, name): name for name in sites}
    graphs, configs = {}, {}
    for recorded, values in record["sites"].items():
        name = places.get(_inside(model, recorded))
        if name is None:
            raise UsageError(f"config.json names the attention module {recorded!r}, which {type(model).__name__} lacks")
        site_config, configs[name] = config_from_dict(values), values
        graphs[name] = kind_of(site_config).graph(model, sites[name], site_config)
    config: Any = model.config
    config.attnedit = {**record, "architecture": model_class.__name__, "sites": configs}
    splice(model, graphs)
    use_captured_implementation(model, sites.values())
    # A checkpoint with code of its own has the tables of the graphs, which are at hand here.
    tables = (f"{name}.{table}" for name, graph in graphs.items() for table in getattr(graph, "tables", ()))
    ignore_on_load(model, (f"^{re.escape(name)}$" for name in tables))


def _inside(model: PreTrainedModel, name: str) -> str:
    """A module's name within the decoder, whatever head that is under."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def sites_of_class(model_class: ModelClass, config: PreTrainedConfig) -> Mapping[str, AttentionSite]:
    """Attention sites of the source, from a rewritten model's configuration or its own: see `sites_of_source`."""
    return sites_of_source(model_class, source_config(config))


def __getattr__(name: str) -> Any:
    """Make ``Attnedit<Source>`` classes importable by name, which is what unpickling a model asks for."""
    source = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if isinstance(source, type) and issubclass(source, PreTrainedConfig):
        for (config_class, _), (made, _) in _CLASSES.items():
            if config_class is source:
                return made
        return _classes_of(source, None)[0]
    if isinstance(source, type) and issubclass(source, PreTrainedModel):
        return _make(cast(ConfigClass, source.config_class), source)[1]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


AutoConfig.register(MODEL_TYPE, AttneditConfig, exist_ok=True)

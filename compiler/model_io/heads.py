"""The heads a decoder comes with: a language model's, a classifier's (reward models), or none; and what runs without.

A model without a language head has no logits of next tokens, so its last hidden states stand in for them: where results
are verified, where layers are chosen, and in its graph. Whatever cannot do without logits refuses such a model.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MULTIMODAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.remote_code import auto_map_of

HEADS: dict[str, tuple[Any, Any]] = {
    "AutoModelForCausalLM": (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING),
    "AutoModel": (AutoModel, MODEL_MAPPING),
    "AutoModelForSequenceClassification": (
        AutoModelForSequenceClassification,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    ),
    "AutoModelForTokenClassification": (AutoModelForTokenClassification, MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING),
}
"""By name: the auto class, and the table of model classes that it looks in.

A language model of several parts, such as one that sees images, has an auto class of its own (`auto_class`).
"""
LANGUAGE = "AutoModelForCausalLM"
SAMPLING = "sampling text from the model itself"


def classes_of(auto: str, config_class: type[PreTrainedConfig]) -> list[type[PreTrainedModel]]:
    """The model classes that transformers has for a configuration class under an auto class; the default one first.

    Of language models the one with images and all comes before its text tower alone.
    """
    listed: list[type[PreTrainedModel]] = []
    for table in (*([MODEL_FOR_MULTIMODAL_LM_MAPPING] if auto == LANGUAGE else []), HEADS[auto][1]):
        found = table.get(config_class, None)
        listed += [kind for kind in (found if isinstance(found, list | tuple) else (found,)) if kind is not None]
    return list(dict.fromkeys(listed))


def is_multimodal(config: PreTrainedConfig) -> bool:
    """Whether a configuration is of several parts, one of which is a language model: its text tower."""
    return type(config.get_text_config(decoder=True)) is not type(config)  # an encoder-decoder's is a copy of its own


def auto_class(config: PreTrainedConfig) -> Any:
    """The auto class that loads what a configuration declares: with images and all where it has more than text."""
    auto = auto_of_config(config) or LANGUAGE
    alone = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and not is_multimodal(config)
    whole = type(config) in MODEL_FOR_MULTIMODAL_LM_MAPPING and not alone
    own = LANGUAGE in auto_map_of(config)
    return AutoModelForMultimodalLM if auto == LANGUAGE and whole and not own else HEADS[auto][0]


def auto_of_class(model_class: type[PreTrainedModel], config_class: type[PreTrainedConfig]) -> str | None:
    """The auto class that loads a model class of a decoder, or None; one that generates belongs to language models."""
    if model_class.can_generate():
        return LANGUAGE
    return next((auto for auto in HEADS if model_class in classes_of(auto, config_class)), None)


def auto_of_config(config: PreTrainedConfig) -> str | None:
    """The auto class that loads what a configuration declares; None where it declares another head.

    A bare decoder loads as a language model where its head is its embeddings, so that nothing is missing; what attnedit
    has rewritten stays what it was.
    """
    declared = set(getattr(config, "architectures", None) or ())
    named = [auto for auto in HEADS if declared & {kind.__name__ for kind in classes_of(auto, type(config))}]
    if not declared or LANGUAGE in named:
        return LANGUAGE
    if named == ["AutoModel"] and getattr(config, "tie_word_embeddings", False) and not hasattr(config, "attnedit"):
        return LANGUAGE
    return named[0] if named else None


def has_language_head(model: nn.Module) -> bool:
    """Whether a model gives logits of next tokens, as whatever is no model of transformers has to."""
    return not isinstance(model, PreTrainedModel) or bool(model.can_generate())


def runner(model: nn.Module) -> nn.Module:
    """What to run in place of a model to have something for every token: its decoder, where it has no language head."""
    return model if has_language_head(model) else cast(PreTrainedModel, model).base_model


def outputs_of(model: nn.Module, ids: Tensor, **arguments: Any) -> Tensor:
    """Logits [B, T, V] of a language model on token ids [B, T]; of any other the last hidden states [B, T, D]."""
    run = runner(model)
    output = run(input_ids=ids, **arguments)
    result: Tensor = output.logits if has_language_head(model) else output.last_hidden_state
    return result


def need_language_head(model: nn.Module, what: str, instead: str) -> None:
    """Refuse a model without a language head, saying what needs logits and what to do instead.

    Raises:
        UsageError: it has none.
    """
    if not has_language_head(model):
        raise _no_language_head(what, type(model).__name__, instead)


def need_language_config(config: PreTrainedConfig, name: str, what: str) -> None:
    """`need_language_head` of a checkpoint, before its weights are read.

    Raises:
        UsageError: its configuration declares another head, or none.
    """
    if auto_of_config(config) not in (LANGUAGE, None):
        declared = ", ".join(config.architectures or ())
        raise _no_language_head(what, f"{name} ({declared})", "give a causal language model")


def check_text_alone(config: PreTrainedConfig, name: str, where: str) -> None:
    """Refuse a model that is more than a language model where only those have a place, such as "a GGUF".

    Raises:
        UsageError: it takes images or the like.
    """
    if is_multimodal(config):
        raise UsageError(
            f"{name} is more than a language model, and {where} holds one alone; serve the result with transformers, "
            "or export its text tower to onnx"
        )


def check_exportable(model: PreTrainedModel, runtime: str, alone: str | None = None) -> None:
    """Refuse a model that cannot be exported, such as one that is more than a language model if `alone` holds no more.

    Raises:
        UsageError: it has no language head, or takes images or the like.
    """
    need_language_head(model, f"export to {runtime}", "compile and export the language model that it came from")
    if alone is not None:
        check_text_alone(model.config, type(model).__name__, alone)


def _no_language_head(what: str, name: str, instead: str) -> UsageError:
    return UsageError(f"{what} needs logits of next tokens, and {name} has no language-model head; {instead}")

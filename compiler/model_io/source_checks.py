"""What a source model must be before attnedit touches it; each refusal is one line that says how to mend it."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.heads import LANGUAGE, auto_of_config, classes_of, is_multimodal
from attnedit.compiler.model_io.remote_code import AUTO_CLASSES, auto_map_of, needs_own_code


def model_name(model: PreTrainedModel) -> str:
    """What messages call a model: where it was loaded from, or its class.

    Raises:
        UsageError: it is not a model of transformers, but the name of one, say.
    """
    if not isinstance(getattr(model, "config", None), PreTrainedConfig):
        got = repr(model) if isinstance(model, str) else f"a {type(model).__name__}"
        raise UsageError(f"expected a model of transformers, got {got}; load it with AutoModelForCausalLM first")
    return model.config.name_or_path or type(model).__name__


def check_config(
    config: PreTrainedConfig, name: str, *, dequantize: bool = False, trust_remote_code: bool = False
) -> None:
    """Refuse what is no decoder-only language model and has none as its text tower, from the configuration alone.

    Raises:
        UsageError: encoder-decoder, encoder, no causal language model, quantised without ``dequantize``, or of classes
            that transformers lacks, without ``trust_remote_code``.
    """
    if not trust_remote_code:
        _check_code(config, name)
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        if getattr(part, "is_encoder_decoder", False):
            raise UsageError(
                f"{name} is an encoder-decoder ({part.model_type}); attnedit converts decoder-only language models"
            )
        check_sizes(part, name)
    # The class that a trusted auto_map names is whatever it is: loading it shows that.
    if not trust_remote_code or "AutoModelForCausalLM" not in auto_map_of(config):
        _check_architecture(config, name)
    method = quantization_method(config)
    # bitsandbytes stands in the table once for each number of bits.
    known = {*AUTO_QUANTIZATION_CONFIG_MAPPING, *(name.partition("_")[0] for name in AUTO_QUANTIZATION_CONFIG_MAPPING)}
    if method is not None and method not in known:
        raise UsageError(
            f"{name} is quantised by {method!r}, which this transformers does not know, so it cannot be unpacked; "
            "give the unquantised model"
        )
    if method is not None and not dequantize:
        raise UsageError(
            f"{name} is already quantised ({method}); give the unquantised model, or --dequantize "
            f"(dequantize=True) to work on the dequantised weights"
        )


_SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")
_MOST_LAYERS = 10_000


def check_sizes(config: PreTrainedConfig, name: str) -> None:
    """Refuse sizes that no model has, before anything is built from them.

    Raises:
        UsageError: with the field's name.
    """
    for field in _SIZES:
        value = vars(config).get(field)
        most = _MOST_LAYERS if field == "num_hidden_layers" else 2**31
        if isinstance(value, int | float) and not 1 <= value <= most:
            raise UsageError(f"the configuration of {name} has {field} {value}; it must be from 1 to {most}")


def quantization_method(config: PreTrainedConfig) -> str | None:
    """Name of the quantisation a configuration declares, or None."""
    declared = getattr(config, "quantization_config", None)
    if declared is None:
        return None
    method = declared.get("quant_method") if isinstance(declared, dict) else getattr(declared, "quant_method", None)
    return str(getattr(method, "value", method) or "unknown method")


def _check_code(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint with code of its own, unless transformers has meanwhile adopted all its classes."""
    adopted = {kind.__name__ for kind in (type(config), *classes_of(LANGUAGE, type(config)))}
    references = auto_map_of(config)
    if any(references[auto].rpartition(".")[2] not in adopted for auto in AUTO_CLASSES if auto in references):
        raise needs_own_code(name)


def _check_architecture(config: PreTrainedConfig, name: str) -> None:
    if not classes_of(LANGUAGE, type(config)):
        raise UsageError(f"{name} ({config.model_type}) is not a causal language model; attnedit converts those only")
    declared = getattr(config, "architectures", None) or []
    if not isinstance(declared, list) or not all(isinstance(kind, str) for kind in declared):
        raise UsageError(f"the configuration of {name} has architectures {declared!r}; it must be a list of names")
    # A checkpoint of another head would load with its language head initialised at random.
    if auto_of_config(config) is None:
        names = sorted(kind.__name__ for kind in classes_of(LANGUAGE, type(config)))
        raise UsageError(
            f"{name} holds {', '.join(declared)}, not a causal language model ({', '.join(names)}), its decoder, or "
            f"one that classifies sequences or tokens; attnedit converts those only"
        )
    # BERT and its like have a causal head too, which needs this switch; without it their attention looks both ways.
    if (
        not is_multimodal(config)
        and config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and not getattr(config, "is_decoder", False)
    ):
        raise UsageError(
            f"{name} is an encoder ({config.model_type} without is_decoder); attnedit converts decoder-only language "
            f"models"
        )


def check_weight_files(path: Path, name: str, *, allow_pickle: bool = False) -> None:
    """Refuse a directory whose weights are missing, pickled without ``allow_pickle``, or listed outside of it.

    Raises:
        UsageError: a file, a directory without weights, or one whose index names anything but files in it.
    """
    if path.is_file():
        raise UsageError(
            f"{name} is a configuration, which only inspect can work with; give the directory of the whole model"
        )
    index = path / "model.safetensors.index.json"
    if index.exists() and not (path / "model.safetensors").exists():
        read_index(index, name, ".safetensors")
    if next(path.glob("*.safetensors"), None):
        return
    pickled = next(path.glob("*.bin"), None)
    if pickled is None:
        raise UsageError(
            f"cannot read the weights of {name}: it holds no model.safetensors; give the directory of the whole model "
            f"(inspect alone works without weights)"
        )
    if not allow_pickle:
        raise UsageError(
            f"{name} holds its weights as pickles ({pickled.name}), which attnedit does not read unasked; save it as "
            f"safetensors, or give --allow-pickle (allow_pickle=True) if you trust it"
        )
    index = path / "pytorch_model.bin.index.json"
    if index.exists():
        read_index(index, name, ".bin")


def read_index(index: Path, name: str, suffix: str) -> dict[str, str]:
    """Read which shard holds each tensor.

    Raises:
        UsageError: it cannot be read, or names anything but plain files that are beside it.
    """
    try:
        listed = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        shards = sorted(set(listed.values()))
        plain = [shard for shard in shards if PurePath(shard).name == shard and "\\" not in shard]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{index.name} of {name} cannot be read, it is damaged; fetch it again") from error
    for shard in shards:
        if shard not in plain or not shard.endswith(suffix):
            raise UsageError(
                f"{index.name} of {name} names {shard!r} as a shard, which is no {suffix} file beside it; get an "
                f"intact checkpoint from a source you trust"
            )
        if not (index.parent / shard).is_file():
            raise UsageError(f"{index.name} of {name} names {shard}, which is not there; fetch it again")
    return listed


def check_weights(model: PreTrainedModel, name: str) -> None:
    """Refuse weights that hold NaN or infinity, naming the first such tensor.

    Raises:
        UsageError: with the tensor's name.
    """
    for key, value in model.state_dict().items():
        if not value.is_floating_point() or value.numel() == 0 or value.is_meta:
            continue
        # aminmax carries NaN through and shows infinity, in one read and without a mask as large as the tensor.
        low, high = torch.aminmax(value)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):
            what = "NaN" if bool(torch.isnan(low) | torch.isnan(high)) else "infinite values"
            raise UsageError(
                f"the weights of {name} hold {what} in {key}; get an intact checkpoint "
                f"(a float16 copy may have overflowed)"
            )


def embedding_weight(model: PreTrainedModel) -> torch.Tensor:
    """The input embeddings, [vocabulary, hidden]: they say which ids a model takes, and on which device."""
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, name: str) -> None:
    """Refuse a tokenizer that can produce ids without an embedding row.

    Added special tokens that text cannot produce by itself (image placeholders and the like) are let through
    unless the tokenizer inserts them.

    Raises:
        UsageError: with the first such token and both sizes.
    """
    rows = embedding_weight(model).shape[0]
    inserted = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id}
    special = set(tokenizer.all_special_ids) - inserted
    outside = sorted((index, token) for token, index in tokenizer.get_vocab().items() if index >= rows)
    outside = [(index, token) for index, token in outside if index not in special]
    if outside:
        index, token = outside[0]
        raise UsageError(
            f"the tokenizer does not fit {name}: {len(outside)} of its tokens have no embedding (first: {token!r}, "
            f"id {index}; the model has {rows} rows); give the tokenizer the model was trained with"
        )

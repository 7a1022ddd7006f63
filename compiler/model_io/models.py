"""The MODEL argument: a hub name, a local directory, a ``.gguf`` file, or ``smollm2``; loaded and checked.

Whatever is wrong with it becomes one `UsageError`, before anything expensive starts.
"""

from __future__ import annotations

import logging
import pickle
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import GgufConfig

from attnedit.compiler.compatibility.torch_names import own_buffers, temporary_buffers
from attnedit.compiler.compatibility.transformers_names import (
    CONVERSIONS_MODULE,
    conversions_of,
    dtype_plan,
    set_conversions,
)
from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.devices import parse_dtype, resolve_device
from attnedit.compiler.model_io.gguf_reading import shared_gguf_reader
from attnedit.compiler.model_io.heads import auto_class, is_multimodal, need_language_config
from attnedit.compiler.model_io.locations import Location, locate
from attnedit.compiler.model_io.processors import processor_directory
from attnedit.compiler.model_io.remote_code import needs_own_code, trusting
from attnedit.compiler.model_io.source_checks import (
    check_config,
    check_tokenizer,
    check_weight_files,
    check_weights,
    quantization_method,
)

#: What transformers, tokenizers, safetensors and the hub client raise for an input they cannot read.
READING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ImportError,
    AssertionError,
    EOFError,
    ArithmeticError,
    MemoryError,
    pickle.UnpicklingError,
    struct.error,
    SafetensorError,
    StrictDataclassError,
)


@dataclass(frozen=True)
class Source:
    """A loaded source model.

    Attributes:
        model: in eval mode, on its device, free of any trace of quantisation.
        tokenizer: None if the directory holds none.
        name: what the user called it.
        processor: directory with its processor's files; None if the model takes text alone.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str
    processor: Path | None = None


@shared_gguf_reader()
def load_source(
    model: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str | torch.device | None = "auto",
    dequantize: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    logits_for: str | None = None,
) -> Source:
    """Load a model and its tokenizer, and check that both can be worked on.

    Args:
        model: hub name, directory (also one that attnedit saved), ``.gguf`` file, or ``smollm2``.
        revision: branch, tag or commit; hub names only.
        dtype: of the weights; ``"auto"`` keeps the checkpoint's own.
        device: a torch device, or ``"auto"``: CUDA or an Ascend NPU where there is one.
        dequantize: accept an already quantised checkpoint and unpack it. A ``.gguf`` is always unpacked.
        allow_pickle: read weights saved as pickles (``.bin``) where there are no safetensors; tensors only, no code.
        trust_remote_code: run the modelling code that comes with the checkpoint; it can do anything that you can.
        logits_for: what needs a language-model head, which a model without one is refused for before it is read.

    Raises:
        UsageError: nothing there, damaged, or not a model attnedit converts.
    """
    torch_dtype, target = parse_dtype(dtype), resolve_device(device)
    location = locate(model, revision, trust_remote_code)
    config = _read_config(location, revision)
    check_config(config, location.name, dequantize=dequantize, trust_remote_code=trust_remote_code)
    if logits_for is not None:
        need_language_config(config, location.name, logits_for)
    if location.directory is not None and location.gguf is None:
        check_weight_files(Path(location.path), location.name, allow_pickle=allow_pickle)
    # The configuration is handed on everywhere: parsing the header of a GGUF takes seconds each time.
    arguments = location.arguments(revision) | {"config": config}
    if not allow_pickle and location.gguf is None:
        arguments["use_safetensors"] = True
    quantised = location.gguf is None and quantization_method(config) is not None
    if location.gguf is not None:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    elif quantised:
        _ask_for_dequantized(config)
    try:
        with _quiet_transformers():  # its load report repeats what is checked just below
            loaded, info = auto_class(config).from_pretrained(
                location.path,
                dtype=torch_dtype,
                device_map=None if target.type == "cpu" else {"": target},
                output_loading_info=True,
                **arguments,
            )
        if quantised:
            _unpack(loaded)
    except UsageError:
        raise
    except _errors(location) as error:
        raise _cannot_read("the weights of", location, error) from error
    if any("_orig_mod." in key for key in info["unexpected_keys"]):
        raise UsageError(
            f"the tensors of {location.name} have _orig_mod. in their names: it was saved from a model that "
            "torch.compile wraps; save model._orig_mod instead"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(
            f"the checkpoint of {location.name} lacks {len(missing)} of the model's tensors (first: {missing[0]}); "
            f"it is incomplete, or was saved without its head"
        )
    loaded.eval()
    loaded.config.name_or_path = location.name  # reports show it; a GGUF brings a name of its own
    forget_quantization(loaded)
    if quantised and isinstance(torch_dtype, torch.dtype):
        _bring_to(loaded, torch_dtype)
    check_weights(loaded, location.name)
    tokenizer = _read_tokenizer(location, revision, config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, loaded, location.name)
    return Source(loaded, tokenizer, location.name, _processor(loaded, location, revision))


def load_config_only(
    model: str,
    *,
    revision: str | None = None,
    dequantize: bool = True,
    dtype: torch.dtype | str = "auto",
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Build the model of a configuration on meta tensors: ``config.json`` is enough, no weight is read.

    Buffers that no checkpoint holds (rotary frequencies among them) are real, so that facts can be probed numerically.

    Args:
        model: as in `load_source`; the path of a ``config.json`` is accepted too.
        revision: branch, tag or commit; hub names only.
        dequantize: the default accepts a quantised model's configuration, as if it were dequantised.
        dtype: of the weights that are not there; "auto" is the configuration's.
        trust_remote_code: as in `load_source`.

    Raises:
        UsageError: nothing there, unreadable, or not a model attnedit converts.
    """
    location = locate(model, revision, trust_remote_code)
    config = _read_config(location, revision)
    check_config(config, location.name, dequantize=dequantize, trust_remote_code=trust_remote_code)
    if quantization_method(config) is not None:
        del config.quantization_config
    asked: dict[str, Any] = {} if parse_dtype(dtype) == "auto" else {"dtype": parse_dtype(dtype)}
    asked["trust_remote_code"] = trust_remote_code
    try:
        with init_empty_weights(include_buffers=False):
            built = cast(PreTrainedModel, auto_class(config).from_config(config, **asked))
        built.tie_weights()  # making parameters meta has parted what was tied
        for module in built.modules():
            for key in own_buffers(module).keys() - temporary_buffers(module):
                own_buffers(module)[key] = module.get_buffer(key).to("meta")  # a weight in all but name
    except _errors(location) as error:
        raise _cannot_read("the configuration of", location, error) from error
    built.eval()
    built.config.name_or_path = location.name
    return built


def load_tokenizer(
    model: PreTrainedModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Read the tokenizer of a model that `load_config_only` built; None if it has none.

    Raises:
        UsageError: it cannot be read, or does not fit the model.
    """
    location = locate(str(model.config.name_or_path), revision, trust_remote_code)
    tokenizer = _read_tokenizer(location, revision, model.config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, location.name)
    return tokenizer


def load_processor(
    model: PreTrainedModel, *, revision: str | None = None, trust_remote_code: bool = False
) -> Path | None:
    """The directory with the processor's files of a model that `load_config_only` built; None if it has none."""
    location = locate(str(model.config.name_or_path), revision, trust_remote_code)
    return _processor(model, location, revision)


def _processor(model: PreTrainedModel, location: Location, revision: str | None) -> Path | None:
    return processor_directory(location, revision) if is_multimodal(model.config) else None


def _read_config(location: Location, revision: str | None) -> PreTrainedConfig:
    try:
        with trusting(location.path if location.trust_remote_code else None):
            return cast(PreTrainedConfig, AutoConfig.from_pretrained(location.path, **location.arguments(revision)))
    except UsageError:
        raise
    except _errors(location) as error:
        raise _cannot_read("the configuration of", location, error) from error


def _read_tokenizer(
    location: Location, revision: str | None, config: PreTrainedConfig
) -> PreTrainedTokenizerBase | None:
    if location.gguf is None and location.directory is not None and not _holds_tokenizer(location.directory):
        return None
    try:
        tokenizer = AutoTokenizer.from_pretrained(location.path, config=config, **location.arguments(revision))
    except _errors(location) as error:
        raise _cannot_read("the tokenizer of", location, error) from error
    return cast(PreTrainedTokenizerBase, tokenizer)


def _holds_tokenizer(directory: Path) -> bool:
    patterns = ("tokenizer*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
    return any(next(directory.glob(pattern), None) for pattern in patterns)


def _ask_for_dequantized(config: PreTrainedConfig) -> None:
    """Set the switch that some methods have to unpack while loading; the others are unpacked afterwards."""
    declared = config.quantization_config
    if isinstance(declared, dict):
        declared["dequantize"] = True
    elif hasattr(declared, "dequantize"):
        declared.dequantize = True


def _unpack(model: PreTrainedModel) -> None:
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not getattr(quantizer.quantization_config, "dequantize", False):
        model.dequantize()


def _bring_to(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Bring all weights to the dtype asked for: of a quantised checkpoint, only what was quantised comes in it."""
    kept = re.compile("|".join(dtype_plan(model, dtype)) or r"(?!)")
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not kept.search(name):
            parameter.data = parameter.data.to(dtype)


def forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks that make ``save_pretrained``, ``to`` and PEFT treat plain weights as quantised.

    Conversions that a quantiser left are among them: saving would quantise anew, or fail.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    steps = [step for conversion in conversions_of(model) for step in getattr(conversion, "operations", None) or ()]
    if any(type(step).__module__ != CONVERSIONS_MODULE for step in steps):
        set_conversions(model, None)  # saving then takes those of the class


def _errors(location: Location) -> tuple[type[Exception], ...]:
    """What reading may raise: code that comes with a model may raise anything."""
    return (Exception,) if location.trust_remote_code else READING_ERRORS


def _cannot_read(what: str, location: Location, error: BaseException) -> UsageError:
    reason = str(error).strip().split("\n\n")[0]
    if "trust_remote_code" in reason:
        return needs_own_code(location.name)
    if location.directory is None:
        return UsageError(
            f"{location.name} is no file or directory here and could not be fetched from the Hugging Face hub: {reason}"
        )
    if location.gguf is not None and _is_damaged(location.directory / location.gguf):
        return UsageError(f"{location.name} is truncated or damaged, not a whole GGUF file; fetch it again")
    return UsageError(f"cannot read {what} {location.name}: {type(error).__name__}: {reason}")


def _is_damaged(file: Path) -> bool:
    """Whether the GGUF's header or any tensor it lists is cut off; only asked once reading has failed."""
    from gguf import GGUFReader  # an optional dependency, present if we got here

    try:
        GGUFReader(file)
    except READING_ERRORS:
        return True
    return False


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Let through only errors of transformers' log."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)

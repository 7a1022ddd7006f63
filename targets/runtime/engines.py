"""Inference engines that results are written for: what each takes, and which form that makes of a result.

From the engines' own loaders. vLLM: one of three sizes of cached latent attention, windows in its Llama and Laguna.
SGLang: any size that is the same in all layers, windows in Laguna. llama.cpp: a GGUF.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.targets.attention.kind import AttentionKind
from attnedit.targets.attention.kinds import known_kinds
from attnedit.targets.runtime.staging import check_choice

VLLM, SGLANG, LLAMA_CPP = "vllm", "sglang", "llama.cpp"
ENGINES = (VLLM, SGLANG, LLAMA_CPP)
SLOT_VALUES = 64
"""Rotary values per token in stock vLLM's sizes."""
STOCK_VALUES = (576, 512, 320)
"""Cached values per token and layer of latent attention that stock vLLM admits."""
VLLM_WINDOWS = ("gemma2", "gemma3_text", "gpt_oss", "laguna")
"""Types whose classes in vLLM read ``layer_types``."""
VLLM_LLAMA = ("ministral", "smollm3")
"""Types that vLLM's Llama serves, ``layer_types`` and biases included."""
PLUGIN = "attnedit's plugin for vLLM (pip install 'attnedit[vllm]'), which serves the saved result itself"

VLLM_STEP, VLLM_BLOCK = 512, 32
"""``--max-num-batched-tokens`` and ``--block-size`` that the report counts a window with."""
LLAMA_CPP_STEP, LLAMA_CPP_BLOCK = 256, 256
"""``-ub`` that it counts with, and what llama.cpp rounds up to."""


@dataclass(frozen=True)
class Taken:
    """What an engine takes of one kind of attention; a kind's lowering "engines" has one for each engine.

    Attributes:
        profiles: of a checkpoint, the first unless asked for; none where it takes a .gguf alone.
        normed: those where queries or keys are normalised; the same unless given.
    """

    profiles: tuple[str, ...]
    normed: tuple[str, ...] | None = None

    @property
    def wanted(self) -> str | None:
        """The profile that a compilation goes towards."""
        return next(iter(self.profiles), None)


LATENT = dict.fromkeys(ENGINES, Taken(("deepseek_v3",)))
WINDOWED = {
    VLLM: Taken(("native", "laguna"), normed=("laguna",)),
    SGLANG: Taken(("laguna",)),
    LLAMA_CPP: Taken(()),
}

_TRIED = {
    "saved": "vLLM 0.26.0 and 0.32.0 (CPU), through attnedit's plugin.",
    "gguf": "llama.cpp (CPU; xllamacpp 2026.10.11549).",
    "deepseek_v3": "vLLM 0.32.0 (CPU, 512 + 64 values, without its rotary kernel); SGLang 0.5.17 (CPU, with "
    "two lines of it changed). For llama.cpp export the result with --to gguf.",
    "youtu": "None: neither vLLM 0.32 nor SGLang knows this class.",
    "laguna": "vLLM 0.32.0 (CPU); SGLang 0.5.17 (CPU), which wants a head of its own (--engine sglang).",
    "lfm3": "None: vLLM 0.32 does not know this class.",
    "native": "vLLM 0.32.0 (CPU), as its LlamaForCausalLM with layer_types; not as any other class.",
    "remote": "None: engines run their own classes.",
}
"""What was run with which form; the others were only read."""


def tried(form: str) -> str:
    """Return what a model card says of engines and a form: a profile, "gguf", or "saved" for attnedit's own."""
    return f"Engines that were tried with this form: {_TRIED[form]}"


def check_engine(
    engine: str | None,
    target: str,
    kinds: Sequence[AttentionKind],
    profile: str | None,
    kernel_dims: bool,
    gate: str | None,
    sinks: str | None,
) -> str | None:
    """Hold the arguments of a compilation against an engine.

    Returns:
        The profile that the engine asks for; `profile` where it asks for none.

    Raises:
        UsageError: an argument contradicts it.
    """
    if engine is None:
        return profile
    check_choice("engine", engine, ENGINES)
    taken = _taken(kinds[0], engine) if len(kinds) == 1 else None
    if taken is None:
        other = f"; use {PLUGIN}" if engine == VLLM else ""
        able = " or ".join(kind.name for kind in known_kinds() if _taken(kind, engine))
        raise UsageError(f"engine {engine} holds target {able}, not {target}{other}")
    wanted = taken.wanted
    if profile not in (None, wanted):
        raise UsageError(
            f"engine {engine} takes {_named(wanted)} of target {target}, not profile {profile}; leave it out"
        )
    if kernel_dims:
        raise UsageError(f"kernel_dims and engine {engine} both say which sizes there are; give one of them")
    if wanted is None:
        held = sorted({*(sinks or "none").split(",")} - {"none", "logit"})
        if held:
            raise UsageError(f"engine {engine} holds no sinks {held[0]}; give sinks none or logit")
        if gate == "element":
            raise UsageError(f"engine {engine} holds a gate per head or none, not per element")
        if gate == "head" and "logit" in (sinks or ""):
            raise UsageError(f"engine {engine} holds a gate or sink logits, not both")
    return wanted


def _taken(kind: AttentionKind, engine: str) -> Taken | None:
    by_engine: Mapping[str, Taken] = kind.lowering("engines") or {}
    return by_engine.get(engine)


def _named(profile: str | None) -> str:
    return "a .gguf and no profile" if profile is None else f"profile {profile}"


def stock_rank(engine: str | None, source_values: int, budget: float) -> int | None:
    """Return the latent's size for an engine with sizes of its own; None where any will do.

    The source caches `source_values` per token and layer, and the budget is a fraction of them.

    Raises:
        UsageError: none of its sizes is within the budget.
    """
    if engine != VLLM:
        return None
    within = [values for values in STOCK_VALUES if values <= budget * source_values + 1e-6]
    if within:
        return max(within) - SLOT_VALUES
    saving = [values for values in STOCK_VALUES if values < source_values]
    sizes = ", ".join(map(str, STOCK_VALUES))
    if saving:
        least = -(-min(saving) * 100 // source_values) / 100
        raise UsageError(
            f"stock vLLM caches {sizes} values per token and layer, and kv_budget {budget:g} allows "
            f"{int(budget * source_values)}; give kv_budget {least:g}, or use {PLUGIN}"
        )
    raise UsageError(
        f"stock vLLM caches {sizes} values per token and layer, and the source {source_values}: nothing would be "
        f"saved; use {PLUGIN}"
    )


def window_cache(
    engine: str, windows: Sequence[int | None], values: int, itemsize: int, length: int
) -> tuple[float, str] | None:
    """What an engine allocates for one sequence, where it holds more than the tokens of a window.

    Args:
        engine: its name.
        windows: of each layer, in tokens; None is none.
        values: cached values per token, of every layer.
        itemsize: bytes of one, in the checkpoint.
        length: tokens of the sequence.

    Returns:
        Bytes per token over all layers, and the settings that reach it; None for an engine that was not run.
    """
    layers = Counter(windows)
    if engine == VLLM:
        # Layers that are alike form groups of one size, the last one padded, and blocks are of a whole group.
        fewest, most = min(layers.values()), max(layers.values())
        size = most if most < 1.5 * fewest else fewest
        tokens = {
            window: _up(length if window is None else min(window - 1 + VLLM_STEP, length), VLLM_BLOCK)
            + (0 if window is None else VLLM_BLOCK)
            for window in layers
        }
        layers = Counter({window: _up(count, size) for window, count in layers.items()})
        flags = f"--max-num-batched-tokens {VLLM_STEP} --block-size {VLLM_BLOCK} --no-async-scheduling"
    elif engine == LLAMA_CPP:
        tokens = {
            window: _up(length if window is None else min(window + LLAMA_CPP_STEP, length), LLAMA_CPP_BLOCK)
            for window in layers
        }
        itemsize = 2  # its cache is float16, whatever the file is
        flags = f"-ub {LLAMA_CPP_STEP}"
    else:
        return None
    return sum(tokens[window] * count for window, count in layers.items()) * values * itemsize / length, flags


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


def export_profile(engine: str, profile: str | None, kinds: Mapping[str, AttentionKind], *, normed: bool) -> str:
    """Return the profile of a checkpoint for an engine: the one asked for, or compiled for, if it takes that.

    Raises:
        UsageError: the engine takes no checkpoint, not of that profile, or nothing of such a kind.
    """
    check_choice("--engine", engine, ENGINES)
    able = [kind for kind in known_kinds() if kind in kinds.values() and _taken(kind, engine)]
    if not kinds:
        raise UsageError(f"no layer was rewritten, and {engine} runs the source as it is")
    if not able:
        name, kind = next(iter(kinds.items()))
        raise UsageError(
            f"{name} is {kind.title}, which {engine} has no class for; save the result, or use --profile remote"
        )
    taken = _taken(able[0], engine) or Taken(())
    profiles = taken.normed if normed and taken.normed is not None else taken.profiles
    if not profiles:
        raise UsageError(f"{engine} takes a GGUF of this result: give --to gguf")
    if profile is not None and profile not in profiles:
        raise UsageError(f"{engine} takes profile {profiles[0]} of this result, not {profile}; leave --profile out")
    return profile or profiles[0]


def check_checkpoint(engine: str, config: Any) -> list[str] | None:
    """Hold a checkpoint's configuration against what an engine's loader reads.

    Returns:
        What config.json is to call the class, if not by transformers' name.

    Raises:
        UsageError: the engine could not serve it, or would serve something else.
    """
    if getattr(config, "hidden_act", "silu") != "silu":
        raise UsageError(f"{engine} has a silu in the MLP of this class, the model {config.hidden_act}")
    rank = getattr(config, "kv_lora_rank", None)
    if rank is None:
        if engine == SGLANG and "full_attention" not in config.layer_types:
            raise UsageError("SGLang's Laguna wants a full layer; compile with --full-layers 1 or more")
        if engine == SGLANG and config.tie_word_embeddings:
            raise UsageError("SGLang's Laguna ties no head to the embeddings; it needs weights of its own")
        if engine != VLLM or config.model_type in VLLM_WINDOWS:
            return None
        if config.model_type in VLLM_LLAMA:
            return ["LlamaForCausalLM"]
        raise UsageError(f"vLLM's class for {config.model_type} has no windows in some layers only; use {PLUGIN}")
    rope = config.rope_parameters["rope_type"]
    if rope != "default":
        raise UsageError(
            f"the rotary slots need rope_type {rope}, which {engine} reads in its own way; "
            f"compile with --engine {engine}"
        )
    values = rank + config.qk_rope_head_dim
    if engine == VLLM and (values not in STOCK_VALUES or config.qk_rope_head_dim != SLOT_VALUES):
        sizes = ", ".join(f"{size - SLOT_VALUES} + {SLOT_VALUES}" for size in STOCK_VALUES)
        raise UsageError(
            f"stock vLLM admits latent and slots of {sizes} values, the result has {rank} + "
            f"{config.qk_rope_head_dim}; compile with --engine vllm, or use {PLUGIN}"
        )
    return None

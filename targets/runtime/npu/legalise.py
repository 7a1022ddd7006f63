"""How each attention of a model runs on a system on chip: which kernel, what is padded, why, and what that costs.

Padding with zeros is exact wherever it is done here: zero queries give outputs that are dropped, zeros in a latent or a
head meet zeros in the query, and zero values end up in dropped columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from attnedit.targets.runtime.npu.limits import (
    ALIGNMENT,
    BLOCK,
    LATENT,
    LATENT_HEADS,
    MASK,
    MAX_SHARING,
    ROPE,
    AttentionCall,
    Soc,
    attention_refusal,
)

KERNEL = "npu_fused_infer_attention_score_v2"
PLAIN = "matmul"

Form = Literal["latent", "window", "full", "held", "traced"]
Phase = Literal["prefill", "decode"]


@dataclass(frozen=True)
class Surveyed:
    """What the survey says of one attention: all that the kernels' limits are about.

    Attributes:
        layer: its layer of the cache.
        form: "latent"; "window": a bounded cache of keys and values; "full": all of them; "held": a cache of something
            else, from which the model makes keys and values itself; "traced": the same, and the attention is the
            model's own too.
        heads: query heads.
        kv_heads: key/value heads.
        size: of queries and keys; for "latent", of the queries that come in.
        value_size: of values.
        rank: values per token of the latent.
        rope: values per token of its rotary part.
        nope: whether queries meet the latent, not the rotary part alone.
        window: tokens that a query sees, itself included; None is all.
        sink_tokens: first tokens that stay visible.
        virtual: keys that are mere logits.
        softcap: whether logits are capped.
        held: of what a "held" or "traced" layer caches: heads, and sizes of its two parts.
    """

    layer: int
    form: Form
    heads: int
    kv_heads: int
    size: int
    value_size: int
    rank: int = 0
    rope: int = 0
    nope: bool = True
    window: int | None = None
    sink_tokens: int = 0
    virtual: int = 0
    softcap: bool = False
    held: tuple[int, int, int] | None = None

    @property
    def held_values(self) -> int:
        """Values per token that a "held" or "traced" layer caches."""
        heads, *sizes = self.held or (0, 0, 0)
        return heads * sum(sizes)


@dataclass(frozen=True)
class Decision:
    """How one phase of one attention runs.

    Attributes:
        layer: of the cache.
        phase: "prefill" or "decode".
        kernel: the fused operator, or "matmul".
        pads: what grew, and to which size.
        reason: why this kernel, and why these pads.
        work: multiply-adds per query and key, as a multiple of what the attention itself needs.
        cached: values per token that are cached (per token of the window, for windows).
        needed: values per token that the attention itself needs.
    """

    layer: int
    phase: Phase
    kernel: str
    reason: str
    work: float
    cached: int
    needed: int
    pads: Mapping[str, int] = field(default_factory=dict)

    @property
    def fused(self) -> bool:
        """Whether the fused operator runs it."""
        return self.kernel == KERNEL

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return {**asdict(self), "pads": dict(self.pads), "work": round(self.work, 3)}


@dataclass(frozen=True)
class LayerPlan:
    """How one attention runs, and what it caches.

    Attributes:
        surveyed: the attention.
        prefill: its first call.
        decode: its calls with one token.
        heads: query heads after padding, in latent decode.
        size: of keys and values after padding: of a head, or of what latent decode reads.
        prefill_size: the same of a latent's expanded heads in prefill.
        split: whether the latent's rotary part is cached apart, as its own kernel wants.
    """

    surveyed: Surveyed
    prefill: Decision
    decode: Decision
    heads: int
    size: int
    prefill_size: int
    split: bool = False

    def caches(self, batch: int, blocks: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's buffers by name, for this batch and so many blocks per row."""
        surveyed, heads = self.surveyed, self.surveyed.kv_heads
        sizes = (self.size, self.size) if self.decode.fused else (surveyed.size, surveyed.value_size)
        if surveyed.form == "latent":
            sizes = (LATENT, ROPE) if self.split else (self.size, 0)
        elif surveyed.held is not None:
            heads, *held = surveyed.held
            sizes = (held[0], held[1])
        named = ((f"past.{surveyed.layer}.{part}", size) for part, size in zip(("key", "value"), sizes, strict=True))
        if surveyed.form == "window":
            tokens = surveyed.sink_tokens + int(surveyed.window or 0)
            return {name: (batch, heads, tokens, size) for name, size in named}
        return {name: (batch * blocks, BLOCK, heads, size) for name, size in named if size}


def legalise(surveyed: Surveyed, soc: Soc, dtype: str) -> LayerPlan:
    """Decide how an attention runs in a dtype on a chip."""
    reason = _never(surveyed, soc)
    if surveyed.form == "latent":
        return _latent(surveyed, dtype, reason)
    if surveyed.form == "traced":
        values = surveyed.held_values
        why = "its kind of attention has no lowering to this chip; its own products are traced"
        prefill = Decision(surveyed.layer, "prefill", PLAIN, why, 1.0, values, values)
        return LayerPlan(
            surveyed, prefill, replace(prefill, phase="decode"), surveyed.heads, surveyed.size, surveyed.size
        )
    size = _aligned(max(surveyed.size, surveyed.value_size))
    own = surveyed.kv_heads * (surveyed.size + surveyed.value_size)
    call = _prefill_call(surveyed, surveyed.kv_heads, size, dtype)
    reason = reason or attention_refusal(call)
    prefill = _decision(surveyed, "prefill", reason, size, 2 * size / (surveyed.size + surveyed.value_size), own, own)
    if surveyed.form == "held":
        values = surveyed.held_values
        why = "the model makes keys and values out of what is cached, so the kernel cannot read the cache"
        decode = Decision(surveyed.layer, "decode", PLAIN, why, 1.0, values, values)
        return LayerPlan(surveyed, prefill, decode, surveyed.heads, size, size)
    if surveyed.form == "window":
        columns = (1, 1, 1, surveyed.sink_tokens + int(surveyed.window or 0))
        call = replace(call, queries=1, sparse_mode=0, mask=columns)
    else:
        call = replace(call, queries=1, sparse_mode=0, mask=None, block_size=BLOCK, lengths=True)
    reason = reason or attention_refusal(call)
    cached = 2 * surveyed.kv_heads * size
    decode = _decision(surveyed, "decode", reason, size, 2 * size / (surveyed.size + surveyed.value_size), cached, own)
    return LayerPlan(surveyed, prefill, decode, surveyed.heads, size, size)


def _never(surveyed: Surveyed, soc: Soc) -> str | None:
    """Why no fused kernel can compute an attention at all."""
    if not soc.fused:
        return f"fused attention for inference is not documented for {soc.name}"
    return "the kernel has no softcap, and padding cannot make up for it" if surveyed.softcap else None


def _latent(surveyed: Surveyed, dtype: str, reason: str | None) -> LayerPlan:
    keys = surveyed.rope + (surveyed.size if surveyed.nope else 0)
    expanded = _aligned(max(keys, surveyed.value_size))
    refusal = reason or attention_refusal(_prefill_call(surveyed, surveyed.heads, expanded, dtype))
    own = surveyed.rank + surveyed.rope
    prefill = _decision(surveyed, "prefill", refusal, expanded, 2 * expanded / (keys + surveyed.value_size), own, own)
    choices = (
        [] if reason else [choice for choice in (_split(surveyed), _joined(surveyed, dtype)) if choice is not None]
    )
    if not choices:
        decode = Decision(surveyed.layer, "decode", PLAIN, reason or _too_large(surveyed), 1.0, own, own)
        return LayerPlan(surveyed, prefill, decode, surveyed.heads, own, expanded)
    # Decoding is bound by what is read: latent and rotary part once, or keys and values which are one buffer twice.
    decode, size, heads = min(choices, key=lambda choice: LATENT + ROPE if _is_split(choice[0]) else 2 * choice[1])
    return LayerPlan(surveyed, prefill, decode, heads, size, expanded, split=_is_split(decode))


def _is_split(decision: Decision) -> bool:
    return "rope" in decision.pads


def _split(surveyed: Surveyed) -> tuple[Decision, int, int] | None:
    """Latent decode by the kernel for it: 512 values and 64 rotary ones."""
    own = surveyed.rank + surveyed.rope
    heads = next((count for count in LATENT_HEADS if count >= surveyed.heads), None)
    if surveyed.window is not None or own > LATENT + ROPE or surveyed.rank > LATENT or heads is None:
        return None
    notes = [f"latent {surveyed.rank} to {LATENT}"] if surveyed.rank < LATENT else []
    notes += [f"rotary part {surveyed.rope} to {ROPE}"] if surveyed.rope < ROPE else []
    if surveyed.rope > ROPE:
        notes.append(f"{surveyed.rope - ROPE} of {surveyed.rope} rotary values lie in the latent's padding")
    notes += [f"{surveyed.heads} heads to {heads}"] if heads > surveyed.heads else []
    reason = "kernel for latent attention" + (f"; padded: {', '.join(notes)}" if notes else ", no padding")
    work = heads * (2 * LATENT + ROPE) / (surveyed.heads * (2 * surveyed.rank + surveyed.rope))
    pads = {"latent": LATENT, "rope": ROPE, "heads": heads}
    return Decision(surveyed.layer, "decode", KERNEL, reason, work, LATENT + ROPE, own, pads), LATENT, heads


def _joined(surveyed: Surveyed, dtype: str) -> tuple[Decision, int, int] | None:
    """Latent decode by the general kernel: latent and rotary part joined are key and value of all heads."""
    own = surveyed.rank + surveyed.rope
    size = _aligned(own)
    mask = None if surveyed.window is None else (1, 1, 1, BLOCK)
    call = AttentionCall(surveyed.heads, 1, 1, size, size, dtype, mask=mask, block_size=BLOCK, lengths=True)
    if attention_refusal(call):
        return None
    reason = "one key of latent and rotary part joined, shared by all heads"
    reason += f"; padded: {own} to {size}" if size > own else ""
    if surveyed.window is not None:
        reason += "; the window is a mask over the whole cache"
    work = 2 * size / (2 * surveyed.rank + surveyed.rope)
    return Decision(surveyed.layer, "decode", KERNEL, reason, work, size, own, {"size": size}), size, surveyed.heads


def _too_large(surveyed: Surveyed) -> str:
    own = surveyed.rank + surveyed.rope
    if surveyed.window is not None:
        few = f"at most {MAX_SHARING} heads"
        return f"under a window latent and rotary part may have {LATENT} values together, not {own}, and {few}"
    if surveyed.heads > LATENT_HEADS[-1]:
        return f"{surveyed.heads} heads are more than {LATENT_HEADS[-1]}"
    return f"latent {surveyed.rank} and rotary part {surveyed.rope} do not fit into {LATENT} + {ROPE} values"


def _prefill_call(surveyed: Surveyed, kv_heads: int, size: int, dtype: str) -> AttentionCall:
    mode = 3 if surveyed.window is None else 4
    return AttentionCall(surveyed.heads, kv_heads, 2, size, size, dtype, sparse_mode=mode, mask=(MASK, MASK))


def _decision(
    surveyed: Surveyed, phase: Phase, refusal: str | None, size: int, work: float, cached: int, needed: int
) -> Decision:
    """Decide for the general kernel."""
    if refusal is not None:
        return Decision(surveyed.layer, phase, PLAIN, refusal, 1.0, needed, needed)
    grown = size > min(surveyed.size, surveyed.value_size) or surveyed.form == "latent"
    reason = {"latent": "expanded keys and values", "window": "band"}.get(surveyed.form, "causal")
    if phase == "decode":
        reason = "ring of the window under a mask" if surveyed.form == "window" else "paged cache"
    reason += f"; padded: head size to {size}" if grown and work > 1 else ""
    if surveyed.virtual or (surveyed.sink_tokens and phase == "prefill"):
        reason += "; sinks enter through the logarithm of the softmax's sum"
    return Decision(surveyed.layer, phase, KERNEL, reason, work, cached, needed, {"size": size} if work > 1 else {})


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def advice(surveyed: Surveyed, soc: Soc) -> str:
    """Say which sizes keep latent attention on fused kernels, for an attention that is latent or would become so.

    >>> from attnedit.targets.runtime.npu.limits import SOCS
    >>> advice(Surveyed(0, "full", 32, 8, 128, 128), SOCS["910b"])
    'kv_lora_rank up to 512, and kv_lora_rank + qk_rope_head_dim up to 576'
    """
    if never := _never(surveyed, soc):
        return f"none: {never}"
    if surveyed.window is not None:
        few = f"kv_lora_rank + qk_rope_head_dim up to {LATENT}"
        return few if surveyed.heads <= MAX_SHARING else f"none: more than {MAX_SHARING} heads under a window"
    if surveyed.heads > LATENT_HEADS[-1]:
        return f"none: {surveyed.heads} heads are more than {LATENT_HEADS[-1]}"
    return f"kv_lora_rank up to {LATENT}, and kv_lora_rank + qk_rope_head_dim up to {LATENT + ROPE}"

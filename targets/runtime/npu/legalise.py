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
class Site:
    """What the kernels' limits are about, of one attention.

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
        site: what it is.
        prefill: its first call.
        decode: its calls with one token.
        heads: query heads after padding, in latent decode.
        size: of keys and values after padding: of a head, or of what latent decode reads.
        prefill_size: the same of a latent's expanded heads in prefill.
        split: whether the latent's rotary part is cached apart, as its own kernel wants.
    """

    site: Site
    prefill: Decision
    decode: Decision
    heads: int
    size: int
    prefill_size: int
    split: bool = False

    def caches(self, batch: int, blocks: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the layer's buffers by name, for this batch and so many blocks per row."""
        site, heads = self.site, self.site.kv_heads
        sizes = (self.size, self.size) if self.decode.fused else (site.size, site.value_size)
        if site.form == "latent":
            sizes = (LATENT, ROPE) if self.split else (self.size, 0)
        elif site.held is not None:
            heads, *held = site.held
            sizes = (held[0], held[1])
        named = ((f"past.{site.layer}.{part}", size) for part, size in zip(("key", "value"), sizes, strict=True))
        if site.form == "window":
            tokens = site.sink_tokens + int(site.window or 0)
            return {name: (batch, heads, tokens, size) for name, size in named}
        return {name: (batch * blocks, BLOCK, heads, size) for name, size in named if size}


def legalise(site: Site, soc: Soc, dtype: str) -> LayerPlan:
    """Decide how an attention runs in a dtype on a chip."""
    reason = _never(site, soc)
    if site.form == "latent":
        return _latent(site, dtype, reason)
    if site.form == "traced":
        heads, *held = site.held or (0, 0)
        why = "its kind of attention has no lowering to this chip; its own products are traced"
        prefill = Decision(site.layer, "prefill", PLAIN, why, 1.0, heads * sum(held), heads * sum(held))
        return LayerPlan(site, prefill, replace(prefill, phase="decode"), site.heads, site.size, site.size)
    size = _aligned(max(site.size, site.value_size))
    own = site.kv_heads * (site.size + site.value_size)
    reason = reason or attention_refusal(_prefill_call(site, site.kv_heads, size, dtype))
    prefill = _decision(site, "prefill", reason, size, 2 * size / (site.size + site.value_size), own, own)
    if site.form == "held":
        needed = (site.held or (0, 0, 0))[0] * sum((site.held or (0, 0, 0))[1:])
        why = "the model makes keys and values out of what is cached, so the kernel cannot read the cache"
        decode = Decision(site.layer, "decode", PLAIN, why, 1.0, needed, needed)
        return LayerPlan(site, prefill, decode, site.heads, size, size)
    call = _prefill_call(site, site.kv_heads, size, dtype)
    if site.form == "window":
        columns = (1, 1, 1, site.sink_tokens + int(site.window or 0))
        call = replace(call, queries=1, sparse_mode=0, mask=columns)
    else:
        call = replace(call, queries=1, sparse_mode=0, mask=None, block_size=BLOCK, lengths=True)
    reason = reason or attention_refusal(call)
    cached = 2 * site.kv_heads * size
    decode = _decision(site, "decode", reason, size, 2 * size / (site.size + site.value_size), cached, own)
    return LayerPlan(site, prefill, decode, site.heads, size, size)


def _never(site: Site, soc: Soc) -> str | None:
    """Why no fused kernel can compute an attention at all."""
    if not soc.fused:
        return f"fused attention for inference is not documented for {soc.name}"
    return "the kernel has no softcap, and padding cannot make up for it" if site.softcap else None


def _latent(site: Site, dtype: str, reason: str | None) -> LayerPlan:
    keys = site.rope + (site.size if site.nope else 0)
    expanded = _aligned(max(keys, site.value_size))
    refusal = reason or attention_refusal(_prefill_call(site, site.heads, expanded, dtype))
    own = site.rank + site.rope
    prefill = _decision(site, "prefill", refusal, expanded, 2 * expanded / (keys + site.value_size), own, own)
    choices = [] if reason else [choice for choice in (_split(site), _joined(site, dtype)) if choice is not None]
    if not choices:
        decode = Decision(site.layer, "decode", PLAIN, reason or _too_large(site), 1.0, own, own)
        return LayerPlan(site, prefill, decode, site.heads, own, expanded)
    # Decoding is bound by what is read: latent and rotary part once, or keys and values which are one buffer twice.
    decode, size, heads = min(choices, key=lambda choice: LATENT + ROPE if _is_split(choice[0]) else 2 * choice[1])
    return LayerPlan(site, prefill, decode, heads, size, expanded, split=_is_split(decode))


def _is_split(decision: Decision) -> bool:
    return "rope" in decision.pads


def _split(site: Site) -> tuple[Decision, int, int] | None:
    """Latent decode by the kernel for it: 512 values and 64 rotary ones."""
    own = site.rank + site.rope
    heads = next((count for count in LATENT_HEADS if count >= site.heads), None)
    if site.window is not None or own > LATENT + ROPE or site.rank > LATENT or heads is None:
        return None
    notes = [f"latent {site.rank} to {LATENT}"] if site.rank < LATENT else []
    notes += [f"rotary part {site.rope} to {ROPE}"] if site.rope < ROPE else []
    if site.rope > ROPE:
        notes.append(f"{site.rope - ROPE} of {site.rope} rotary values lie in the latent's padding")
    notes += [f"{site.heads} heads to {heads}"] if heads > site.heads else []
    reason = "kernel for latent attention" + (f"; padded: {', '.join(notes)}" if notes else ", no padding")
    work = heads * (2 * LATENT + ROPE) / (site.heads * (2 * site.rank + site.rope))
    pads = {"latent": LATENT, "rope": ROPE, "heads": heads}
    return Decision(site.layer, "decode", KERNEL, reason, work, LATENT + ROPE, own, pads), LATENT, heads


def _joined(site: Site, dtype: str) -> tuple[Decision, int, int] | None:
    """Latent decode by the general kernel: latent and rotary part joined are key and value of all heads."""
    own = site.rank + site.rope
    size = _aligned(own)
    mask = None if site.window is None else (1, 1, 1, BLOCK)
    call = AttentionCall(site.heads, 1, 1, size, size, dtype, mask=mask, block_size=BLOCK, lengths=True)
    if attention_refusal(call):
        return None
    reason = "one key of latent and rotary part joined, shared by all heads"
    reason += f"; padded: {own} to {size}" if size > own else ""
    if site.window is not None:
        reason += "; the window is a mask over the whole cache"
    work = 2 * size / (2 * site.rank + site.rope)
    return Decision(site.layer, "decode", KERNEL, reason, work, size, own, {"size": size}), size, site.heads


def _too_large(site: Site) -> str:
    own = site.rank + site.rope
    if site.window is not None:
        few = f"at most {MAX_SHARING} heads"
        return f"under a window latent and rotary part may have {LATENT} values together, not {own}, and {few}"
    if site.heads > LATENT_HEADS[-1]:
        return f"{site.heads} heads are more than {LATENT_HEADS[-1]}"
    return f"latent {site.rank} and rotary part {site.rope} do not fit into {LATENT} + {ROPE} values"


def _prefill_call(site: Site, kv_heads: int, size: int, dtype: str) -> AttentionCall:
    mode = 3 if site.window is None else 4
    return AttentionCall(site.heads, kv_heads, 2, size, size, dtype, sparse_mode=mode, mask=(MASK, MASK))


def _decision(
    site: Site, phase: Phase, refusal: str | None, size: int, work: float, cached: int, needed: int
) -> Decision:
    """Decide for the general kernel."""
    if refusal is not None:
        return Decision(site.layer, phase, PLAIN, refusal, 1.0, needed, needed)
    grown = size > min(site.size, site.value_size) or site.form == "latent"
    reason = {"latent": "expanded keys and values", "window": "band"}.get(site.form, "causal")
    if phase == "decode":
        reason = "ring of the window under a mask" if site.form == "window" else "paged cache"
    reason += f"; padded: head size to {size}" if grown and work > 1 else ""
    if site.virtual or (site.sink_tokens and phase == "prefill"):
        reason += "; sinks enter through the logarithm of the softmax's sum"
    return Decision(site.layer, phase, KERNEL, reason, work, cached, needed, {"size": size} if work > 1 else {})


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def advice(site: Site, soc: Soc) -> str:
    """Say which sizes keep latent attention on fused kernels, for a site that is latent or would become so.

    >>> from attnedit.targets.runtime.npu.limits import SOCS
    >>> advice(Site(0, "full", 32, 8, 128, 128), SOCS["910b"])
    'kv_lora_rank up to 512, and kv_lora_rank + qk_rope_head_dim up to 576'
    """
    if never := _never(site, soc):
        return f"none: {never}"
    if site.window is not None:
        few = f"kv_lora_rank + qk_rope_head_dim up to {LATENT}"
        return few if site.heads <= MAX_SHARING else f"none: more than {MAX_SHARING} heads under a window"
    if site.heads > LATENT_HEADS[-1]:
        return f"none: {site.heads} heads are more than {LATENT_HEADS[-1]}"
    return f"kv_lora_rank up to {LATENT}, and kv_lora_rank + qk_rope_head_dim up to {LATENT + ROPE}"

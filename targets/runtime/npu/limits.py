"""What Ascend's kernels accept, by system on chip: one table for the legaliser and for the references.

Source: the operator documentation in torch_npu 2.13.0 (``torch_npu/_op_plugin_docs.py``). Nothing here was measured on
hardware.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

LATENT = 512
"""Size of the latent that the kernel for latent attention reads; it is key and value."""

ROPE = 64
"""Size of the rotary part beside it."""

LATENT_HEADS = (1, 2, 4, 8, 16, 32, 64, 128)
LATENT_QUERIES = 16
LATENT_BLOCKS = (16, 128)

ALIGNMENT = 16
"""Head sizes are multiples of it, for half-precision inputs."""

MAX_SIZE = 512
MAX_HEADS = 256
MAX_SHARING = 64
"""Query heads per key/value head."""

MAX_ROW = 65535
"""Values of all heads of one token in a paged cache of layout [blocks, block, heads * size]."""

MASK = 2048
"""Side of the triangle that stands for causal and banded masks of any length."""

BLOCK = 128
"""Tokens per page of a cache: the one size that every kernel accepts."""

DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Soc:
    """A system on chip.

    Attributes:
        name: what ``--soc`` calls it.
        title: products that have it.
        dtypes: that matrix products take, best first.
        fused: whether the fused operators that we emit are documented for it.
    """

    name: str
    title: str
    dtypes: tuple[str, ...]
    fused: bool


SOCS = {
    soc.name: soc
    for soc in (
        Soc("910b", "Atlas A2 training and 800I A2 inference (Ascend 910B)", DTYPES, True),
        Soc("910_93", "Atlas A3 training and inference (Ascend 910_93)", DTYPES, True),
        Soc("310p", "Atlas inference (Ascend 310P)", ("float16",), False),
    )
}


@dataclass(frozen=True)
class AttentionCall:
    """What matters of a call of ``npu_fused_infer_attention_score_v2`` in layout BNSD.

    Attributes:
        heads: query heads.
        kv_heads: key/value heads.
        queries: new tokens per row.
        size: of queries and keys.
        value_size: of values.
        dtype: name of the dtype of all three.
        rope: size of the rotary part; None without.
        sparse_mode: 0: the mask as given; 3: causal; 4: a band.
        mask: shape of the mask; None without.
        block_size: tokens per page; 0 where the cache is not paged.
        lengths: whether the number of keys of each row is given.
    """

    heads: int
    kv_heads: int
    queries: int
    size: int
    value_size: int
    dtype: str
    rope: int | None = None
    sparse_mode: int = 0
    mask: Sequence[int] | None = None
    block_size: int = 0
    lengths: bool = False


def attention_refusal(call: AttentionCall) -> str | None:
    """Say why the kernel would not take a call; None where it would."""
    if call.dtype not in DTYPES:
        return f"dtype {call.dtype} is neither {' nor '.join(DTYPES)}"
    if call.size != call.value_size:
        return f"keys of {call.size} and values of {call.value_size} must have one shape"
    if call.heads % call.kv_heads:
        return f"{call.heads} heads cannot share {call.kv_heads} key/value heads"
    if call.block_size and not call.lengths:
        return "a paged cache needs the lengths of its rows"
    return _generic_refusal(call) if call.rope is None else _latent_refusal(call)


def _latent_refusal(call: AttentionCall) -> str | None:
    if call.size != LATENT or call.rope != ROPE:
        return f"latent of {call.size} and rotary part of {call.rope} must be {LATENT} and {ROPE}"
    if call.kv_heads != 1 or call.heads not in LATENT_HEADS:
        return f"{call.heads} heads over {call.kv_heads} are none of {', '.join(map(str, LATENT_HEADS))} over 1"
    if not 1 <= call.queries <= LATENT_QUERIES:
        return f"{call.queries} new tokens per row are more than {LATENT_QUERIES}"
    if call.block_size not in LATENT_BLOCKS:
        return f"the cache must be paged, in blocks of {' or '.join(map(str, LATENT_BLOCKS))}"
    if call.queries == 1 and (call.sparse_mode != 0 or call.mask is not None):
        return "one new token takes no mask"
    if call.queries > 1 and (call.sparse_mode != 3 or call.mask is None):
        return "several new tokens take the causal mask alone"
    return None


def _generic_refusal(call: AttentionCall) -> str | None:
    if call.heads > MAX_HEADS:
        return f"{call.heads} heads are more than {MAX_HEADS}"
    if call.heads // call.kv_heads > MAX_SHARING:
        return f"{call.heads} heads over {call.kv_heads} share a key more than {MAX_SHARING} times"
    if call.size > MAX_SIZE or call.size % ALIGNMENT:
        return f"head size {call.size} is no multiple of {ALIGNMENT} up to {MAX_SIZE}"
    if call.block_size:
        step, least = (128, 128) if call.queries > 1 else (ALIGNMENT, ALIGNMENT)
        if call.block_size % step or not least <= call.block_size <= 512:
            return f"blocks of {call.block_size} tokens are no multiple of {step} up to 512"
        if call.kv_heads * call.size > MAX_ROW:
            return f"{call.kv_heads} x {call.size} cached values per token are more than {MAX_ROW}"
    # A single query ignores the sparse mode: its mask is read as it stands.
    sparse = call.sparse_mode if call.queries > 1 else 0
    if sparse not in (0, 1, 2, 3, 4):
        return f"sparse_mode {sparse} is none of 0, 1, 2, 3, 4"
    if sparse >= 2 and (call.mask is None or tuple(call.mask)[-2:] != (MASK, MASK)):
        return f"sparse_mode {sparse} needs a mask of [{MASK}, {MASK}]"
    if sparse == 1 and call.mask is None:
        return "sparse_mode 1 needs a mask"
    return None


def grouped_matmul_refusal(size: int, out: int) -> str | None:
    """Say why ``npu_grouped_matmul`` would not multiply [.., size] with [size, out]."""
    wide = max(size, out)
    return f"rows of {wide} values are not below 65536" if wide >= 65536 else None

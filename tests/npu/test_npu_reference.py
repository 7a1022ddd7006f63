"""Operators for Ascend: stored schemas, and references against independent formulas, quirks and limits."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compiled import source
from torch import Tensor

from attnedit.compiler.errors import AttneditError, UsageError
from attnedit.compiler.graph.anchor import experts_implementation
from attnedit.targets.runtime.npu.experts import EXPERTS
from attnedit.targets.runtime.npu.reference import REFERENCES, register
from attnedit.targets.runtime.npu.reference_attention import float32_allowed
from attnedit.targets.runtime.npu.schema import FILE, check_live, read_yaml, schemas, torch_npu_version

register()
ops = torch.ops.npu
TRIANGLE = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def visible(length: int, keys: int, window: int | None = None) -> Tensor:
    behind = torch.arange(keys - length, keys)[:, None] - torch.arange(keys)
    return (behind >= 0) & (behind < (window or keys))


def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    names = {"num_query_heads": query.shape[1], "input_layout": "BNSD", "softmax_scale": 0.3}
    with float32_allowed():
        out, lse = ops.npu_fused_infer_attention_score_v2(query, key, value, **{**names, **options})
    return out, lse


def expected(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=mask, scale=0.3, enable_gqa=True
    ).float()


def test_every_operator_has_a_schema_and_a_reference() -> None:
    assert set(schemas()) == set(REFERENCES)
    assert torch_npu_version() == "2.13.0"
    assert check_live() == []
    assert register() == tuple(sorted(REFERENCES))  # torch_npu is not here


def test_schemas_are_read_from_the_functions_of_torch_npu() -> None:
    stored = json.loads(FILE.read_text())["schemas"]
    text = "\n".join(f"  - func: {line.replace('Tensor input', 'Tensor self', 1)}" for line in stored.values())
    assert read_yaml("custom:\n" + text + "\n  - func: npu_swiglu.out(Tensor self) -> Tensor") == stored
    with pytest.raises(UsageError, match="no function npu_add_rms_norm"):
        read_yaml("custom:\n")


@pytest.mark.parametrize("window", [None, 1, 3, 20])
def test_a_prompt_is_causal_or_a_band(window: int | None) -> None:
    query, key, value = random(2, 4, 9, 16), random(2, 2, 9, 16, seed=1), random(2, 2, 9, 16, seed=2)
    band = {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tokens": window - 1, "next_tokens": 0}
    out, lse = attend(query, key, value, num_key_value_heads=2, atten_mask=TRIANGLE, return_softmax_lse=True, **band)
    torch.testing.assert_close(out, expected(query, key, value, visible(9, 9, window)), atol=1e-5, rtol=1e-5)
    logits = (query @ key.repeat_interleave(2, 1).transpose(-1, -2) * 0.3).masked_fill(
        ~visible(9, 9, window), -torch.inf
    )
    torch.testing.assert_close(lse, logits.logsumexp(-1, keepdim=True), atol=1e-5, rtol=1e-5)


def test_a_single_query_ignores_the_sparse_mode() -> None:
    query, key = random(1, 2, 1, 16), random(1, 2, 9, 16, seed=1)
    out, _ = attend(query, key, key, sparse_mode=4, pre_tokens=2, next_tokens=0)
    torch.testing.assert_close(out, expected(query, key, key, None), atol=1e-5, rtol=1e-5)


def test_a_paged_cache_is_read_through_its_table() -> None:
    pages = random(5, 16, 2 * 16)
    table = torch.tensor([[3, 1], [0, 4]], dtype=torch.int32)
    query, lengths = random(2, 4, 1, 16, seed=1), [20, 3]
    for row, blocks in enumerate(table):
        pages[blocks.long()].view(-1, 32)[lengths[row] :] = torch.nan  # a copy: the pages stay as they are
    options = {"block_table": table, "block_size": 16, "actual_seq_kvlen": lengths, "num_key_value_heads": 2}
    out, _ = attend(query, pages, pages, **options)
    for row, count in enumerate(lengths):
        keys = pages[table[row].long()].view(1, -1, 2, 16).transpose(1, 2)[:, :, :count]
        want = expected(query[row : row + 1], keys, keys, None)
        torch.testing.assert_close(out[row : row + 1], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("length", [1, 3])
def test_latent_attention_reads_latent_and_rotary_part(length: int) -> None:
    latent, rope = random(2, 16, 512), random(2, 16, 64, seed=1)
    query, turned = random(1, 4, length, 512, seed=2), random(1, 4, length, 64, seed=3)
    masked = {} if length == 1 else {"sparse_mode": 3, "atten_mask": TRIANGLE}
    out, _ = attend(
        query,
        latent,
        latent,
        query_rope=turned,
        key_rope=rope,
        num_key_value_heads=1,
        block_table=torch.tensor([[1, 0]], dtype=torch.int32),
        block_size=16,
        actual_seq_kvlen=[21],
        **masked,
    )
    order = [1, 0]
    keys = torch.cat((latent, rope), -1)[order].reshape(1, 1, 32, 576)[:, :, :21]
    want = expected(torch.cat((query, turned), -1), keys, keys[..., :512], visible(length, 21))
    torch.testing.assert_close(out, want, atol=1e-4, rtol=1e-4)


def _call(**changes: Any) -> None:
    """A call that the kernel takes, but for the changes."""
    heads, groups, length, size = (
        changes.pop(name, default) for name, default in (("heads", 4), ("groups", 2), ("length", 4), ("size", 16))
    )
    query = random(1, heads, length, size).to(changes.pop("dtype", torch.bfloat16))
    key = random(1, groups, 4, size).to(query.dtype)
    options = {"num_query_heads": heads, "num_key_value_heads": groups, "input_layout": "BNSD"}
    ops.npu_fused_infer_attention_score_v2(query, key, key, **{**options, **changes})


PAGES: dict[str, Any] = {"block_table": torch.zeros(1, 1, dtype=torch.int32), "actual_seq_kvlen": [2]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float32}, "float32 is neither bfloat16 nor float16"),
        ({"size": 24}, "no multiple of 16"),
        ({"size": 528}, "up to 512"),
        ({"heads": 130, "groups": 2}, "more than 64 times"),
        ({"heads": 257, "groups": 257}, "more than 256"),
        ({"sparse_mode": 3}, r"needs a mask of \[2048, 2048\]"),
        ({"sparse_mode": 4, "atten_mask": torch.zeros(4, 4, dtype=torch.bool)}, "needs a mask"),
        ({"sparse_mode": 5}, "none of 0, 1, 2, 3, 4"),
        ({"input_layout": "TND"}, "does not know layout TND"),
        ({"pse_shift": torch.zeros(1)}, "does not know pse_shift"),
        ({"length": 1, "block_size": 24, **PAGES}, "no multiple of 16"),
        ({"block_size": 16, **PAGES}, "no multiple of 128"),
        ({"length": 1, "block_size": 16, "block_table": PAGES["block_table"]}, "needs the lengths"),
    ],
)
def test_what_the_kernel_refuses_is_refused(changes: dict[str, Any], words: str) -> None:
    _call()
    with pytest.raises(AttneditError, match=words):
        _call(**changes)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"rank": 256}, "must be 512 and 64"),
        ({"rope": 32}, "must be 512 and 64"),
        ({"heads": 6}, "6 heads over 1 are none of"),
        ({"block": 32}, "in blocks of 16 or 128"),
        ({"length": 17}, "more than 16"),
        ({"mask": TRIANGLE}, "takes no mask"),
        ({"length": 2}, "take the causal mask"),
    ],
)
def test_what_the_latent_kernel_refuses_is_refused(sizes: dict[str, Any], words: str) -> None:
    def call(
        rank: int = 512, rope: int = 64, heads: int = 4, block: int = 16, length: int = 1, mask: Any = None
    ) -> None:
        latent = random(2, block, rank).half()
        ops.npu_fused_infer_attention_score_v2(
            random(1, heads, length, rank).half(),
            latent,
            latent,
            query_rope=random(1, heads, length, rope).half(),
            key_rope=random(2, block, rope).half(),
            num_query_heads=heads,
            num_key_value_heads=1,
            input_layout="BNSD",
            atten_mask=mask,
            block_size=block,
            block_table=torch.zeros(1, 2, dtype=torch.int32),
            actual_seq_kvlen=[20],
        )

    call()
    with pytest.raises(AttneditError, match=words):
        call(**sizes)


def test_norms() -> None:
    x, more, weight = random(2, 3, 8), random(2, 3, 8, seed=1), random(8, seed=2)
    plain, inverse = ops.npu_rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(plain, F.rms_norm(x, (8,), weight, 1e-5))
    torch.testing.assert_close(inverse, (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt())
    torch.testing.assert_close(ops.npu_gemma_rms_norm(x, weight, 1e-5)[0], F.rms_norm(x, (8,), 1 + weight, 1e-5))
    normed, _, total = ops.npu_add_rms_norm(x, more, weight, 1e-5)
    torch.testing.assert_close(normed, F.rms_norm(x + more, (8,), weight, 1e-5))
    torch.testing.assert_close(total, x + more)
    with pytest.raises(AttneditError, match="gamma"):
        ops.npu_rms_norm(x, weight.half())


def test_rotation_and_swiglu() -> None:
    x, angle = random(2, 3, 5, 8), random(2, 1, 5, 4, seed=1)
    turned = torch.view_as_complex(torch.stack(x.chunk(2, -1), -1)) * torch.exp(1j * angle)
    cos, sin = (torch.cat((table, table), -1) for table in (angle.cos(), angle.sin()))
    torch.testing.assert_close(ops.npu_rotary_mul(x, cos, sin), torch.cat((turned.real, turned.imag), -1))
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * torch.exp(1j * angle)
    cos, sin = (table.repeat_interleave(2, -1) for table in (angle.cos(), angle.sin()))
    out = ops.npu_rotary_mul(x, cos, sin, "interleave")
    torch.testing.assert_close(out, torch.view_as_real(pairs).flatten(-2))
    torch.testing.assert_close(ops.npu_swiglu(x), F.silu(x[..., :4]) * x[..., 4:])


def test_writing_into_caches() -> None:
    key, value, slots = random(3, 2, 4), random(3, 2, 6, seed=1), torch.tensor([5, 0, 9], dtype=torch.int32)
    keys, values = torch.zeros(3, 4, 2, 4), torch.zeros(3, 4, 2, 6)
    ops.npu_scatter_pa_kv_cache(key, value, keys, values, slots, cache_mode="Norm")
    assert torch.equal(keys.view(12, 2, 4)[slots.long()], key)
    assert torch.equal(values.view(12, 2, 6)[slots.long()], value)
    assert int((keys != 0).any(-1).any(-1).sum()) == 3
    with pytest.raises(AttneditError, match="PA_NZ"):
        ops.npu_scatter_pa_kv_cache(key, value, keys, values, slots)
    ring, new = torch.zeros(2, 1, 4, 3), random(2, 1, 1, 3)
    assert ops.scatter_update_(ring, torch.tensor([3, 1]), new, -2) is ring
    assert torch.equal(ring[0, :, 3:], new[0])
    assert torch.equal(ring[1, :, 1:2], new[1])
    assert int((ring != 0).any(-1).sum()) == 2
    flat = torch.zeros(6, 1, 4)
    ops.npu_scatter_nd_update_(flat, slots[:2, None], key[:2, :1])
    assert torch.equal(flat[[5, 0]], key[:2, :1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_are_those_of_transformers(family: str) -> None:
    model = source(family)
    module: Any = next(module for module in model.modules() if hasattr(module, "gate_up_proj"))
    tokens = random(7, 32)
    weights, chosen = random(7, 4, seed=1).softmax(-1).topk(2, -1)
    with torch.no_grad(), experts_implementation(model, "eager"):
        want = module(tokens, chosen, weights)
    with torch.no_grad(), experts_implementation(model, EXPERTS):
        found = module(tokens, chosen, weights)
    torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-5)


def test_gating() -> None:
    logits = random(5, 8)
    weights, chosen, place = ops.npu_moe_gating_top_k_softmax(logits, None, 3)
    want, index = logits.softmax(-1).topk(3, -1)
    torch.testing.assert_close(weights, want)
    assert torch.equal(chosen, index.int())
    assert torch.equal(place.T.flatten(), torch.arange(15, dtype=torch.int32))


def test_training_attention_has_gradients() -> None:
    query, key, value = (random(2, heads, 6, 8, seed=heads).requires_grad_() for heads in (4, 2, 2))
    hidden = ~visible(6, 6, 3)
    out = ops.npu_fusion_attention(query, key, value, 4, "BNSD", atten_mask=hidden, scale=0.3, sparse_mode=1)[0]
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=~hidden, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, want)
    found = torch.autograd.grad(out.square().sum(), (query, key, value))
    for a, b in zip(found, torch.autograd.grad(want.square().sum(), (query, key, value)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(AttneditError, match="sizes"):
        ops.npu_fusion_attention(query[..., :4], key, value, 4, "BNSD")

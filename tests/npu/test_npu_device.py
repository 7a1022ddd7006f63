"""On an Ascend NPU (``make test-npu-device``): operators against the references, and exported programs against eager.

None of these has run yet: no machine of ours has such a card.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from npu_models import BATCH, model
from torch import Tensor

pytestmark = pytest.mark.npu

DEVICE = "npu:0"
KINDS = ["full", "joined", "split", "window", "composition", "experts", "sinks"]


@pytest.fixture(scope="module", autouse=True)
def torch_npu() -> Any:
    return importlib.import_module("torch_npu")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).half()


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(found.cpu().float(), want.float(), atol=2e-2, rtol=2e-2)


def test_schemas() -> None:
    from attnedit.targets.runtime.npu.schema import check_live

    assert check_live() == []


@pytest.mark.parametrize("window", [4, 128])
def test_a_band_of_window_minus_one_is_the_window(window: int) -> None:
    from attnedit.targets.runtime.npu.reference_attention import infer

    query, key = random(1, 4, 300, 64), random(1, 2, 300, 64, seed=1)
    options: dict[str, Any] = {
        "num_query_heads": 4,
        "num_key_value_heads": 2,
        "input_layout": "BNSD",
        "softmax_scale": 0.125,
        "sparse_mode": 4,
        "pre_tokens": window - 1,
        "next_tokens": 0,
        "return_softmax_lse": True,
    }
    triangle = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
    want = infer(query, key, key, atten_mask=triangle, **options)
    moved = (x.to(DEVICE) for x in (query, key, key))
    found = torch.ops.npu.npu_fused_infer_attention_score_v2(*moved, atten_mask=triangle.to(DEVICE), **options)
    for a, b in zip(found, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("size", [64, 160, 288, 512])
def test_one_key_for_all_heads(size: int) -> None:
    from attnedit.targets.runtime.npu.reference_attention import infer

    pages, query = random(6, 128, size), random(2, 32, 1, size, seed=1)
    options: dict[str, Any] = {
        "num_query_heads": 32,
        "num_key_value_heads": 1,
        "input_layout": "BNSD",
        "softmax_scale": size**-0.5,
        "block_size": 128,
        "actual_seq_kvlen": [200, 3],
    }
    table = torch.tensor([[5, 2, 0], [1, 3, 4]], dtype=torch.int32)
    want, _ = infer(query, pages, pages, block_table=table, **options)
    moved = (x.to(DEVICE) for x in (query, pages, pages))
    found, _ = torch.ops.npu.npu_fused_infer_attention_score_v2(*moved, block_table=table.to(DEVICE), **options)
    close(found, want)


def test_routing_and_combining_number_rows_alike() -> None:
    from attnedit.targets.runtime.npu.reference_experts import combine, route

    tokens, chosen = random(9, 64), torch.randint(0, 8, (9, 2), generator=torch.Generator().manual_seed(1)).int()
    options: dict[str, Any] = {
        "expert_num": 8,
        "active_expert_range": [0, 8],
        "expert_tokens_num_type": 1,
        "expert_tokens_num_flag": True,
    }
    want = route(tokens, chosen, **options)
    found = torch.ops.npu.npu_moe_init_routing_v2(tokens.to(DEVICE), chosen.to(DEVICE), **options)
    for a, b in zip(found[:3], want[:3], strict=True):
        close(a, b)
    places, weights = want[1].view(9, 2).t().flatten(), random(9, 2, seed=2)
    rest = (None, None, None, weights, places, None)
    moved = [x if x is None else x.to(DEVICE) for x in rest]
    close(torch.ops.npu.npu_moe_finalize_routing(found[0], *moved), combine(want[0], *rest))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_programs(kind: str, compiled: bool) -> None:
    from attnedit.targets.runtime.check import check_model, root_mean_square
    from attnedit.targets.runtime.eager import share_copy
    from attnedit.targets.runtime.npu import NpuModel

    folder = _exported(kind)
    lowered = NpuModel.load(folder, DEVICE)
    if compiled:
        torchair = importlib.import_module("torchair")
        lowered = lowered.compiled(torchair.get_npu_backend(compiler_config=torchair.CompilerConfig()))
    half = share_copy(model(kind)).to(torch.bfloat16)
    plan = [(BATCH, 0, (5, 1, 1)), (BATCH, 2, (12, 1, 1, 1))]
    check_model(half, lowered, 0.25, plan, measure=root_mean_square)


def _exported(kind: str) -> Path:
    """Export in another process: here the real operators have no CPU implementation to check with."""
    code = "import sys, npu_models; print(npu_models.exported(sys.argv[1])[0])"
    environment = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "PYTHONPATH": str(Path(__file__).parents[1] / "support")}
    done = subprocess.run(
        [sys.executable, "-c", code, kind], check=True, capture_output=True, text=True, env=environment
    )
    return Path(done.stdout.splitlines()[-1])


def test_training_attention() -> None:
    query, key = (random(2, heads, 40, 64, seed=heads).float().to(DEVICE).requires_grad_() for heads in (4, 2))
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    from attnedit.targets.runtime.npu.reference_attention import train

    options: dict[str, Any] = {"scale": 0.125, "sparse_mode": 1}
    found = torch.ops.npu.npu_fusion_attention(query, key, key, 4, "BNSD", atten_mask=hidden.to(DEVICE), **options)[0]
    plain = [x.detach().cpu().requires_grad_() for x in (query, key)]
    want = train(plain[0], plain[1], plain[1], 4, "BNSD", atten_mask=hidden, **options)[0]
    close(found.detach(), want.detach())
    for a, b in zip(
        torch.autograd.grad(found.sum(), (query, key)), torch.autograd.grad(want.sum(), plain), strict=True
    ):
        close(a, b)

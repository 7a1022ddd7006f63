"""The real torch_npu, without a card: its schemas, its shape functions, and the graphs that torchair builds.

``make test-npu`` runs these: they need an environment with torch_npu, which would break ``import torch`` in this one.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from npu_models import BATCH, exported

from attnedit.targets.runtime.npu import NpuModel

pytestmark = pytest.mark.torch_npu
HERE = Path(__file__).parent

FUSED = {
    "npu_add_rms_norm": "AddRmsNorm",
    "npu_fused_infer_attention_score_v2": "FusedInferAttentionScore",
    "npu_grouped_matmul": "GroupedMatmul",
    "npu_moe_finalize_routing": "MoeFinalizeRoutingV2",
    "npu_moe_gating_top_k_softmax": "MoeGatingTopKSoftmax",
    "npu_moe_init_routing_v2": "MoeInitRoutingV3",
    "npu_rms_norm": "RmsNorm",
    "npu_rotary_mul": "RotaryMul",
    "npu_scatter_nd_update_": "ScatterNdUpdate",
    "npu_scatter_pa_kv_cache": "ScatterPaKvCache",
    "npu_swiglu": "SwiGlu",
    "scatter_update_": "Scatter",
}
"""What torchair calls the operators."""


@pytest.fixture(scope="session")
def stub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cann")
    subprocess.run([_python(), str(HERE / "cann_stub.py"), str(folder)], check=True, capture_output=True)
    return folder


def _python() -> str:
    found = os.environ.get("ATTNEDIT_NPU_PYTHON")
    if found is None:
        pytest.fail("ATTNEDIT_NPU_PYTHON names no python with torch_npu; run: make test-npu")
    return found


def live(stub: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    own = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "LD_LIBRARY_PATH": str(stub)}
    command = [_python(), str(HERE / "live.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **own}, timeout=600)


def answer(stub: Path, *arguments: object) -> dict[str, Any]:
    done = live(stub, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def test_stored_schemas_are_the_registered_ones(stub: Path, tmp_path: Path) -> None:
    found = answer(stub, "schemas", tmp_path)
    assert found == {"version": "2.13.0", "problems": [], "ours": [], "real": 14}


@pytest.mark.parametrize("kind", ["full", "joined", "split", "window", "composition", "experts", "sinks", "held"])
def test_shapes_are_those_of_torch_npu(kind: str, stub: Path) -> None:
    folder, _ = exported(kind)
    found = answer(stub, "shapes", folder)
    assert found["differ"] == []
    assert found["compared"] > 100
    assert found["logits"]["prefill"][:2] == found["logits"]["decode"][:2] == [BATCH, 1]


def test_an_export_can_be_checked_where_torch_npu_is(stub: Path) -> None:
    folder, _ = exported("split")
    found = answer(stub, "values", folder)["logits"]
    state = NpuModel.load(folder).decoding()
    ids = torch.arange(3 * 7).view(3, 7) % 50
    want = [state.feed(ids, torch.ones_like(ids)), state.feed(ids[:, :2], torch.ones_like(ids[:, :2]))]
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(torch.tensor(a), torch.from_numpy(b))


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("kind", ["full", "joined", "split", "window", "experts"])
def test_torchair_builds_the_graph(kind: str, phase: str, stub: Path, tmp_path: Path) -> None:
    folder, manifest = exported(kind)
    done = live(stub, "graph", folder, phase, tmp_path)  # ends with a crash in the stand-in, after the graph is written
    written = tmp_path / "dynamo.pbtxt"
    assert written.exists(), done.stderr[-2000:]
    found = Counter(re.findall(r'^\s+op: "(\w+)"$', written.read_text(), flags=re.MULTILINE))
    for name, count in manifest.operators[phase].items():
        assert found[FUSED[name]] == count, (name, found)
    assert found["RefData"] == len(manifest.caches)  # written in place
    if kind in ("full", "joined", "split"):
        # Ids, lengths, block table and, as numbers that stay inputs, the lengths again.
        assert found["Data"] == (4 if phase == "decode" else 3)

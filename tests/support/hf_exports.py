"""Results written for transformers, and what loads them: shared by the tests of these exports."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from compiled import MODULE, _remembered, tokens
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel

import attnedit
from attnedit.targets.runtime.hf import export

IDS = tokens(2, 24)
needs_lfm3 = pytest.mark.skipif("lfm3" not in CONFIG_MAPPING, reason="transformers has it from 5.18 on")

ALONE = """
import json, sys
sys.modules["attnedit"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM
directory, out, remote = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=remote == "remote").eval()
ids = torch.load(out + ".ids")
with torch.inference_mode():
    torch.save(model(ids, use_cache=False).logits, out)
    text = model.generate(ids[:1, :6], max_new_tokens=12, min_new_tokens=12, do_sample=False)
print(json.dumps({"class": type(model).__name__, "text": text[0].tolist()}))
assert not any(name.split(".")[0] == "attnedit" for name in sys.modules if sys.modules[name] is not None)
"""


def windowed(model: PreTrainedModel, target: str = "gateswa", **options: Any) -> PreTrainedModel:
    form = {"window": 6, "sinks": "none", "full_layers": 1, **options}
    with mock.patch.object(MODULE, "capture", _remembered):
        return attnedit.compile(model, target, calibration=tokens(4, 32), **form).model


def written(model: PreTrainedModel, directory: Path, profile: str, **options: Any) -> Any:
    return export(SimpleNamespace(model=model, tokenizer=None), directory, profile=profile, **options)


def gated(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose gates have learned something."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        if "g_proj" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


def alone(directory: Path, tmp_path: Path, profile: str) -> tuple[Tensor, dict[str, Any]]:
    """Logits and greedy text of a directory, from a process without attnedit."""
    out = tmp_path / "logits"
    torch.save(IDS, f"{out}.ids")
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ALONE, str(directory), str(out), profile],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "", **environment},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(out), json.loads(done.stdout.splitlines()[-1])


def greedy(model: PreTrainedModel) -> list[int]:
    generate: Any = model.generate
    found: list[int] = generate(IDS[:1, :6], max_new_tokens=12, min_new_tokens=12, do_sample=False)[0].tolist()
    return found

"""Results among other people's tools: adapters, device maps, quantised weights, evaluation.

The tools come with the extra `ecosystem`, which `make test-long` installs.
"""

from __future__ import annotations

import functools
import json
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from commands import save as save_with_tokenizer
from compiled import MODULE, _remembered, compile_tiny, deviation, logits, tokens
from families import build
from tiny_llama import make_llama
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import attnedit

pytestmark = pytest.mark.long
IDS = tokens(2, 24)


WIDE = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 8}
"""Kernels of four bits want blocks of 64 weights in every row."""


@functools.cache
def latent() -> PreTrainedModel:
    return compile_tiny(build("qwen3", **WIDE), 1.0).model


@functools.cache
def windowed() -> PreTrainedModel:
    with mock.patch.object(MODULE, "capture", _remembered):
        form = {"window": 6, "gate": "head", "full_layers": 1}
        return attnedit.compile(build("qwen3", **WIDE), "gateswa", calibration=tokens(4, 32), **form).model


KINDS = pytest.mark.parametrize(
    ("make", "target"),
    [(latent, ["q_proj", "kv_a_proj_with_mqa"]), (windowed, ["q_proj", "g_proj"])],
    ids=["mla", "swa"],
)


def copied(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """A model of its own, as a user has it: saved, and loaded again."""
    model.save_pretrained(directory)
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(directory)
    return loaded.eval()


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft asks for it by its old name
@KINDS
def test_lora_trains_on_a_result_and_merges(make: Any, target: list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = copied(make(), tmp_path / "model")
    before = logits(model, IDS)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=target, task_type="CAUSAL_LM")
    adapted: Any = get_peft_model(model, config)
    optimiser = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = adapted(IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    adapted.eval()
    trained = logits(adapted, IDS)
    assert deviation(trained, before) > 1e-2
    adapted.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), tmp_path / "adapter")
    assert deviation(logits(again.eval(), IDS), trained) < 1e-6
    merged: Any = adapted.merge_and_unload()
    assert deviation(logits(merged, IDS), trained) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert deviation(logits(whole, IDS), logits(merged, IDS)) == 0
    assert whole.generate(IDS[:1, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


@KINDS
def test_device_maps_put_layers_on_the_disk(make: Any, target: list[str], tmp_path: Path) -> None:
    model = copied(make(), tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    options = {"device_map": places, "offload_folder": tmp_path / "offload"}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert all(parameter.is_meta for parameter in spread.model.layers[1].self_attn.parameters())
    assert deviation(logits(spread, IDS), logits(model, IDS)) < 1e-6
    greedy = {"max_new_tokens": 6, "do_sample": False}
    assert torch.equal(spread.generate(IDS[:, :8], **greedy), model.generate(IDS[:, :8], **greedy))  # type: ignore[operator]


@KINDS
def test_torchao_quantises_the_weights_of_a_result(make: Any, target: list[str], tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tool's own imports
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

    model = copied(make(), tmp_path / "model")
    before = logits(model, IDS)
    bytes_before = model.get_memory_footprint()
    quantize_(model, Int8WeightOnlyConfig())
    found = logits(model, IDS)
    assert 1e-5 < deviation(found, before) < 0.1
    quantised = [
        n for n, m in model.named_modules() if isinstance(m, nn.Linear) and type(m.weight.data) is not torch.Tensor
    ]
    assert any("self_attn" in name for name in quantised)
    assert model.get_memory_footprint() <= bytes_before
    generated: Any = model.generate
    assert generated(IDS[:1, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


@pytest.mark.filterwarnings("ignore:MatMul8bitLt:UserWarning")  # it says that it computes in float16
@KINDS
def test_bitsandbytes_loads_a_result_in_eight_bits(make: Any, target: list[str], tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    make().save_pretrained(tmp_path / "model")
    eight: Any = BitsAndBytesConfig(load_in_8bit=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tool's own imports
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=eight, device_map="cpu")
    projection = loaded.model.layers[0].self_attn.get_submodule(target[0])
    assert type(projection).__name__ == "Linear8bitLt"
    assert 1e-5 < deviation(logits(loaded, IDS).float(), logits(make(), IDS)) < 0.2
    assert loaded.generate(IDS[:1, :8], max_new_tokens=4, do_sample=False).shape == (1, 12)


def test_lm_eval_runs_a_result_on_local_tasks(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tool's own imports
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager

    save_with_tokenizer(make_llama(), tmp_path / "source")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    result = attnedit.compile(loaded, kv_budget=1.0)
    save_with_tokenizer(result.model, tmp_path / "result")
    rows = [{"question": f"{n} and {n} are", "right": f" {2 * n}", "wrong": f" {2 * n + 1}"} for n in range(6)]
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tasks / "sums.yaml").write_text(f"""task: sums
dataset_path: json
dataset_kwargs:
  data_files:
    test: {tasks / "sums.jsonl"}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{[right, wrong]}}}}"
doc_to_target: 0
metric_list:
  - metric: acc
""")
    figures = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("source", "result"):
            model = HFLM(pretrained=str(tmp_path / name), device="cpu", batch_size=2, dtype="float32")
            manager = TaskManager(include_path=str(tasks), include_defaults=False)
            done = lm_eval.simple_evaluate(model, tasks=["sums"], task_manager=manager, bootstrap_iters=0)
            assert type(model.model).__name__.startswith("Attnedit") == (name == "result")
            figures[name] = [
                [float(part[0]) for part in sample["filtered_resps"]] for sample in done["samples"]["sums"]
            ]
    # With the whole budget the result says what the source says, token for token.
    for own, other in zip(figures["source"], figures["result"], strict=True):
        assert other == pytest.approx(own, abs=1e-3)

"""Vision-language models given whole: the text tower is converted in place, with an image and without it alike."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, PreTrainedModel
from vision_models import (
    VISION,
    build_vision,
    deviation,
    image_inputs,
    image_row,
    logits_of_text,
    logits_with_image,
    shared_vision,
)

import attnedit
from attnedit.compiler.capture.capture import capture
from attnedit.compiler.capture.probe import sees_ahead
from attnedit.compiler.errors import UsageError
from attnedit.compiler.execution.model_inputs import ModelInputs, giving, is_given
from attnedit.compiler.execution.stream import AttentionInputs, Stream, Walk, decoder_layers
from attnedit.compiler.model_io.models import load_source
from attnedit.passes.site_sample import take_samples

EXACT = 1e-5


@cache
def whole(name: str) -> attnedit.CompileResult:
    """A model with latent attention in its text tower, at the whole budget."""
    return attnedit.compile(shared_vision(name), kv_budget=1.0)


def generated(model: PreTrainedModel, name: str) -> Tensor:
    """Tokens that follow the prompts with images."""
    call: Any = model.generate
    found: Tensor = call(**image_inputs(name), min_new_tokens=5, max_new_tokens=5, do_sample=False, pad_token_id=0)
    return found


def assert_same(found: PreTrainedModel, name: str) -> None:
    """The source's logits, with images and padding, and of text alone."""
    source = shared_vision(name)
    assert deviation(logits_with_image(found, name), logits_with_image(source, name)) < EXACT
    assert deviation(logits_of_text(found), logits_of_text(source)) < EXACT


@pytest.mark.parametrize("name", VISION)
def test_the_whole_budget_is_the_source(name: str, tmp_path: Path) -> None:
    result, source = whole(name), shared_vision(name)
    assert isinstance(result.model, type(source))
    assert all(row.name.startswith("model.language_model.layers.") for row in result.report.layers)
    assert_same(result.model, name)
    assert torch.equal(generated(result.model, name), generated(source, name))
    result.save(tmp_path / "saved")
    back = attnedit.load(tmp_path / "saved").model
    assert_same(back, name)
    assert torch.equal(generated(back, name), generated(source, name))


def test_a_result_loads_as_its_source_does(tmp_path: Path) -> None:
    whole("qwen2_vl").save(tmp_path)
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(model) is type(whole("qwen2_vl").model)
    assert_same(model, "qwen2_vl")


@pytest.mark.parametrize("name", ["gemma3", "llava", "qwen3_vl"])
def test_layer_by_layer(name: str, tmp_path: Path) -> None:
    shared_vision(name).save_pretrained(tmp_path / "source", max_shard_size="40KB")
    attnedit.compile_checkpoint(tmp_path / "source", tmp_path / "result", kv_budget=1.0)
    assert_same(attnedit.load(tmp_path / "result").model, name)


def test_a_directory_is_read_whole(tmp_path: Path) -> None:
    shared_vision("gemma3").save_pretrained(tmp_path)
    source = load_source(str(tmp_path))
    assert type(source.model) is type(shared_vision("gemma3"))
    assert_same(source.model, "gemma3")


@pytest.mark.parametrize("name", VISION)
def test_layers_are_streamed_with_images(name: str) -> None:
    model = shared_vision(name)
    ids, inputs = image_row(name)
    with torch.no_grad():
        expected = model(ids, **inputs, use_cache=False).logits
    held = ModelInputs()
    held.add(ids, inputs)
    layers, _ = decoder_layers(model, capture(model))
    before = getattr(model.base_model, "rope_deltas", None)
    with torch.no_grad(), giving(held, model):
        assert is_given(ids)
        walk = Walk(model, layers, ids)
        for _ in layers:
            walk.advance()
            assert deviation(walk.logits(), expected) < EXACT
    assert getattr(model.base_model, "rope_deltas", None) is before
    with torch.no_grad():
        assert deviation(model(ids, use_cache=False).logits, expected) > 0.1, "the image is given inside the block only"


def test_positions_behind_images_are_each_samples_own() -> None:
    """Two samples of one length with images of other shapes: what fits aim at is what the module computes."""
    model = build_vision("qwen2_vl")
    site = capture(model)[0]
    held, rows = ModelInputs(), []
    for grid in ([1, 4, 4], [1, 2, 8]):
        ids, inputs = image_row("qwen2_vl")
        rows.append(ids + (ids == 13) * (1 + grid[1]))  # other words, so that the two can be told apart
        held.add(rows[-1], {**inputs, "image_grid_thw": torch.tensor([grid])})
    layers, _ = decoder_layers(model, [site])
    seen: list[Tensor] = []

    def remembered(inputs: Any) -> Any:
        for one in inputs:
            seen.append(model.get_submodule(site.name)(*one.args, **one.kwargs)[0])
            yield AttentionInputs(one.args, one.kwargs)

    with giving(held, model), Stream(model, layers, [torch.cat(rows)]).inputs(0, site.name) as inputs:
        samples = take_samples(model, site, remembered(inputs), lambda length: length, 0)
    assert len(samples) == 2
    for sample, output in zip(samples, seen, strict=True):
        assert deviation(sample.target, output) < EXACT


def test_one_prompt_cannot_have_two_images() -> None:
    ids, inputs = image_row("llava")
    held = ModelInputs()
    held.add(ids, inputs)
    with pytest.raises(UsageError, match="same tokens and different images"):
        held.add(ids, {"pixel_values": inputs["pixel_values"] + 1})


def test_images_that_look_ahead_are_not_windowed() -> None:
    assert {name for name in VISION if sees_ahead(shared_vision(name))} == {"gemma3"}
    ids = torch.randint(3, 58, (8, 64), generator=torch.Generator().manual_seed(0))
    with pytest.raises(UsageError, match="see each other both ways, and a window only looks back; take the target mla"):
        attnedit.compile(shared_vision("gemma3"), "gateswa", window=8, full_layers=0, calibration=ids)
    result = attnedit.compile(shared_vision("qwen3_vl"), "gateswa", window=8, full_layers=0, calibration=ids)
    assert generated(result.model, "qwen3_vl").shape == (2, 18)


@pytest.mark.parametrize("runtime", ["gguf", "hf", "npu"])
def test_formats_of_language_models_refuse_more(runtime: str, tmp_path: Path) -> None:
    options = {"profile": "deepseek_v3"} if runtime == "hf" else {}
    with pytest.raises(UsageError, match="LlavaForConditionalGeneration is more than a language model"):
        whole("llava").export(runtime, tmp_path / "out.gguf", **options)
    assert not (tmp_path / "out.gguf").exists()


def test_a_profile_is_refused_before_any_work() -> None:
    with pytest.raises(UsageError, match="a profile or an engine holds one alone"):
        attnedit.compile(shared_vision("llava"), profile="deepseek_v3")


@pytest.mark.long
def test_the_text_tower_runs_in_onnx(tmp_path: Path) -> None:
    manifest = whole("qwen3_vl").export("onnx", tmp_path / "onnx")
    assert max(check["deviation"] for check in manifest.checks) < EXACT

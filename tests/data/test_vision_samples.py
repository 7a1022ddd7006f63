"""Calibration of vision-language models on chats with images, and their processors on the way to a result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from commands import Captured, answer
from PIL import Image
from tiny_llama import make_llama
from transformers import AutoProcessor, LlavaProcessor, PreTrainedModel
from vision_models import deviation
from vision_processors import llava_processor, llava_with_words, write_chats

import attnedit
from attnedit.compiler.data.calibration_windows import calibration_windows
from attnedit.compiler.errors import UsageError


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return llava_with_words()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return llava_processor()


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write_chats(tmp_path)


def logits_of_chat(model: PreTrainedModel, processor: LlavaProcessor, chats: Path) -> torch.Tensor:
    content = [{"type": "image", "path": str(chats.parent / "1.png")}, {"type": "text", "text": "Hello"}]
    messages = [{"role": "user", "content": content}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    with torch.no_grad():
        found: torch.Tensor = model(**inputs).logits
    return found


def test_samples_are_whole_and_carry_their_images(
    model: PreTrainedModel, processor: LlavaProcessor, chats: Path
) -> None:
    data = calibration_windows(str(chats), processor.tokenizer, model, processor=processor)
    assert [len(part) for part in data.parts] == [3, 3]
    assert len(data.inputs.by_ids) == 6
    assert all((part == model.config.image_token_id).sum() == 3 * 4 for part in data.parts)
    assert {tuple(one["pixel_values"].shape) for one in data.inputs.by_ids.values()} == {(1, 3, 8, 8)}
    few = calibration_windows(str(chats), processor.tokenizer, model, tokens=300, processor=processor)
    assert sum(map(len, few.parts)) == 2


def test_fits_see_the_images(model: PreTrainedModel, processor: LlavaProcessor, chats: Path, tmp_path: Path) -> None:
    def weight() -> torch.Tensor:
        result = attnedit.compile(model, kv_budget=0.5, calibration=str(chats), processor=processor, alternations=0)
        assert result.report.calibration_windows == "3 x 246, 3 x 231"
        return result.model.get_parameter("model.language_model.layers.1.self_attn.mla.kv_a_proj_with_mqa.weight")

    first, again = weight(), weight()
    assert torch.equal(first, again)
    for file in tmp_path.glob("*.png"):
        Image.new("RGB", (12, 10), (0, 0, 7)).save(file)
    assert not torch.allclose(first, weight(), rtol=1e-2, atol=1e-3)


def test_live_layer_by_layer_and_from_the_command_line(
    model: PreTrainedModel, processor: LlavaProcessor, chats: Path, tmp_path: Path, capsys: Captured
) -> None:
    source = tmp_path / "source"
    model.save_pretrained(source)
    processor.save_pretrained(source)
    options = {"kv_budget": 0.5, "calibration": str(chats), "alternations": 0}
    live = attnedit.compile(model, processor=processor, **options)
    live.save(tmp_path / "live")
    attnedit.compile_checkpoint(source, tmp_path / "parts", **options)
    command = ("compile", source, "--kv-budget", 0.5, "--calibration", chats, "--alternations", 0)
    answer(capsys, *command, "-o", tmp_path / "told")
    expected = logits_of_chat(live.model, processor, chats)
    assert deviation(logits_of_chat(model, processor, chats), expected) > 0.01
    for name in ("live", "parts", "told"):
        back = attnedit.load(tmp_path / name)
        own = AutoProcessor.from_pretrained(tmp_path / name)
        assert deviation(logits_of_chat(back.model, own, chats), expected) < 1e-5
        assert own.chat_template == processor.chat_template
        assert back.tokenizer is not None
    again = attnedit.load(tmp_path / "told")
    again.save(tmp_path / "again")
    assert isinstance(AutoProcessor.from_pretrained(tmp_path / "again"), LlavaProcessor)
    recipe = tmp_path / "told" / "attnedit-recipe.yaml"
    answer(capsys, "compile", "--recipe", recipe, "-o", tmp_path / "replayed")


def refused(model: PreTrainedModel, chats: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        attnedit.compile(model, calibration=str(chats), **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_refused(model: PreTrainedModel, processor: LlavaProcessor, chats: Path, tmp_path: Path) -> None:
    assert "holds images, and that needs the model's processor" in refused(model, chats, tokenizer=processor.tokenizer)
    assert "tokenizer is a LlavaProcessor; give it as processor" in refused(model, chats, tokenizer=processor)
    assert "cannot be read" in refused(model, chats, processor=tmp_path, tokenizer=processor.tokenizer)
    assert "samples with images are taken whole" in refused(model, chats, processor=processor, calibration_length=100)
    (tmp_path / "3.png").unlink()
    assert "chats.jsonl line 4 does not suit the processor" in refused(model, chats, processor=processor)
    chats.write_text(chats.read_text().splitlines()[0] + '\n{"text": "plain"}\n')
    assert "line 2 has no messages; a file with images holds chats alone" in refused(model, chats, processor=processor)


def test_images_are_no_text(model: PreTrainedModel, processor: LlavaProcessor, chats: Path) -> None:
    why = "line 1 holds a part of type 'image', not text alone"
    assert why in refused(make_llama(vocab_size=261), chats, tokenizer=processor.tokenizer)
    result = attnedit.compile(model, kv_budget=1.0, processor=processor)
    with pytest.raises(UsageError, match=why):
        attnedit.calibrate(result, model, calibration=str(chats), fit_steps=1)


def test_a_sample_is_no_longer_than_the_context(processor: LlavaProcessor, chats: Path) -> None:
    words = [{"type": "text", "text": "so " * 400}]
    record = json.loads(chats.read_text().splitlines()[0])
    record["messages"][1]["content"] = words
    chats.write_text(json.dumps(record) + "\n")
    assert "images included, and the model's context is 512" in refused(llava_with_words(), chats, processor=processor)

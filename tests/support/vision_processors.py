"""Processors for the tiny vision-language models, chats with images for them, and directories of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_llama import make_tokenizer
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedModel
from vision_models import build_vision

TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% for part in message.content %}"
    "{% if part.type == 'image' %}<image>{% else %}{{ part.text }}{% endif %}{% endfor %}\n{% endfor %}"
)


def llava_with_words() -> PreTrainedModel:
    """A tiny LLaVA with the vocabulary of `llava_processor`."""
    words = len(make_tokenizer())
    return build_vision("llava", vocab_size=words + 1, max_position_embeddings=512, image_token_index=words)


def llava_processor() -> LlavaProcessor:
    """A byte-level tokenizer with an image token, and images of 8 x 8 as four patches."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = TEMPLATE
    images = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
    )


def write_chats(directory: Path, count: int = 6) -> Path:
    """A jsonl of chats with an image each, the images beside it."""
    lines = []
    for index in range(count):
        Image.new("RGB", (12, 10), (40 * index, 255 - 40 * index, 90)).save(directory / f"{index}.png")
        asked: list[dict[str, Any]] = [
            {"type": "image", "path": f"{index}.png"},
            {"type": "text", "text": f"What is the colour of image {index}? Look at all of it before you answer."},
        ]
        answer = [{"type": "text", "text": f"It is colour number {index}, " + "and evenly so. " * (8 + index % 2)}]
        lines.append({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]})
    file = directory / "chats.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return file

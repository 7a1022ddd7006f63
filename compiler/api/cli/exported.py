"""Text out of an exported directory: what ``attnedit generate`` does with one."""

from __future__ import annotations

from pathlib import Path

from transformers import TextStreamer

from attnedit.cli.terminal import print_json
from attnedit.compiler.errors import UsageError

MANIFEST_FILE = "attnedit-onnx.json"


def is_exported(model: str) -> bool:
    """Whether a MODEL argument names a directory that ``attnedit export`` wrote."""
    return (Path(model).expanduser() / MANIFEST_FILE).is_file()


def generate_exported(
    directory: str, prompt: str, max_new_tokens: int, temperature: float, seed: int, *, json: bool
) -> None:
    """Continue a prompt with an exported model, and print the text as it comes, or one JSON object.

    Raises:
        UsageError: ONNX Runtime is not installed, the directory is damaged or holds no tokenizer, the prompt is empty
            or too long.
    """
    try:
        from attnedit.targets.runtime.onnx.runner import OnnxModel
    except ModuleNotFoundError as error:
        raise UsageError(f"{directory} needs the package {error.name}: pip install 'attnedit[onnx]'") from error
    model = OnnxModel(directory)
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UsageError(f"{directory} holds no tokenizer, and a prompt needs one; export a model saved with its own")
    inputs = tokenizer(prompt, return_tensors="np")
    if not prompt or inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt is empty; give at least one word")
    streamer = None if json else TextStreamer(tokenizer, skip_special_tokens=True)
    if streamer is not None:
        streamer.put(inputs["input_ids"])
    new: list[int] = []
    steps = model.stream(
        inputs["input_ids"],
        inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
    )
    for token in steps:
        new.append(int(token[0]))
        if streamer is not None:
            streamer.put(token)
    if streamer is not None:
        streamer.end()
    else:
        text = tokenizer.decode(new, skip_special_tokens=True)
        print_json({"model": directory, "prompt": prompt, "text": text, "new_tokens": len(new)})

"""Generate greedily on an Ascend NPU with what lies beside this file: ``python run_npu.py --prompt "Hello"``.

It needs torch, torch_npu with CANN, safetensors and, for text, transformers; attnedit is not needed.

Shapes: B batch, T new tokens, M blocks per row, V vocabulary.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MANIFEST_FILE = "attnedit-npu.json"
FORMAT_KEY = "format_version"
FORMAT_VERSION = 1
WEIGHTS_FILE = "model.safetensors"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class NpuModel:
    """Both programs of an exported model, which share their weights.

    Args:
        manifest: what the directory says of the model.
        programs: "prefill" and "decode"; called with keyword arguments, write the caches in place, return logits.
        device: where they run.
    """

    def __init__(self, manifest: Mapping[str, Any], programs: Mapping[str, Callable[..., Any]], device: str) -> None:
        self.manifest, self.programs, self.device = manifest, programs, device

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> NpuModel:
        """Read a directory; operators ``torch.ops.npu`` must be registered before.

        Raises:
            ValueError: another version of attnedit wrote it.
        """
        from safetensors.torch import load_file

        manifest = json.loads((directory / MANIFEST_FILE).read_text(encoding="utf-8"))
        if (found := manifest.get(FORMAT_KEY)) != FORMAT_VERSION:
            raise ValueError(f"{directory / MANIFEST_FILE} has format {found}, this script reads {FORMAT_VERSION}")
        weights = load_file(directory / WEIGHTS_FILE, device=device)
        programs = {
            phase: load_program(directory / file, weights, manifest["aliases"], device)
            for phase, file in manifest["programs"].items()
        }
        return cls(manifest, programs, device)

    def compiled(self, backend: Any) -> NpuModel:
        """Return the model with both programs compiled; the prompt's length and the rows' stay free."""
        programs = {
            phase: torch.compile(program, backend=backend, dynamic=True, fullgraph=True)
            for phase, program in self.programs.items()
        }
        return NpuModel(self.manifest, programs, self.device)

    def decoding(self, batch: int | None = None, capacity: int | None = None) -> Decoding:
        """Begin with empty caches.

        Raises:
            ValueError: the model was exported for another batch, or has not so many places.
        """
        fixed, places = self.manifest["batch"], self.manifest["blocks"] * self.manifest["block_size"]
        if batch not in (None, fixed) or (capacity or 0) > places:
            raise ValueError(f"the model was exported for {fixed} rows of {places} tokens, not {batch} of {capacity}")
        return Decoding(self)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, max_new_tokens: int) -> Iterator[Tensor]:
        """Choose the likeliest token again and again.

        Args:
            input_ids: int64 [B, T], padded on the left.
            attention_mask: int64 [B, T], 0 for padding.
            max_new_tokens: how many at most.

        Yields:
            int64 [B]; padding once a row has ended. It stops when all have.
        """
        state = self.decoding(len(input_ids), input_ids.shape[1] + max_new_tokens)
        logits = state.feed(input_ids, attention_mask)
        running = torch.ones(len(input_ids), dtype=torch.bool)
        for index in range(max_new_tokens):
            token = torch.as_tensor(logits)[:, -1].argmax(-1)
            token = torch.where(running, token, self.manifest["pad_token_id"])
            yield token
            running &= ~torch.isin(token, torch.tensor(self.manifest["eos_token_id"], dtype=torch.int64))
            if not running.any() or index + 1 == max_new_tokens:
                return
            logits = state.feed(token[:, None], torch.ones_like(token[:, None]))


class Decoding:
    """A running text: the caches, and how many tokens each row has.

    Args:
        model: the exported model.
    """

    def __init__(self, model: NpuModel) -> None:
        manifest, device = model.manifest, model.device
        self.model = model
        dtype = DTYPES[manifest["dtype"]]
        self.caches = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in manifest["caches"].items()
        }
        batch, blocks = manifest["batch"], manifest["blocks"]
        self.table = torch.arange(batch * blocks, dtype=torch.int32, device=device).view(batch, blocks)
        self.lengths: list[int] | None = None

    def feed(self, input_ids: Any, attention_mask: Any) -> Any:
        """Add tokens: first a prompt, padded on the left, then tokens without padding.

        Args:
            input_ids: int64 [B, T], tensor or array.
            attention_mask: int64 [B, T], 0 for padding.

        Returns:
            Float32 array of logits, [B, 1, V] of a prompt's last tokens, [B, T, V] later.

        Raises:
            ValueError: the caches are full, a row has no token, or there is padding where there may be none.
        """
        ids, real = torch.as_tensor(input_ids), torch.as_tensor(attention_mask).bool()
        places = self.table.shape[1] * self.model.manifest["block_size"]
        if max(self.lengths or [0]) + ids.shape[1] > places:
            raise ValueError(f"{ids.shape[1]} tokens more do not fit: a row has {places} places")
        if self.lengths is None:
            if not real[:, -1].all():
                raise ValueError("every row needs a token at its end, and its padding on the left")
            self.lengths = [int(count) for count in real.sum(1)]
            # A single token would be decoded: kernels tell a prompt by its length.
            packed = torch.zeros((len(ids), max(2, *self.lengths)), dtype=torch.int64)
            for row, count in enumerate(self.lengths):
                packed[row, :count] = ids[row][real[row]]
            return self._run("prefill", packed).cpu().float().numpy()
        if not real.all():
            raise ValueError("padding belongs in front of the prompt")
        parts = []
        for index in range(ids.shape[1]):
            self.lengths = [count + 1 for count in self.lengths]
            parts.append(self._run("decode", ids[:, index : index + 1], counts=self.lengths))
        return torch.cat(parts, dim=1).cpu().float().numpy()

    @torch.no_grad()
    def _run(self, phase: str, ids: Tensor, **more: Any) -> Tensor:
        device = self.model.device
        lengths = torch.tensor(self.lengths, dtype=torch.int64, device=device)
        return torch.as_tensor(
            self.model.programs[phase](
                input_ids=ids.to(device), lengths=lengths, block_table=self.table, caches=self.caches, **more
            )
        )


def load_program(file: Path, weights: Mapping[str, Tensor], aliases: Mapping[str, str], device: str) -> nn.Module:
    """Load a program that was saved without weights, put them in, and move it to the device."""
    from torch.export.passes import move_to_device_pass

    program = move_to_device_pass(torch.export.load(file), device).module()
    empty = {**dict(program.named_parameters(remove_duplicate=False)), **dict(program.named_buffers())}
    for name in empty:
        path, _, attribute = name.rpartition(".")
        stored = weights.get(aliases.get(name, name))
        if stored is not None:
            owner = program.get_submodule(path)
            is_parameter = isinstance(getattr(owner, attribute), nn.Parameter)
            setattr(owner, attribute, nn.Parameter(stored, requires_grad=False) if is_parameter else stored)
    return program


def main() -> None:
    """Read the command line, and print what the model writes."""
    parser = argparse.ArgumentParser(description="Generate greedily on an Ascend NPU.")
    parser.add_argument("--prompt", action="append", required=True, help="once for every row of the exported batch")
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--device", default="npu:0")
    parser.add_argument("--eager", action="store_true", help="run operator by operator, without torch.compile")
    options = parser.parse_args()

    import torch_npu  # type: ignore[import-not-found]  # noqa: F401  # registers the device and torch.ops.npu
    from transformers import AutoTokenizer

    directory = Path(__file__).resolve().parent
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = NpuModel.load(directory, options.device)
    if not options.eager:
        import torchair  # type: ignore[import-not-found]

        model = model.compiled(torchair.get_npu_backend(compiler_config=torchair.CompilerConfig()))
    given = tokenizer(options.prompt, return_tensors="pt", padding=True)
    rows = list(model.generate(given["input_ids"], given["attention_mask"], options.max_new_tokens))
    for prompt, tokens in zip(options.prompt, torch.stack(rows, dim=1), strict=True):
        print(prompt + tokenizer.decode(tokens, skip_special_tokens=True))


if __name__ == "__main__":
    main()

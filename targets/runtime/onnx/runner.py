"""Run an exported model: one call per step, the cache handed from output to input without a copy.

Shapes: B batch, T tokens, V vocabulary, C capacity of fixed buffers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt
import onnxruntime
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from attnedit.compiler.errors import AttneditError, UsageError, first_line
from attnedit.targets.runtime.check import PREFILL
from attnedit.targets.runtime.onnx.manifest import MODEL_FILE, Manifest
from attnedit.targets.runtime.onnx.program import Signature

Array = npt.NDArray[Any]


class SamplingArguments(TypedDict, total=False):
    """Keyword arguments of `OnnxModel.stream`."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int


class OnnxModel:
    """An exported model.

    Args:
        directory: what `attnedit.targets.runtime.onnx.export` wrote.
        threads: of ONNX Runtime; 0 lets it choose.

    Attributes:
        manifest: what the directory says of the model.
        sessions: ONNX Runtime's sessions, by the tokens that one call takes; 0 takes any number.
        tokenizer: None if the directory holds none.

    Raises:
        UsageError: no exported model there, or a damaged one.
    """

    def __init__(self, directory: str | os.PathLike[str], threads: int = 0) -> None:
        path = Path(directory).expanduser()
        self.manifest = Manifest.read(path)
        self.signature = Signature(tuple(self.manifest.layers), self.manifest.cache, self.manifest.positions)
        fixed = self.manifest.fixed
        graphs = {MODEL_FILE: 0} if fixed is None else fixed.graphs()
        self.sessions = {length: _session(path / file, threads) for file, length in graphs.items()}
        self.tokenizer: PreTrainedTokenizerBase | None = None
        if (path / "tokenizer_config.json").exists():
            self.tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)

    def decoding(self, batch: int = 1, capacity: int | None = None) -> Decoding:
        """Begin with an empty cache.

        Args:
            batch: B.
            capacity: C, the most tokens; needed by buffers whose size the model does not fix.

        Raises:
            UsageError: the buffers have to have a capacity.
        """
        return Decoding(self, batch, capacity)

    def stream(
        self,
        input_ids: Array,
        attention_mask: Array | None = None,
        *,
        max_new_tokens: int = 20,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Array]:
        """Generate, token by token.

        Args:
            input_ids: int64 [B, T], padded on the left.
            attention_mask: int64 [B, T], 0 for padding; None where there is none.
            max_new_tokens: how many tokens at most.
            temperature: 0 takes the likeliest token.
            top_k: sample from so many of the likeliest tokens; 0 is all.
            top_p: sample from the likeliest tokens that together have this probability.
            seed: same seed, same tokens.

        Yields:
            int64 [B], the next token of each row; padding once a row has ended. It stops when all have.

        Raises:
            UsageError: no token, a row of padding only, tokens the model does not have, or more than its positions.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        self._check_prompt(ids, mask, max_new_tokens)
        generator = np.random.default_rng(seed)
        chunk = PREFILL  # logits [B, H, T, S] stay small, and window layers cost the same for every token
        if self.manifest.fixed is not None:
            chunk = self.manifest.fixed.sequence_length
            ids, mask = (np.pad(x, ((0, 0), (-x.shape[1] % chunk, 0))) for x in (ids, mask))
        state = self.decoding(len(ids), ids.shape[1] + max_new_tokens)
        logits = np.empty(0)
        for start in range(0, ids.shape[1], chunk):
            logits = state.feed(ids[:, start : start + chunk], mask[:, start : start + chunk])
        running = np.ones(len(ids), dtype=bool)
        for index in range(max_new_tokens):
            token = choose(logits[:, -1], generator, temperature, top_k, top_p)
            token = np.where(running, token, self.manifest.pad_token_id)
            yield token
            running &= ~np.isin(token, self.manifest.eos_token_id)
            if not running.any() or index + 1 == max_new_tokens:
                return
            logits = state.feed(token[:, None])

    def generate(
        self, input_ids: Array, attention_mask: Array | None = None, **options: Unpack[SamplingArguments]
    ) -> Array:
        """Generate as `stream` does, all at once.

        Args:
            input_ids: int64 [B, T], padded on the left.
            attention_mask: [B, T], 0 for padding; all 1 unless given.
            **options: the other arguments of `stream`.

        Returns:
            The new tokens, int64 [B, number].

        Raises:
            UsageError: the prompt does not fit the model.
        """
        return np.stack(list(self.stream(input_ids, attention_mask, **options)), axis=1)

    def _check_prompt(self, ids: Array, mask: Array, new: int) -> None:
        if ids.ndim != 2 or not ids.size or mask.shape != ids.shape or not mask[:, -1].all():
            raise UsageError(
                f"input_ids {ids.shape} and attention_mask {mask.shape} must be [B, T] alike, hold a token, and have "
                "their padding on the left"
            )
        if ids.min() < 0 or ids.max() >= self.manifest.vocab_size:
            raise UsageError(f"input_ids hold token {ids.max()}, and the model has {self.manifest.vocab_size}")
        limit, length = self.manifest.max_positions, ids.shape[1]
        if limit is not None and length + new > limit:
            raise UsageError(
                f"{length} tokens of prompt and {new} new ones are too many: the model has {limit} positions; "
                + (f"ask for at most {limit - length} new tokens" if length < limit else "shorten the prompt")
            )


class Decoding:
    """A running text: the cache, and which of its tokens are padding."""

    def __init__(self, model: OnnxModel, batch: int, capacity: int | None = None) -> None:
        self.model, self.batch, self.capacity = model, batch, capacity
        self.mask = np.zeros((batch, 0), dtype=np.int64)
        self.dtype = np.dtype(model.manifest.dtype)
        self.bindings = {length: session.io_binding() for length, session in model.sessions.items()}
        self.buffers = model.manifest.cache != "dynamic"
        fixed = model.manifest.fixed
        if fixed is not None:
            if batch != fixed.batch:
                raise UsageError(f"the model was exported for {fixed.batch} rows, got {batch}")
            self.capacity = capacity = fixed.capacity
        if self.buffers and capacity is None:
            raise UsageError("a model with --cache static has buffers of a fixed size; say their capacity in tokens")
        self.cache: dict[str, Any] = {}
        for layer in model.manifest.layers:
            tokens = layer.tokens if layer.tokens is not None else (capacity or 0) if self.buffers else 0
            for name, size in zip(layer.names("past_key_values"), (layer.key_size, layer.value_size), strict=True):
                empty = np.zeros((batch, layer.heads, tokens, size), dtype=self.dtype)
                self.cache[name] = onnxruntime.OrtValue.ortvalue_from_numpy(empty)

    @property
    def length(self) -> int:
        """Tokens so far, padding included."""
        return self.mask.shape[1]

    def feed(self, input_ids: Array, attention_mask: Array | None = None) -> Array:
        """Add tokens [B, T] (with 0 in ``attention_mask`` [B, T] for padding), and return their logits [B, T, V].

        Raises:
            AttneditError: the buffers are full, the model takes no such number of tokens, or ONNX Runtime failed.
        """
        past, new = self.length, input_ids.shape[1]
        if self.buffers and self.capacity is not None and past + new > self.capacity:
            raise AttneditError(f"{past} + {new} tokens do not fit into buffers of {self.capacity}")
        added = np.ones_like(input_ids) if attention_mask is None else attention_mask
        self.mask = np.concatenate([self.mask, added], axis=1)
        mask = self.mask
        if self.buffers:
            mask = np.pad(mask, ((0, 0), (0, (self.capacity or 0) - mask.shape[1])))
        positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)[:, past:]
        inputs = {"input_ids": input_ids, "attention_mask": mask, "position_ids": positions}
        inputs["write_indices"] = np.full((self.batch,), past)
        return self._run({name: value.astype(np.int64) for name, value in inputs.items()})

    def _run(self, inputs: dict[str, Array]) -> Array:
        signature, length = self.model.signature, inputs["input_ids"].shape[1]
        length = length if length in self.bindings else 0
        if length not in self.bindings:
            raise AttneditError(f"the exported model takes {' or '.join(map(str, self.bindings))} tokens at once")
        binding = self.bindings[length]
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        for name in signature.inputs():
            if name in self.cache:
                binding.bind_ortvalue_input(name, self.cache[name])
            else:
                binding.bind_cpu_input(name, np.ascontiguousarray(inputs[name]))
        binding.bind_output("logits", "cpu")
        kept: list[str] = []
        for layer in signature.layers:
            for past, present in zip(layer.names("past_key_values"), layer.names("present"), strict=True):
                if self.model.manifest.cache == "static" and layer.tokens is None:
                    binding.bind_ortvalue_output(present, self.cache[past])  # written in place
                else:
                    binding.bind_output(present, "cpu")
                    kept.append(past)
        try:
            self.model.sessions[length].run_with_iobinding(binding)
        except Exception as error:  # its exceptions have no common base
            raise AttneditError(f"onnxruntime failed: {first_line(error)}") from error
        # In the order of binding: logits first, then the cache as the signature lists it.
        outputs = dict(zip(signature.outputs(), binding.get_outputs(), strict=True))
        for past in kept:
            self.cache[past] = outputs[past.replace("past_key_values", "present", 1)]
        logits: Array = outputs["logits"].numpy()
        return logits


def _session(file: Path, threads: int) -> Any:
    """Load a graph into ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # A pattern is kept per input shape, and every step of a growing cache has another one.
    options.enable_mem_pattern = False
    try:
        return onnxruntime.InferenceSession(file, sess_options=options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base
        raise UsageError(f"onnxruntime cannot load {file}: {first_line(error)}") from error


def choose(
    logits: Array, generator: np.random.Generator, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0
) -> Array:
    """Pick the next token of each row of logits [B, V], int64 [B].

    >>> choose(np.array([[0.0, 2.0, 1.0]]), np.random.default_rng(0)).tolist()
    [1]
    """
    if temperature <= 0:
        return np.asarray(logits.argmax(axis=-1), dtype=np.int64)
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, axis=-1, kind="stable")
    ranked = np.take_along_axis(scaled, order, axis=-1)
    weights = np.exp(ranked - ranked[:, :1])
    weights /= weights.sum(axis=-1, keepdims=True)
    before = weights.cumsum(axis=-1) - weights
    # The first token always stays.
    weights[:, 1:] *= before[:, 1:] < top_p
    if top_k:
        weights[:, top_k:] = 0
    weights /= weights.sum(axis=-1, keepdims=True)
    drawn = (weights.cumsum(axis=-1) < generator.random((len(logits), 1))).sum(axis=-1, keepdims=True)
    drawn = np.minimum(drawn, logits.shape[-1] - 1)
    return np.asarray(np.take_along_axis(order, drawn, axis=-1)[:, 0], dtype=np.int64)

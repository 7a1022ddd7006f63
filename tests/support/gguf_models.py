"""Tiny results that go into a GGUF, and tokenizers made to the rules that llama.cpp knows: shared by its tests."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from compiled import compile_tiny
from families import build
from hf_exports import windowed
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from attnedit.compiler.data.token_windows import demo_text
from attnedit.targets.runtime.gguf.tokenizer import LLAMA3_REGEX, QWEN2_REGEX

WINDOW = 6
VOCABULARY = 300


def latent(family: str = "llama", vocab: int = VOCABULARY, **options: Any) -> PreTrainedModel:
    """A model with latent attention in the form that DeepSeek's classes have."""
    model = build(family, vocab_size=vocab, **options)
    return compile_tiny(model, 0.5, profile="deepseek_v3").model


def sliding(family: str = "llama", **options: Any) -> PreTrainedModel:
    """A model with windows, whose gates and sinks have learned something."""
    own = {name: options.pop(name) for name in ("gate", "sinks", "window", "full_layers") if name in options}
    model = windowed(build(family, vocab_size=VOCABULARY, **options), **own)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("g_proj.weight", "sink_logit")):
            torch.nn.init.normal_(parameter, std=0.5, generator=generator)
    return model


def with_tokenizer(model: PreTrainedModel, tokenizer: Any = None) -> Any:
    return SimpleNamespace(model=model, tokenizer=tokenizer or trained_tokenizer("gpt-2", VOCABULARY))


def _split(regex: str) -> Any:
    split = pre_tokenizers.Split(Regex(regex), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False)
RULES: dict[str, Any] = {
    "gpt-2": BYTES,
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTES]),
    "qwen2": _split(QWEN2_REGEX),
    "llama-bpe": _split(LLAMA3_REGEX),
}


@functools.cache
def trained_tokenizer(rules: str, size: int = 1000) -> PreTrainedTokenizerFast:
    """A tokenizer of so many tokens trained on English by the rules that llama.cpp calls by that name."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=rules == "llama-bpe"))
    tokenizer.pre_tokenizer = RULES[rules]
    tokenizer.decoder = decoders.ByteLevel()
    if rules == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<bos>", "<eos>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = " ".join(str(number) for number in range(0, 3000, 7))
    tokenizer.train_from_iterator([demo_text()[0][:200_000], numbers * 3], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )

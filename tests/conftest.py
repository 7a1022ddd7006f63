"""Tiny models and texts that every test can use; nothing is downloaded."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Before torch is imported: small tensors, and two workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from attnedit.compiler.data.token_windows import demo_text

# Inductor imports setuptools late, which fails in a process where anything has imported distutils or pip before.
importlib.import_module("setuptools")

torch.set_num_threads(1)
logging.disable_progress_bar()

VOCABULARY = 260


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer: 256 bytes and four special tokens, no training needed."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ["<bos>", "<eos>", "<pad>", "<unk>"]
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def make_llama(**changes: object) -> LlamaForCausalLM:
    """A random two-layer Llama, the same every time."""
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/golden instead of comparing with it")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture
def llama() -> LlamaForCausalLM:
    return make_llama()


@pytest.fixture(scope="session")
def saved_llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A directory with the tiny model and its tokenizer; tests must not write there."""
    directory = tmp_path_factory.mktemp("models") / "tiny-llama"
    make_llama().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Sharded directories of tiny models by family and options, without tokenizer; tests must not write there."""

    @functools.cache
    def saved(family: str, shard: str = "20KB", **options: Any) -> Path:
        from families import build

        directory = tmp_path_factory.mktemp("checkpoints") / family
        build(family, **options).save_pretrained(directory, max_shard_size=shard)
        return directory

    return saved


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """100,000 characters of English, which are as many tokens for the tiny tokenizer."""
    file = tmp_path_factory.mktemp("texts") / "notes.txt"
    file.write_text(demo_text()[0][:100_000], encoding="utf-8")
    return file

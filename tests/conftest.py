"""Tiny models and texts that every test can use; nothing is downloaded."""

from __future__ import annotations

import functools
import gc
import importlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: small tensors, and two workers on two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import pytest
import torch
from families import build
from tiny_llama import make_llama, make_tokenizer
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging

from attnedit.compiler.data.token_windows import demo_text

# Inductor imports setuptools late, which fails in a process where anything has imported distutils or pip before.
importlib.import_module("setuptools")

torch.set_num_threads(1)
logging.disable_progress_bar()
# Graphs are many small objects, and looking for garbage among them takes an eighth of the time.
gc.set_threshold(200_000, 50, 1000)


def pytest_configure(config: pytest.Config) -> None:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        # What one worker or command has traced, the others take; of this run alone.
        cache = tempfile.TemporaryDirectory(prefix="attnedit-tests-")
        os.environ["ATTNEDIT_CACHE"] = cache.name
        config.add_cleanup(cache.cleanup)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="rewrite tests/graph/golden")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    from scheduling import BySubject  # only where there is pytest-xdist

    return BySubject(config, log)


def pytest_collection_finish() -> None:
    """What is there now stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


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

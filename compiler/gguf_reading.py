"""One parse of a GGUF's header where transformers would do three."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def shared_gguf_reader() -> Iterator[None]:
    """Let configuration, weights and tokenizer share one `gguf.GGUFReader` while inside.

    A header holds the whole vocabulary, and parsing it takes seconds; transformers does so for each of the three.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    with mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)):
        yield

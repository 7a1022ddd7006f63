"""Reading a GGUF once where transformers would read it three times."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


@contextmanager
def shared_gguf_reader() -> Iterator[None]:
    """Let configuration, weights and tokenizer share one `gguf.GGUFReader`, and tensors one map of names, while inside.

    A header holds the whole vocabulary, and parsing it takes seconds; transformers does so for each of the three. The
    map of names it makes anew for every module.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(gguf.GGUFReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield

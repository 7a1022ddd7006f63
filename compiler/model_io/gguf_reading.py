"""Reading a GGUF once where transformers would read it three times."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def shared_gguf_reader() -> Iterator[None]:
    """Let configuration, weights and tokenizer share one `gguf.GGUFReader`, and tensors one map of names, while inside.

    A header holds the whole vocabulary, and parsing it takes seconds; transformers does so for each of the three. The
    map of names it makes anew for every module.

    The file is mapped as a plain array: a `numpy.memmap` makes each of the header's million slices one of its own kind,
    which is two thirds of the reading.
    """
    if importlib.util.find_spec("gguf") is None:
        yield
        return
    import gguf
    import numpy

    class PlainReader(gguf.GGUFReader):
        @property
        def data(self) -> Any:
            return self._plain

        @data.setter
        def data(self, mapped: Any) -> None:
            self._plain = mapped.view(numpy.ndarray)

    with (
        mock.patch.object(gguf, "GGUFReader", functools.cache(PlainReader)),
        mock.patch.object(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)),
    ):
        yield

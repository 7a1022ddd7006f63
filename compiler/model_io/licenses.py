"""The licence of a source model, as its own files state it."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

from huggingface_hub import hf_hub_download, metadata_load

from attnedit.compiler.model_io.demo_model import SMOLLM2, embedded_gguf

CARD_FILE = "README.md"
STRING, ARRAY = 8, 9
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}


def source_license(model: str) -> str | None:
    """Find out the licence of a source: a hub name, a directory, a ``.gguf`` file, or ``smollm2``.

    Returns:
        As the Hub names licences; None where the card or the header says nothing, or cannot be had.
    """
    path = Path(model).expanduser()
    # A courtesy of reports: no network, no such file, damaged metadata all mean that the licence is not known.
    with contextlib.suppress(Exception):
        if model == SMOLLM2 or path.suffix == ".gguf":
            return gguf_license(embedded_gguf() if model == SMOLLM2 else path)
        if path.is_dir():
            card = path / CARD_FILE
        elif model.count("/") == 1 and not path.exists():
            card = Path(hf_hub_download(model, CARD_FILE))
        else:
            return None
        found = (metadata_load(card) or {}).get("license")
        return found if isinstance(found, str) else None
    return None


def gguf_license(file: Path) -> str | None:
    """Read ``general.license`` off the start of a GGUF's header (ggml's docs/gguf.md).

    `gguf.GGUFReader` would parse the vocabulary too, which takes seconds.
    """
    with file.open("rb") as stream:

        def number(form: str) -> int:
            size = struct.calcsize(form)
            return int(struct.unpack(form, stream.read(size))[0])

        def text() -> str:
            return stream.read(number("<Q")).decode("utf-8")

        stream.seek(4 + 4 + 8)  # magic, version, number of tensors
        for _ in range(number("<Q")):
            key, kind = text(), number("<I")
            if not key.startswith("general."):
                return None  # they come first
            if kind == STRING:
                value = text()
                if key == "general.license":
                    return value
            elif kind == ARRAY:
                kind, count = number("<I"), number("<Q")
                for _ in range(count):
                    text() if kind == STRING else stream.read(SCALAR_BYTES[kind])
            else:
                stream.read(SCALAR_BYTES[kind])
    return None

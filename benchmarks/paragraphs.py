"""Prose of documents as an evaluation text: paragraphs of over 120 characters, each on one line, none twice.

    python benchmarks/paragraphs.py developers-reference.txt.gz debian-reference.en.txt.gz -o tech.txt

`calib.txt` and `eval.txt` of the benchmarks are made of such paragraphs. Hard line breaks would be a domain apart.
"""

from __future__ import annotations

import argparse
import gzip
import re
from pathlib import Path

SHORTEST = 120
"""Characters: shorter ones are headings, list items and captions."""


def paragraphs(text: str) -> list[str]:
    """Paragraphs, what blank lines are between, with their lines joined."""
    joined = (" ".join(part.split()) for part in re.split(r"\n\s*\n", text))
    return [part for part in joined if len(part) > SHORTEST]


def main() -> None:
    """Cut the files and write one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="text, also compressed with gzip")
    parser.add_argument("-o", "--output", required=True, type=Path)
    options = parser.parse_args()
    found: dict[str, None] = {}
    for file in options.files:
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode("utf-8", "replace")
        found |= dict.fromkeys(paragraphs(text))
    options.output.write_text("\n\n".join(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

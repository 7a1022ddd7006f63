"""Prose of Debian's manuals as text to train on: paragraphs in order, none twice, none of an evaluation text.

    apt-get download debian-policy postgresql-doc-15 ...
    python benchmarks/manuals.py *.deb --without eval.txt -o manuals.txt

Every HTML, info and text file of a package is read (needs lxml and dpkg-deb). A paragraph is left out if it shares
thirteen words in a row with the evaluation text, if too little of it is words, or if it has been seen: licences and
navigation stand in every package. Prints what each package gave.
"""

from __future__ import annotations

import argparse
import gzip
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from paragraphs import SHORTEST, paragraphs

GRAM = 13
"""Words in a row that two texts share only where one was copied, the usual measure of contamination."""
LEAST_LETTERS = 0.75
"""Share of letters and blanks below which a paragraph is code, a table or a list of names."""
BLOCKS = ("p", "li", "dd", "blockquote", "td")
SKIPPED = ("script", "style", "pre", "nav", "table", "head")
NAMES = re.compile(r"copyright|changelog|license|licence|news|index|genindex|search|bugs|todo|authors|\bNEWS\b", re.I)
OTHER_LANGUAGE = re.compile(
    r"[./_-](de|fr|es|it|ja|pt|pt[-_]BR|ru|zh|zh[-_]..|nl|pl|sv|da|nb|cs|ko|tr|uk|ca|el|fi|hu|"
    r"ro|sk|vi|id|eu|gl|kk|km|lt|lv|pa|sl|te|cn|nb-NO|zh-CN|zh-TW|pt-BR)([./_-]|$)"
)


def html_paragraphs(data: bytes) -> Iterator[str]:
    """Text of blocks that hold no other block, in order."""
    from lxml import html

    try:
        tree = html.document_fromstring(data.decode("utf-8", "replace").encode())
    except (ValueError, AssertionError, html.etree.ParserError):
        return
    html.etree.strip_elements(tree, *SKIPPED, html.etree.Comment, with_tail=False)
    for block in tree.iter(*BLOCKS):
        if next(block.iterdescendants(*BLOCKS), None) is None:
            yield " ".join(block.text_content().split())


def file_paragraphs(file: Path) -> Iterator[str]:
    """Paragraphs of one file of a package; nothing where it is no prose."""
    name = file.name.removesuffix(".gz")
    data = file.read_bytes()
    data = gzip.decompress(data) if file.suffix == ".gz" else data
    if re.search(r"\.x?html?$", name):
        yield from html_paragraphs(data)
    elif re.search(r"\.(txt|text|rst|info(-\d+)?|pod|md|guide|doc)$", name) or "info" in file.parts[-2:-1]:
        yield from paragraphs(data.decode("utf-8", "replace"))


def grams(text: str) -> set[int]:
    """Hashes of all `GRAM` words in a row."""
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[at : at + GRAM])) for at in range(len(words) - GRAM + 1)}


def is_prose(text: str) -> bool:
    """Whether a paragraph is long enough and mostly words of a language with a Latin script."""
    letters = sum(letter == " " or (letter.isalpha() and letter.isascii()) for letter in text)
    return len(text) > SHORTEST and letters > LEAST_LETTERS * len(text) and " the " in f" {text.lower()} "


def package_paragraphs(package: Path) -> Iterator[str]:
    """All prose of a package, file by file."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["dpkg-deb", "-x", package, folder], check=True)
        for place in ("usr/share/doc", "usr/share/info", "usr/share/vim"):
            for file in sorted(Path(folder, place).rglob("*")):
                inside = str(file.relative_to(folder))
                left_out = file.is_symlink() or NAMES.search(file.name) or OTHER_LANGUAGE.search(inside)
                if file.is_file() and not left_out:
                    yield from file_paragraphs(file)


def main() -> None:
    """Read the packages and write one text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="+", type=Path, help="files of Debian packages")
    parser.add_argument("--without", type=Path, action="append", default=[], help="evaluation texts")
    parser.add_argument("--most", type=int, default=1_600_000, help="characters of one package")
    parser.add_argument("-o", "--output", required=True, type=Path)
    options = parser.parse_args()
    known = set[int]().union(*(grams(text.read_text(encoding="utf-8")) for text in options.without))
    seen: set[int] = set()
    with options.output.open("w", encoding="utf-8") as out:
        for package in options.packages:
            size = copied = 0
            for text in package_paragraphs(package):
                same = hash(re.sub("[^a-z]+", "", text.lower()))  # a manual may be there as HTML, info and text
                if size > options.most or same in seen or not is_prose(text):
                    continue
                seen.add(same)
                if not known.isdisjoint(grams(text)):
                    copied += 1
                    continue
                size += out.write(text + "\n\n")
            name = package.name.split("_")[0]
            print(f"{name}: {size:,} characters, {copied} paragraphs of evaluation texts", flush=True)


if __name__ == "__main__":
    main()

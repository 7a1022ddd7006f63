"""What all runtimes have in common: directories that appear whole, checked options, facts for a runner."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError
from transformers import PreTrainedModel

from attnedit.compiler.errors import AttneditError, UsageError


class Exportable(Protocol):
    """What a runtime exports: a `CompileResult`, or any object with a model.

    A ``tokenizer`` and a ``report`` are used where it has them.
    """

    @property
    def model(self) -> PreTrainedModel:
        """A live transformers model."""


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Give a hidden directory beside `target` for the block, so that moving it there is a rename in one file system.

    Afterwards it is gone; so are parents that were made for it, if the block left nothing at `target`.

    Raises:
        UsageError: nothing can be written there.
    """
    made = [folder for folder in target.parents if not folder.exists()]  # innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        hidden = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UsageError(f"cannot write to {target.parent}: {error.strerror or error}") from error
    try:
        mask = os.umask(0)
        os.umask(mask)
        hidden.chmod(0o777 & ~mask)  # what mkdir gives, not the private mode of temporary directories
        yield hidden
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if not target.exists():
            for folder in made:
                folder.rmdir()


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a directory beside `target` to write into, which takes its place if the block ends well.

    Raises:
        UsageError: nothing can be written there.
        AttneditError: writing failed; what was at `target` before still is.
    """
    with beside(target) as staging:
        try:
            yield staging
            _put_in_place(staging, target)
        except (OSError, SafetensorError) as error:
            raise AttneditError(f"could not write {target}: {error}") from error


def _put_in_place(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = aside / target.name
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:  # an interrupt too must not lose what was there
        old.rename(target)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def staged_file(target: Path, name: str) -> Iterator[Path]:
    """Give a directory beside `target` to write into, whose file `name` becomes `target` if the block ends well.

    Raises:
        UsageError: nothing can be written there.
    """
    with staged(target.with_name(f"{target.name}.parts")) as staging:
        yield staging
        (staging / name).rename(target)
    shutil.rmtree(target.with_name(f"{target.name}.parts"))


def check_choice(option: str, value: str, choices: Iterable[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        UsageError: the message lists them.
    """
    known = tuple(choices)
    if value not in known:
        raise UsageError(f"{option} {value!r} is not known; give {' or '.join(known)}")


def write_companions(result: Any, model: PreTrainedModel, directory: Path) -> None:
    """Write what a runner needs beside an exported model: the result's tokenizer, the generation defaults."""
    if getattr(result, "tokenizer", None) is not None:
        result.tokenizer.save_pretrained(directory)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(directory)


def generation_facts(model: PreTrainedModel) -> dict[str, Any]:
    """Return what a runner must know of a model: the fields that the manifests of all runtimes share.

    They are ``source`` (name of its class), ``dtype``, ``vocab_size``, ``max_positions`` (None where its configuration
    names none), ``eos_token_id`` (all tokens that end a text) and ``pad_token_id``.
    """
    config = model.config.get_text_config(decoder=True)
    generation: Any = model.generation_config
    ends = getattr(generation, "eos_token_id", None)
    ends = config.eos_token_id if ends is None else ends
    ends = [] if ends is None else [int(end) for end in (ends if isinstance(ends, list) else [ends])]
    pad = getattr(config, "pad_token_id", None)
    rows: Any = model.get_input_embeddings()
    limit = getattr(config, "max_position_embeddings", None)
    return {
        "source": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "vocab_size": int(rows.weight.shape[0]),
        "max_positions": None if limit is None else int(limit),
        "eos_token_id": ends,
        "pad_token_id": int(pad) if pad is not None else ends[0] if ends else 0,
    }

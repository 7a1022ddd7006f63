"""Where a model is that is named on the command line or in Python; nothing of it is read yet."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from attnedit.compiler.errors import UsageError
from attnedit.compiler.model_io.demo_model import SMOLLM2, embedded_gguf

RUN_FILE = "attnedit-run.json"


@dataclass(frozen=True)
class Location:
    """Where a model is: arguments of ``from_pretrained``, and the directory if it is local."""

    path: str
    name: str
    directory: Path | None
    gguf: str | None = None
    trust_remote_code: bool = False

    def arguments(self, revision: str | None) -> dict[str, Any]:
        """Of ``from_pretrained``, beside the path."""
        # Unset, transformers may ask on the terminal.
        arguments: dict[str, Any] = {"trust_remote_code": self.trust_remote_code}
        if self.directory is not None:
            arguments["local_files_only"] = True
        if self.gguf is not None:
            arguments["gguf_file"] = self.gguf
        if revision is not None:
            arguments["revision"] = revision
        return arguments


def locate(model: str, revision: str | None, trust_remote_code: bool = False) -> Location:
    """Find a hub name, a directory, a ``.gguf`` or configuration file, or the demo's model.

    Raises:
        UsageError: there is no such thing, or it is none that a model could be read from.
    """
    return replace(_find(model, revision), trust_remote_code=trust_remote_code)


def _find(model: str, revision: str | None) -> Location:
    if not model.strip():
        raise UsageError(f"no model is named; give a hub name, a model directory, a .gguf file or {SMOLLM2}")
    if model == SMOLLM2:
        file = embedded_gguf()
        location = Location(str(file.parent), SMOLLM2, file.parent, file.name)
    else:
        path = Path(model).expanduser()
        looks_local = model.startswith((".", "/", "~")) or path.suffix in (".gguf", ".json") or model.count("/") > 1
        if path.is_dir():
            location = Location(str(path), model, path)
            if (path / RUN_FILE).exists():
                raise UsageError(f"{model} holds an unfinished attnedit run; finish it with the same compile command")
            if (path / "adapter_config.json").exists():
                raise UsageError(
                    f"{model} holds an adapter of PEFT; merge it into its model first: "
                    "AutoPeftModelForCausalLM.from_pretrained(directory).merge_and_unload().save_pretrained(...)"
                )
            if not (path / "config.json").exists():
                raise UsageError(f"{model} has no config.json; give the directory of a saved transformers model")
        elif path.is_file() and path.suffix == ".gguf":
            if importlib.util.find_spec("gguf") is None:
                raise UsageError(f"reading {model} needs the package gguf; install it: pip install gguf")
            location = Location(str(path.parent), model, path.parent, path.name)
        elif path.is_file() and path.suffix == ".json":
            location = Location(str(path), model, path.parent)
        elif path.exists():
            raise UsageError(f"{model} is neither a model directory nor a .gguf file")
        elif looks_local:
            raise UsageError(f"{model} does not exist; give a hub name, a model directory, a .gguf file or {SMOLLM2}")
        else:
            return Location(model, model, None)
    if revision is not None:
        raise UsageError(f"a revision applies to hub names only, and {model} is local; leave it out")
    return location

